"""Small corpora that the data tests share."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from colossus.data import Corpus, prepare
from colossus.spec.data import Source

from .builders import small_config

SPACED = "the of def return self x1 value_name 3.14 (a, b) naïve 你好 🙂 == [0] # todo\n \t"
WORDS = SPACED.split(" ")


def sentence(random_words: random.Random, length: int) -> str:
    """Text-like text, never empty."""
    return "t" + " ".join(random_words.choice(WORDS) for _ in range(length))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """400 distinct documents of very different lengths."""
    source = random.Random(5)
    return [f"{number}: {sentence(source, source.choice((3, 30, 300)))}\n" for number in range(400)]


@pytest.fixture
def write_tree(tmp_path: Path) -> Callable[[dict[str, str | bytes]], Path]:
    """Writes files into a new folder and returns it."""
    numbers: Iterator[int] = iter(range(100))

    def write(files: dict[str, str | bytes]) -> Path:
        root = tmp_path / f"tree{next(numbers)}"
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return root

    return write


@pytest.fixture(scope="session")
def two_source_corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Corpus:
    """Two folders with weights 3 : 1, in many shards of about 2000 tokens."""
    root = tmp_path_factory.mktemp("two_sources")
    for number, text in enumerate(texts):
        folder = root / ("left" if number % 3 else "right")
        folder.mkdir(exist_ok=True)
        (folder / f"{number:04}.txt").write_bytes(text.encode())
    config = small_config(Source(path=str(root / "left"), weight=3.0), Source(path=str(root / "right")))
    return prepare(config, root / "corpus", shard_tokens=2000)
