"""The tokenizer's training sample: bounded, even, each document once."""

import random
from pathlib import Path

from colossus.data.sample import SampleSpool, limit_variety, sampled_texts, shares
from colossus.data.survey import document_hash


def spool(path: Path, texts: list[str], max_bytes: int, max_documents: int = 1000) -> Path:
    """A closed spool of texts."""
    made = SampleSpool(path, max_bytes, max_documents)
    for text in texts:
        made.add(int.from_bytes(document_hash(text.encode())[8:], "big"), text.encode())
        assert path.stat().st_size <= 2 * max_bytes + 100
    made.close()
    return path


def test_everything_when_it_fits(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(50)]
    found = list(sampled_texts([spool(tmp_path / "a", texts + texts, 10_000)], 10_000))
    assert sorted(found) == sorted(texts)


def test_bounded_and_independent_of_order(tmp_path: Path) -> None:
    texts = [f"text {n} " * (1 + n % 7) for n in range(900)]
    shuffled = random.Random(0).sample(texts, len(texts))
    one = list(sampled_texts([spool(tmp_path / "a", texts, 2000)], 2000))
    other = list(sampled_texts([spool(tmp_path / "b", shuffled, 2000)], 2000))
    assert sorted(one) == sorted(other)
    assert 1800 < sum(len(text) for text in one) <= 2000
    assert len(list(sampled_texts([spool(tmp_path / "c", texts, 10**6, max_documents=40)], 10**6))) == 40


def test_sources_share_evenly_and_leave_what_they_do_not_need(tmp_path: Path) -> None:
    assert shares([10, 1000, 1000], 210) == [10, 100, 100]
    assert shares([5, 5], 100) == [5, 5]
    spools = [
        spool(tmp_path / str(n), [f"{n} {k:06}" for k in range(count)], 8000)
        for n, count in ((0, 20), (1, 5000))
    ]
    found = list(sampled_texts(spools, 4000))
    assert sum(text.startswith("0") for text in found) == 20
    assert 450 < len(found) <= 500
    # Mixed all along, so that stopping early keeps the balance.
    assert 8 <= sum(text.startswith("0") for text in found[: len(found) // 2]) <= 12


def test_variety_is_bounded() -> None:
    varied = (chr(0x4E00 + n % 20_000) * 30 for n in range(10**9))
    assert sum(len(text.encode()) for text in limit_variety(varied, 9000)) == 9000
    assert len(list(limit_variety(["the same words"] * 500, 100))) == 500
