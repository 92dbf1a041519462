"""The second reading of a source: documents that are kept become token shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from colossus.data.duplicates import DUPLICATE, HASH, HELD_OUT
from colossus.data.manifest import ShardRecord, SplitRecord
from colossus.data.progress import Progress
from colossus.data.readers import Document, Skips, list_files, read_file
from colossus.data.shards import SHARD_DOCUMENTS, ShardWriter, token_dtype
from colossus.data.storage import return_free_memory, write_atomically
from colossus.data.survey import SourceChangedError, Survey, document_hash
from colossus.data.tokenizer import Ids, Tokenizer
from colossus.spec.base import Frozen
from colossus.spec.data import Source

BATCH_BYTES = 1 << 19
"""Text encoded at a time; the library takes some 200 bytes for each while it is on the way."""
TRIM_BYTES = 2 << 20
"""How often the memory that encoding leaves scattered over its threads is handed back: a few ms each time."""


class Place(Frozen):
    """How far a source has been read: everything before is in finished parts."""

    file: int = 0
    """Index of the file in the source's listing."""
    ordinal: int = 0
    """Documents of that file already done."""
    documents: int = 0
    """Documents of the source already done."""


class Part(Frozen):
    """A run of a source's documents whose shards, one per split, are finished."""

    end: Place
    train: ShardRecord | None
    train_bytes: int
    heldout: ShardRecord | None
    heldout_bytes: int
    duplicates: int
    duplicate_bytes: int


@dataclass(frozen=True)
class SourceTotals:
    """What the shards of one source hold."""

    train: SplitRecord
    heldout: SplitRecord
    duplicates: int
    duplicate_bytes: int


class Judged(NamedTuple):
    """A document, its verdict, and where reading stands after it."""

    document: Document
    verdict: int
    after: Place


class OpenPart:
    """The part being written: one shard for each split, closed together so that one place describes both."""

    def __init__(self, number: int, folder: Path, tokenizer: Tokenizer) -> None:
        dtype = token_dtype(tokenizer.vocab_size)
        self.train = ShardWriter(folder / f"train-{number:05}.tokens", dtype)
        self.heldout = ShardWriter(folder / f"heldout-{number:05}.tokens", dtype)
        self.duplicates = 0
        self.duplicate_bytes = 0

    def is_full(self, shard_tokens: int) -> bool:
        """Whether a shard has reached its size."""
        writers = (self.train, self.heldout)
        return any(w.tokens >= shard_tokens or w.documents >= SHARD_DOCUMENTS for w in writers)

    def close(self, end: Place, corpus: Path) -> Part:
        """Publishes both shards."""
        return Part(
            end=end,
            train=self.train.close(corpus),
            train_bytes=self.train.bytes,
            heldout=self.heldout.close(corpus),
            heldout_bytes=self.heldout.bytes,
            duplicates=self.duplicates,
            duplicate_bytes=self.duplicate_bytes,
        )


def encode_source(
    source: Source,
    index: int,
    survey: Survey,
    first: int,
    tokenizer: Tokenizer,
    target: Path,
    work: Path,
    shard_tokens: int,
    progress: Progress,
) -> SourceTotals:
    """Writes the shards of one source into `target`, going on after the parts that are finished.

    `first` is the number of documents in the sources before. Raises SourceChangedError when a document is not
    the one that was surveyed.
    """
    folder = target / f"source-{index:03}"
    folder.mkdir(exist_ok=True)
    parts = finished_parts(index, work)
    progress.advance(sum(part.train_bytes + part.heldout_bytes + part.duplicate_bytes for part in parts))
    end = parts[-1].end if parts else Place()
    part: OpenPart | None = None
    since_trim = 0
    for batch in bounded(judged_documents(source, index, survey, first, end, work), BATCH_BYTES):
        since_trim += sum(len(judged.document.data) for judged in batch)
        if since_trim >= TRIM_BYTES:
            return_free_memory()
            since_trim = 0
        for judged, ids in zip(batch, encoded(batch, tokenizer), strict=True):
            part = part or OpenPart(len(parts), folder, tokenizer)
            add(part, judged, ids)
            end = judged.after
            if part.is_full(shard_tokens):
                parts.append(finish(part, end, index, len(parts), target.parent, work))
                part = None
            progress.advance(len(judged.document.data))
    if end.documents != survey.documents:
        raise SourceChangedError(source)
    if part is not None:
        parts.append(finish(part, end, index, len(parts), target.parent, work))
    return totals(parts)


def add(part: OpenPart, judged: Judged, ids: Ids | None) -> None:
    """Puts a document where its verdict says."""
    size = len(judged.document.data)
    if ids is None:
        part.duplicates += 1
        part.duplicate_bytes += size
    else:
        (part.heldout if judged.verdict == HELD_OUT else part.train).add(ids, size)


def finish(part: OpenPart, end: Place, index: int, number: int, corpus: Path, work: Path) -> Part:
    """Publishes a part, then the record that says so: a part without its record is written again, the
    same."""
    record = part.close(end, corpus)
    write_atomically(part_path(index, number, work), record.model_dump_json().encode())
    return record


def part_path(index: int, number: int, work: Path) -> Path:
    """Where the record of a finished part is."""
    return work / f"part-{index:03}-{number:05}.json"


def finished_parts(index: int, work: Path) -> list[Part]:
    """The parts of a source that an earlier run finished."""
    parts: list[Part] = []
    while (path := part_path(index, len(parts), work)).exists():
        parts.append(Part.model_validate_json(path.read_bytes()))
    return parts


def judged_documents(
    source: Source, index: int, survey: Survey, first: int, start: Place, work: Path
) -> Iterator[Judged]:
    """Documents from `start` on with their verdicts, each checked to be the one that was surveyed."""
    number = start.documents
    with (work / survey.hashes).open("rb") as hashes, (work / "verdicts").open("rb") as verdicts:
        hashes.seek(number * HASH.itemsize)
        verdicts.seek(first + number)
        for file_index, file in enumerate(list_files(source)):
            if file_index < start.file:
                continue
            for document in read_file(file, index, source.text_field, Skips()):
                if file_index == start.file and document.ordinal < start.ordinal:
                    continue
                # Past the survey's end this reads b"", which no hash equals.
                if document_hash(document.data) != hashes.read(HASH.itemsize):
                    raise SourceChangedError(source)
                number += 1
                after = Place(file=file_index, ordinal=document.ordinal + 1, documents=number)
                yield Judged(document, verdicts.read(1)[0], after)


def bounded(documents: Iterator[Judged], max_bytes: int) -> Iterator[list[Judged]]:
    """Groups of documents of at most `max_bytes` of text, or one document."""
    group: list[Judged] = []
    size = 0
    for judged in documents:
        if group and size + len(judged.document.data) > max_bytes:
            yield group
            group, size = [], 0
        group.append(judged)
        size += len(judged.document.data)
    if group:
        yield group


def encoded(batch: Sequence[Judged], tokenizer: Tokenizer) -> list[Ids | None]:
    """END and the ids of each document; None for a duplicate, which is not encoded."""
    kept = [judged.document.text for judged in batch if judged.verdict != DUPLICATE]
    end = np.array([tokenizer.end_of_document], dtype=np.uint32)
    rows = iter(tokenizer.encode_batch(kept) if kept else ())
    return [None if judged.verdict == DUPLICATE else np.concatenate([end, next(rows)]) for judged in batch]


def totals(parts: list[Part]) -> SourceTotals:
    """Adds up parts."""
    return SourceTotals(
        train=split([part.train for part in parts], sum(part.train_bytes for part in parts)),
        heldout=split([part.heldout for part in parts], sum(part.heldout_bytes for part in parts)),
        duplicates=sum(part.duplicates for part in parts),
        duplicate_bytes=sum(part.duplicate_bytes for part in parts),
    )


def split(records: list[ShardRecord | None], num_bytes: int) -> SplitRecord:
    """One split's record of the shards that have documents."""
    shards = tuple(record for record in records if record is not None)
    return SplitRecord(
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        bytes=num_bytes,
        shards=shards,
    )
