"""Which documents are kept, and on which side: exact de-duplication in bounded memory for any number of
documents.

Surveying writes one 128-bit hash per document, in reading order. Here those files become one *verdict* per
document, a byte: DUPLICATE, TRAIN or HELD_OUT. Hashes are read in blocks; a block's first occurrences go to
one of many bucket files by their leading bits, so that all copies of a document meet in one bucket and a
bucket fits in memory. The places of duplicates found there are spilled again, by place, and the verdicts are
written in order.

Two different documents share a hash with probability about n² / 2^129: 10^-19 for ten billion documents.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from colossus.data.storage import publish, temporary_name

DUPLICATE, TRAIN, HELD_OUT = 0, 1, 2
HASH = np.dtype([("high", ">u8"), ("low", ">u8")])
"""16 bytes of xxh3_128, as its library writes them."""
PLACED = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<i8")])
BLOCK_DOCUMENTS = 1 << 19
"""About 50 MB in flight per block or bucket, sorting included."""
RANGE_DOCUMENTS = 1 << 20
"""Verdicts made at a time; their hashes are 16 MB."""

Array = npt.NDArray[Any]


def heldout_limit(fraction: float) -> int:
    """Documents whose `high` is below this are held out: a property of the text alone."""
    return min(int(fraction * 2.0**64), 2**64 - 1)


def resolve(
    hash_files: Iterable[Path],
    heldout_fraction: float,
    verdicts: Path,
    work: Path,
    block_documents: int = BLOCK_DOCUMENTS,
    range_documents: int = RANGE_DOCUMENTS,
) -> None:
    """Writes `verdicts`, one byte per document of all `hash_files` in order; `work` is an empty scratch
    folder."""
    files = list(hash_files)
    total = sum(file.stat().st_size for file in files) // HASH.itemsize
    buckets = min(max(1, -(-total // block_documents)), 4096)
    spill_blocks(files, buckets, work, block_documents, range_documents)
    for bucket in range(buckets):
        path = work / f"bucket-{bucket:04}"
        if path.exists():
            _, repeats = first_and_repeats(np.fromfile(path, PLACED))
            spill_places(repeats["place"], work, range_documents)
            path.unlink()
    limit = np.uint64(heldout_limit(heldout_fraction))
    temporary = temporary_name(verdicts)
    with temporary.open("wb") as out:
        for number, hashes in enumerate(blocks(files, range_documents)):
            verdict = np.where(hashes["high"].astype("<u8") < limit, HELD_OUT, TRAIN).astype(np.uint8)
            path = work / f"repeats-{number:06}"
            if path.exists():
                verdict[np.fromfile(path, "<i8") - number * range_documents] = DUPLICATE
                path.unlink()
            verdict.tofile(out)
        out.flush()
        os.fsync(out.fileno())
    publish(temporary, verdicts)


def spill_blocks(
    files: list[Path], buckets: int, work: Path, block_documents: int, range_documents: int
) -> None:
    """Sends each block's first occurrences to their buckets, and the places of repeats within it to ranges.

    So even a billion copies of one document leave one entry per block in its bucket.
    """
    place = 0
    for hashes in blocks(files, block_documents):
        placed = np.empty(len(hashes), PLACED)
        placed["high"], placed["low"] = hashes["high"], hashes["low"]
        placed["place"] = np.arange(place, place + len(hashes))
        place += len(hashes)
        first, repeats = first_and_repeats(placed)
        spill_places(repeats["place"], work, range_documents)
        # Sorted by hash, so each bucket is one run.
        number = ((first["high"] >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)
        borders = np.searchsorted(number, np.arange(buckets + 1, dtype=np.uint64))
        for bucket in np.flatnonzero(np.diff(borders)):
            with (work / f"bucket-{bucket:04}").open("ab") as out:
                first[borders[bucket] : borders[bucket + 1]].tofile(out)


def spill_places(places: Array, work: Path, range_documents: int) -> None:
    """Appends places to the file of their range."""
    places = np.sort(places)
    ranges = places // range_documents
    for number in np.unique(ranges):
        with (work / f"repeats-{number:06}").open("ab") as out:
            places[ranges == number].astype("<i8").tofile(out)


def first_and_repeats(placed: Array) -> tuple[Array, Array]:
    """Splits documents into the earliest of each hash (sorted by hash) and all others.

    Of equal hashes the earlier place comes first in `placed`: blocks are in order of place, and buckets are
    filled block by block. The sort is stable and keeps that.
    """
    placed = placed[np.lexsort((placed["low"], placed["high"]))]
    repeated = np.zeros(len(placed), bool)
    repeated[1:] = (placed["high"][1:] == placed["high"][:-1]) & (placed["low"][1:] == placed["low"][:-1])
    return placed[~repeated], placed[repeated]


def blocks(files: list[Path], documents: int) -> Iterator[Array]:
    """The hashes of all files as one sequence, in blocks of exactly `documents` but for the last."""
    held: list[Array] = []
    count = 0
    for path in files:
        with path.open("rb") as file:
            while len(part := np.fromfile(file, HASH, documents - count)):
                held.append(part)
                count += len(part)
                if count == documents:
                    yield np.concatenate(held)
                    held, count = [], 0
    if held:
        yield np.concatenate(held)
