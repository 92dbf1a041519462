"""The first reading of a source: counts, one hash per document, and a sample for the tokenizer."""

import os
from pathlib import Path
from typing import Any

from colossus.data.duplicates import heldout_limit
from colossus.data.progress import Progress
from colossus.data.readers import Skips, list_files, listing_entry, read_file
from colossus.data.sample import SampleSpool
from colossus.data.storage import publish, temporary_name, write_atomically
from colossus.errors import DataError
from colossus.spec.base import Frozen
from colossus.spec.data import DataConfig, Source, TrainedTokenizer


class SourceChangedError(DataError):
    """A source's text moves while it is read."""

    def __init__(self, source: Source) -> None:
        super().__init__(
            f"the files of source {source.path!r} changed while they were being read; prepare again"
        )


class Survey(Frozen):
    """What one source holds. Paths are relative to the work folder."""

    files: int
    documents: int
    bytes: int
    """UTF-8 bytes of the documents."""
    skipped: dict[str, int]
    skipped_text: str
    """The same for a person, with an example each."""
    hashes: str
    """One duplicates.HASH per document, in reading order."""
    sample: str


def document_hash(data: bytes) -> bytes:
    """16 bytes that decide a document's copies, its side and whether it is sampled: xxh3_128 of its text."""
    import xxhash

    return xxhash.xxh3_128_digest(data)


def survey_source(
    source: Source, index: int, config: DataConfig, listing: str, work: Path, progress: Progress
) -> Survey:
    """Surveys a source, or returns the survey that an earlier run finished.

    `listing` is the fingerprint that the plan was made with, empty when there is none to hold to. Raises
    DataError when the files are no longer those.
    """
    record = work / f"survey-{index:03}.json"
    if record.exists():
        return Survey.model_validate_json(record.read_bytes())
    progress.stage(f"reading {source.path}", None)
    survey = read_all(source, index, config, listing, work, progress)
    write_atomically(record, survey.model_dump_json().encode())
    return survey


def read_all(
    source: Source, index: int, config: DataConfig, listing: str, work: Path, progress: Progress
) -> Survey:
    """Reads every document once."""
    hashes, sample = work / f"hashes-{index:03}", work / f"sample-{index:03}"
    limit = heldout_limit(config.heldout_fraction)
    wanted = config.tokenizer
    spool = SampleSpool(sample, wanted.max_training_bytes) if isinstance(wanted, TrainedTokenizer) else None
    skips, digest = Skips(), listing_digest()
    files = documents = num_bytes = 0
    with temporary_name(hashes).open("wb") as out:
        for file in list_files(source, skips):
            files += 1
            digest.update(listing_entry(file))
            for document in read_file(file, index, source.text_field, skips):
                key = document_hash(document.data)
                out.write(key)
                documents += 1
                num_bytes += len(document.data)
                progress.advance(len(document.data))
                if spool is not None and int.from_bytes(key[:8], "big") >= limit:
                    spool.add(int.from_bytes(key[8:], "big"), document.data)
        out.flush()
        os.fsync(out.fileno())
    if listing and digest.hexdigest() != listing:
        raise SourceChangedError(source)
    if spool is not None:
        spool.close()
    publish(temporary_name(hashes), hashes)
    return Survey(
        files=files,
        documents=documents,
        bytes=num_bytes,
        skipped=dict(sorted(skips.counts.items())),
        skipped_text=str(skips),
        hashes=hashes.name,
        sample=sample.name,
    )


def listing_digest() -> Any:
    """The hash that `readers.listing_fingerprint` uses, to be fed file by file."""
    import xxhash

    return xxhash.xxh3_64()
