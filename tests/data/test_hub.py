"""Hub datasets: fetched through a stand-in, refused quickly without package or network."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from colossus.data import hub, prepare
from colossus.errors import DataError, HubUnavailable
from colossus.spec.data import Source

from .builders import decoded, small_config


def install(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], object], texts: list[str]) -> list[object]:
    """Puts stand-ins for `datasets` and `huggingface_hub` in place; returns what they are asked for."""
    asked: list[object] = []

    class Api:
        def dataset_info(self, name: str, timeout: float) -> object:
            return answer()

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        assert streaming
        asked.append((name, config, split))
        return [{"body": text} for text in texts]

    for name, attribute, value in (
        ("datasets", "load_dataset", load_dataset),
        ("huggingface_hub", "HfApi", Api),
    ):
        module = ModuleType(name)
        setattr(module, attribute, value)
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_a_hub_dataset_becomes_a_corpus(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = install(monkeypatch, lambda: "fine", texts)
    config = small_config(Source(path="hf:someone/stories/small", text_field="body"))
    corpus = prepare(config, tmp_path / "corpus")
    assert asked == [("someone/stories", "small", "train")]
    assert sorted(decoded(corpus, 0, "train") + decoded(corpus, 0, "heldout")) == sorted(texts)
    assert not list(tmp_path.rglob("hub-*"))
    # What is prepared needs no hub any more.
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prepare(config, tmp_path / "corpus").fingerprint == corpus.fingerprint


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(HubUnavailable, match=r"needs the package 'datasets'.*colossus-llm\[hub\]"):
        prepare(small_config(Source(path="hf:someone/stories")), tmp_path / "corpus")


def test_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> object:
        raise ConnectionError("nobody listens\nand more lines")

    install(monkeypatch, refused, [])
    with pytest.raises(
        HubUnavailable, match=r"cannot be fetched from here .ConnectionError: nobody listens.;"
    ):
        prepare(small_config(Source(path="hf:someone/stories")), tmp_path / "corpus")


def test_a_network_that_says_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ANSWER_S", 0.2)
    install(monkeypatch, lambda: time.sleep(5), [])
    began = time.monotonic()
    with pytest.raises(HubUnavailable, match=r"did not answer within 0\.2 s"):
        prepare(small_config(Source(path="hf:someone/stories")), tmp_path / "corpus")
    assert time.monotonic() - began < 3


def test_wrong_names_and_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda: "fine", ["x"])
    with pytest.raises(DataError, match="write hf:owner/name"):
        prepare(small_config(Source(path="hf:stories")), tmp_path / "a")
    with pytest.raises(DataError, match="no field 'text'; it has: body"):
        prepare(small_config(Source(path="hf:someone/stories")), tmp_path / "b")
