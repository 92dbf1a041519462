"""What several data tests build or look at."""

import itertools
from pathlib import Path

import numpy as np

from colossus.data import Corpus
from colossus.spec.data import DataConfig, Source, TrainedTokenizer


def small_config(*sources: Source, heldout: float = 0.2, vocab_size: int = 400) -> DataConfig:
    """A configuration that prepares in well under a second."""
    return DataConfig(
        sources=sources, heldout_fraction=heldout, tokenizer=TrainedTokenizer(vocab_size=vocab_size)
    )


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file below `directory` with its content; the lock, which is always empty, left out."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".corpus.lock"
    }


def decoded(corpus: Corpus, source: int, split: str) -> list[str]:
    """The documents of one split, decoded from its shards."""
    record = corpus.manifest.sources[source]
    stream = corpus.train_stream(source) if split == "train" else corpus.heldout_stream(source)
    texts = []
    tokens = np.empty(stream.num_tokens, np.int64)
    if len(tokens):
        stream.copy(0, tokens)
    ends = stream.document_ends()
    for (begin, first_byte), (end, last_byte) in itertools.pairwise(ends.tolist()):
        assert tokens[begin] == corpus.end_of_document
        assert corpus.end_of_document not in tokens[begin + 1 : end]
        texts.append(corpus.tokenizer.decode(tokens[begin + 1 : end]))
        assert len(texts[-1].encode()) == last_byte - first_byte
    assert len(texts) == (record.train if split == "train" else record.heldout).documents
    return texts
