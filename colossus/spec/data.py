"""What text a run reads, and how it becomes tokens."""

from typing import Annotated, Literal

from pydantic import Field

from colossus.spec.base import Frozen

STANDARD_LIBRARY = "stdlib"
"""The source that every machine has: the running Python's standard library."""


class Source(Frozen):
    """One place that text comes from.

    `path` is `stdlib`, a file, a directory, a glob, or a Hugging Face dataset name (`hf:owner/name`).
    `weight` is the share of samples drawn from it, relative to the other sources' weights.
    """

    path: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    text_field: str = "text"
    """The field that holds the text, in .jsonl and .parquet files and hub datasets."""


class TrainedTokenizer(Frozen):
    """A byte-level BPE learned from the training documents."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=257)] = 4096
    """Entries in all: 256 bytes, the end-of-document mark, and the merges."""
    max_training_bytes: Annotated[int, Field(gt=0)] = 100_000_000
    """Text given to the learner at the most, taken evenly from all sources; bounds its memory."""


class LoadedTokenizer(Frozen):
    """An existing tokenizer: a `tokenizer.json`, or a SentencePiece `.model`."""

    kind: Literal["file"] = "file"
    path: str


class DataConfig(Frozen):
    """The corpus: sources, held-out share, tokenizer."""

    sources: Annotated[tuple[Source, ...], Field(strict=False, min_length=1)] = (
        Source(path=STANDARD_LIBRARY),
    )
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of documents held out, chosen by document hash: a document never changes side as a corpus grows."""
    tokenizer: Annotated[TrainedTokenizer | LoadedTokenizer, Field(discriminator="kind")] = TrainedTokenizer()
