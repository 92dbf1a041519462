"""Held-out text in windows, for a loss in bits per byte that does not depend on the tokenizer."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from colossus.data.batches import IGNORED, Batch, document_indices
from colossus.data.corpus import Corpus
from colossus.errors import DataError

Segments = npt.NDArray[np.int64]
"""[segments, 3]: source, first token in its held-out stream, number of tokens."""


class HeldOutWindows:
    """Held-out documents, end to end, in windows of T tokens that do not overlap.

    The covered text is whole documents. Of each, every token is a target once, and so is the END that closes
    it (the END that opens the first is given). So with `nats` the summed loss over all targets that are not
    IGNORED, `nats / (ln 2 · num_bytes)` is exactly the bits per byte of the covered text.

    Attributes:
        num_windows: how many there are; the last one may be part padding.
        num_tokens: targets in all: the documents' tokens and one END each.
        num_bytes: UTF-8 bytes of the covered documents.
        num_documents: covered documents.
    """

    def __init__(self, corpus: Corpus, context_tokens: int, source: int | None = None) -> None:
        """See `heldout_windows`."""
        indices = range(len(corpus.manifest.sources)) if source is None else (source,)
        self._streams = {index: corpus.heldout_stream(index) for index in indices}
        self._end = corpus.end_of_document
        self.context_tokens = context_tokens
        table = np.concatenate(
            [_documents(index, stream.document_ends()) for index, stream in self._streams.items()]
        )
        if not len(table):
            documents = sum(record.documents for record in corpus.manifest.sources)
            raise DataError(
                f"no document is held out of {documents:,} (held-out fraction "
                f"{corpus.manifest.config.heldout_fraction:g}, chosen by hash); raise the fraction "
                "or add documents"
            )
        self.num_documents = len(table)
        self.num_tokens = int(table[:, 2].sum())
        self.num_bytes = int(table[:, 3].sum())
        self.num_windows = -(-self.num_tokens // context_tokens)
        self._segments = _joined(table)
        self._starts = np.concatenate([[0], np.cumsum(self._segments[:, 2])])

    def __len__(self) -> int:
        return self.num_windows

    def read(self, first: int, count: int) -> Batch:
        """Windows [first, first + count), fewer at the end; padding holds END tokens and IGNORED targets."""
        count = min(count, self.num_windows - first)
        width = self.context_tokens
        begin = first * width
        # One token more than the windows hold, for the last target.
        # After the very last token comes the END that closes its document.
        flat = np.full(count * width + 1, self._end, np.int64)
        self._copy(begin, flat[: max(0, min(len(flat), self.num_tokens - begin))])
        tokens = flat[:-1].reshape(count, width)
        targets = flat[1:].copy()
        targets[max(0, self.num_tokens - begin) :] = IGNORED
        samples = np.arange(first, first + count, dtype=np.int64)
        return Batch(tokens, targets.reshape(count, width), document_indices(tokens, self._end), samples)

    def batches(self, sequences: int) -> Iterator[Batch]:
        """All windows in order, `sequences` at a time; the last batch may be smaller."""
        for first in range(0, self.num_windows, sequences):
            yield self.read(first, sequences)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(1)

    def _copy(self, begin: int, out: npt.NDArray[np.int64]) -> None:
        segment = int(np.searchsorted(self._starts, begin, side="right")) - 1
        filled = 0
        while filled < len(out):
            source, start, length = (int(value) for value in self._segments[segment])
            skipped = begin + filled - int(self._starts[segment])
            part = out[filled : filled + length - skipped]
            self._streams[source].copy(start + skipped, part)
            filled += len(part)
            segment += 1


def heldout_windows(corpus: Corpus, context_tokens: int, source: int | None = None) -> HeldOutWindows:
    """The held-out documents of a corpus, or of one source of it, as windows of `context_tokens`.

    Raises DataError when nothing is held out.
    """
    return HeldOutWindows(corpus, context_tokens, source)


def _documents(source: int, ends: Segments) -> Segments:
    """[documents, 4]: source, first token, tokens, bytes."""
    sizes = np.diff(ends, axis=0)
    return np.column_stack([np.full(len(sizes), source), ends[:-1, 0], sizes])


def _joined(table: Segments) -> Segments:
    """Documents as segments, those that follow each other as one."""
    follows = (table[1:, 0] == table[:-1, 0]) & (table[1:, 1] == table[:-1, 1] + table[:-1, 2])
    borders = np.flatnonzero(np.concatenate([[True], ~follows]))
    lengths = np.add.reduceat(table[:, 2], borders)
    return np.column_stack([table[borders, :2], lengths])
