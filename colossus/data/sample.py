"""The text that a tokenizer learns from: a bounded, even sample of the training documents.

A document is in or out by a hash of its text, so the sample does not depend on reading order, and takes from
all parts of a source alike.
"""

import contextlib
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from colossus.data.storage import publish, temporary_name

ENTRY = np.dtype([("key", "<u8"), ("offset", "<i8"), ("length", "<i8")])
MAX_DOCUMENTS = 500_000
"""Bounds memory where documents are tiny."""
MAX_DISTINCT_BYTES = 1_600_000
"""Keeps the learner of a byte-level BPE at 200 to 350 MB, whatever the text."""
LARGEST_KEY = 2**64 - 1
WORDS = re.compile("[^0-9A-Za-z\r\n\x80-\U0010ffff]?[A-Za-z\x80-\U0010ffff]+|[!-/:-@\\[-`{-~]+")
"""About the pieces of `tokenizer.PIECES`; beyond ASCII, where words may be long, rather too much than too
little."""

Entries = npt.NDArray[Any]


class SampleSpool:
    """Collects the documents with the smallest keys of one source, on disk; at most about twice `max_bytes`
    of it."""

    def __init__(self, path: Path, max_bytes: int, max_documents: int = MAX_DOCUMENTS) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._max_documents = max_documents
        self._file = path.open("wb+")
        self._columns = (array("Q"), array("q"), array("q"))
        self._keys: set[int] = set()
        self._bytes = 0
        self._limit = LARGEST_KEY + 1

    def add(self, key: int, data: bytes) -> None:
        """Offers a document; `key` is a 64-bit hash of its text, so copies are taken once."""
        if key >= self._limit or key in self._keys:
            return
        keys, offsets, lengths = self._columns
        keys.append(key)
        offsets.append(self._bytes)
        lengths.append(len(data))
        self._keys.add(key)
        self._file.write(data)
        self._bytes += len(data)
        if self._bytes > 2 * self._max_bytes or len(keys) > 2 * self._max_documents:
            self._prune()

    def close(self) -> None:
        """Leaves the documents in the file and their entries beside it, in the order of reading."""
        self._prune()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        entries = index_path(self._path)
        with temporary_name(entries).open("wb") as out:
            self._entries().tofile(out)
        publish(temporary_name(entries), entries)

    def _entries(self) -> Entries:
        entries = np.empty(len(self._columns[0]), ENTRY)
        for name, column in zip(("key", "offset", "length"), self._columns, strict=True):
            entries[name] = column
        return entries

    def _prune(self) -> None:
        entries = self._entries()
        kept = smallest(entries, self._max_bytes, self._max_documents)
        if len(kept) == len(entries):
            return
        self._limit = int(kept["key"].max()) + 1 if len(kept) else 0
        # Kept documents move towards the start, in order, so none is overwritten before it is read.
        position = 0
        for entry in kept:
            self._file.seek(int(entry["offset"]))
            data = self._file.read(int(entry["length"]))
            self._file.seek(position)
            self._file.write(data)
            entry["offset"] = position
            position += len(data)
        self._file.truncate(position)
        self._file.seek(position)
        self._bytes = position
        self._columns = (array("Q", kept["key"]), array("q", kept["offset"]), array("q", kept["length"]))
        self._keys = set(self._columns[0])


def index_path(path: Path) -> Path:
    """Where the entries of the spool at `path` are."""
    return path.with_suffix(".entries")


def smallest(entries: Entries, max_bytes: int, max_documents: int = MAX_DOCUMENTS) -> Entries:
    """The documents with the smallest keys that together fit, one at the least, in their order of reading."""
    order = np.argsort(entries["key"], kind="stable")
    fit = np.searchsorted(np.cumsum(entries["length"][order]), max_bytes, side="right")
    return entries[np.sort(order[: min(max(int(fit), 1), max_documents)])]


def shares(available: list[int], total: int) -> list[int]:
    """Divides `total` bytes evenly; what a small source leaves goes to the larger ones."""
    result = [0] * len(available)
    for done, index in enumerate(sorted(range(len(available)), key=lambda index: (available[index], index))):
        result[index] = min(available[index], (total - sum(result)) // (len(available) - done))
    return result


def sampled_texts(spools: list[Path], max_bytes: int) -> Iterator[str]:
    """The training text for a tokenizer: an even share of each spool, every document once.

    Documents come in scrambled order, all sources mixed, so that stopping early leaves an even sample too.
    """
    indices = [np.fromfile(index_path(spool), ENTRY) for spool in spools]
    seen = np.empty(0, "<u8")
    budget = shares([int(entries["length"].sum()) for entries in indices], max_bytes)
    chosen: list[Entries] = []
    for entries, share in zip(indices, budget, strict=True):
        entries = smallest(entries, share) if share else entries[:0]
        entries = np.sort(entries[~np.isin(entries["key"], seen)], order="key")
        seen = np.concatenate([seen, entries["key"]])
        chosen.append(entries)
    # Keys of a source that is cut short are all small, so sources are mixed by rank and not by key.
    rank = np.concatenate([(np.arange(len(entries)) + 0.5) / max(len(entries), 1) for entries in chosen])
    source = np.repeat(np.arange(len(chosen)), [len(entries) for entries in chosen])
    entries = np.concatenate(chosen)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(spool.open("rb")) for spool in spools]
        for place in np.argsort(rank, kind="stable"):
            file = files[source[place]]
            file.seek(int(entries["offset"][place]))
            yield file.read(int(entries["length"][place])).decode("utf-8")


def limit_variety(texts: Iterable[str], max_distinct_bytes: int = MAX_DISTINCT_BYTES) -> Iterator[str]:
    """`texts` until their distinct words take `max_distinct_bytes` of UTF-8.

    What a BPE learner keeps in memory is its distinct words, about 100 bytes for each byte of them: 100 MB of
    code have 3 MB, but so have 3 MB of a script that writes no spaces.
    """
    words: set[str] = set()
    size = 0
    for text in texts:
        if size >= max_distinct_bytes:
            return
        new = set(WORDS.findall(text)) - words
        words |= new
        size += sum(len(word.encode()) for word in new)
        yield text
