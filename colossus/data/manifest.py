"""What a prepared corpus says about itself: `manifest.json`, the last thing that preparation writes."""

from typing import Annotated, Literal

from pydantic import Field, ValidationError

from colossus.data.tokenizer import TokenizerKind
from colossus.errors import DataError
from colossus.spec.base import Frozen
from colossus.spec.data import DataConfig, Source

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"


class ShardRecord(Frozen):
    """One token file and its index beside it."""

    file: str
    """Path of the token file, relative to the corpus; the index has the suffix `.index` instead of
    `.tokens`."""
    tokens: int
    documents: int
    tokens_hash: str
    """xxh3 of the token file."""
    index_hash: str
    """xxh3 of the index: int64 [documents + 1, 2], cumulative tokens and cumulative UTF-8 bytes."""


class SplitRecord(Frozen):
    """The training or the held-out side of one source."""

    tokens: int
    """One end-of-document token per document included."""
    documents: int
    bytes: int
    """UTF-8 bytes of the documents' text."""
    shards: Annotated[tuple[ShardRecord, ...], Field(strict=False)]


class SourceRecord(Frozen):
    """One source as it was read."""

    source: Source
    listing: str
    """Fingerprint of names, sizes and modification times."""
    files: int
    documents: int
    """Documents found, duplicates included: `duplicates + train.documents + heldout.documents`."""
    bytes: int
    duplicates: int
    """Documents that equal an earlier one, of this source or of one before it."""
    duplicate_bytes: int
    skipped: dict[str, int]
    """Documents or files passed over, by reason."""
    train: SplitRecord
    heldout: SplitRecord


class TokenizerRecord(Frozen):
    """The tokenizer that made the tokens; a copy lies in the corpus."""

    kind: TokenizerKind
    file_hash: str
    """`Tokenizer.fingerprint`: xxh3 of the tokenizer file."""
    vocab_size: int
    asked_vocab_size: int | None
    """What the configuration asked for, when the text was too small to learn so many entries; else None."""
    end_of_document: int


class Manifest(Frozen):
    """A whole corpus."""

    format_version: Literal[1]
    generation: str
    """Folder inside the corpus that holds the shards and the tokenizer; made of `plan`."""
    plan: str
    """Fingerprint of everything that decides the content: configuration, listings, tokenizer file, shard
    size."""
    config: DataConfig
    config_fingerprint: str
    shard_tokens: int
    token_dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerRecord
    sources: Annotated[tuple[SourceRecord, ...], Field(strict=False)]

    @property
    def train_tokens(self) -> int:
        """Training tokens of all sources."""
        return sum(record.train.tokens for record in self.sources)

    @property
    def heldout_tokens(self) -> int:
        """Held-out tokens of all sources."""
        return sum(record.heldout.tokens for record in self.sources)

    @property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of the held-out documents of all sources."""
        return sum(record.heldout.bytes for record in self.sources)

    def to_json(self) -> bytes:
        """The file's content; equal manifests give equal bytes."""
        return self.model_dump_json(indent=1).encode() + b"\n"


def parse_manifest(content: bytes, where: str) -> Manifest:
    """A Manifest from the file's content. Raises DataError, naming `where`, when it is not one of this
    version."""
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{where} is no corpus manifest of format {FORMAT_VERSION} ({field or 'content'}: "
            f"{first['msg']}); prepare the corpus again into an empty folder"
        ) from error
