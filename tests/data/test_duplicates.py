"""De-duplication in small blocks against a set in memory."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.data.duplicates import DUPLICATE, HELD_OUT, TRAIN, heldout_limit, resolve
from colossus.data.survey import document_hash


def naive(files: list[list[bytes]], fraction: float) -> list[int]:
    """The verdicts by a set."""
    seen: set[bytes] = set()
    verdicts = []
    for key in (key for file in files for key in file):
        if key in seen:
            verdicts.append(DUPLICATE)
        else:
            side = HELD_OUT if int.from_bytes(key[:8], "big") < fraction * 2**64 else TRAIN
            verdicts.append(side)
        seen.add(key)
    return verdicts


def run(files: list[list[bytes]], fraction: float, folder: Path, block: int, span: int) -> list[int]:
    """The verdicts by `resolve`."""
    paths = []
    for number, keys in enumerate(files):
        paths.append(folder / f"hashes-{number}")
        paths[-1].write_bytes(b"".join(keys))
    scratch = folder / "scratch"
    scratch.mkdir()
    resolve(paths, fraction, folder / "verdicts", scratch, block, span)
    assert list(scratch.iterdir()) == []
    return list((folder / "verdicts").read_bytes())


@given(
    st.lists(st.lists(st.integers(0, 40), max_size=60), max_size=4),
    st.integers(1, 50),
    st.integers(1, 50),
    st.sampled_from((0.0, 0.3, 0.999)),
)
@settings(max_examples=40, deadline=None)
def test_verdicts_equal_those_of_a_set(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[list[int]], block: int, span: int, fraction: float
) -> None:
    files = [[document_hash(str(number).encode()) for number in file] for file in numbers]
    folder = tmp_path_factory.mktemp("verdicts")
    assert run(files, fraction, folder, block, span) == naive(files, fraction)


def test_many_documents_in_many_buckets(tmp_path: Path) -> None:
    numbers = random.Random(1)
    files = [
        [document_hash(bytes([numbers.randrange(256), numbers.randrange(40)])) for _ in range(20_000)]
        for _ in "ab"
    ]
    assert run(files, 0.25, tmp_path, block=700, span=3000) == naive(files, 0.25)


def test_heldout_share_is_about_what_was_asked() -> None:
    keys = np.array(
        [int.from_bytes(document_hash(str(n).encode())[:8], "big") for n in range(20_000)], np.uint64
    )
    assert abs((keys < np.uint64(heldout_limit(0.05))).mean() - 0.05) < 0.01
    assert heldout_limit(0.0) == 0
