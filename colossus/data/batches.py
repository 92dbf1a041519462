"""From the sample order to arrays that a model takes."""

from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

from colossus.data.corpus import Corpus
from colossus.data.manifest import SourceRecord
from colossus.data.order import SampleOrder
from colossus.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Sequences side by side, B of T tokens."""

    tokens: npt.NDArray[np.int64]
    """[B, T]"""
    targets: npt.NDArray[np.int64]
    """[B, T]; the token after each of `tokens`. IGNORED where there is nothing to predict."""
    documents: npt.NDArray[np.int32]
    """[B, T]; index of the token's document within its row, from 0: attention may stop where it changes."""
    samples: npt.NDArray[np.int64]
    """[B]; the global index of each sequence."""


IGNORED = -100
"""A target that counts for nothing: padding after the last held-out token (the value that PyTorch
ignores)."""


def document_indices(tokens: npt.NDArray[np.int64], end_of_document: int) -> npt.NDArray[np.int32]:
    """[B, T] → for each token how many documents began in its row up to it, the row's first not counted."""
    begins = tokens == end_of_document
    begins[:, 0] = False
    return np.cumsum(begins, axis=1, dtype=np.int32)


class BatchReader:
    """The training batches of a run, at random access: the same (corpus, seed, context, batch) give the same
    arrays.

    Attributes:
        order: where each sample comes from; for ledgers.
    """

    def __init__(self, corpus: Corpus, seed: int, context_tokens: int, global_batch_sequences: int) -> None:
        """Raises DataError when a source is too small to fill its part of one batch without repeating a
        window."""
        records = corpus.manifest.sources
        self.context_tokens = context_tokens
        self.global_batch_sequences = global_batch_sequences
        self.end_of_document = corpus.end_of_document
        self.order = SampleOrder.of(
            seed,
            tuple(record.source.weight for record in records),
            tuple(record.train.tokens for record in records),
            context_tokens,
        )
        self._streams = [corpus.train_stream(index) for index in range(len(records))]
        refuse_small(corpus, self.order, context_tokens, global_batch_sequences)

    @property
    def windows_per_epoch(self) -> tuple[int, ...]:
        """Windows of each source that one epoch of it takes."""
        return tuple(order.num_windows for order in self.order.orders)

    def read(self, step: int) -> Batch:
        """The global batch of a step: samples [step·B, (step+1)·B)."""
        return self.read_samples(step * self.global_batch_sequences, self.global_batch_sequences)

    def read_samples(self, first: int, count: int) -> Batch:
        """Samples [first, first + count): what one replica group takes of a step, or any other range."""
        samples = np.arange(first, first + count, dtype=np.int64)
        places = self.order.locate(samples)
        rows = np.empty((count, self.context_tokens + 1), np.int64)
        for row, source, start in zip(rows, places.source.tolist(), places.start.tolist(), strict=True):
            self._streams[source].copy(start, row)
        tokens = rows[:, :-1]
        return Batch(tokens, rows[:, 1:], document_indices(tokens, self.end_of_document), samples)


def _left_out(record: SourceRecord) -> str:
    """Where a source's other documents are, when it has too few."""
    if not record.duplicates and not record.heldout.documents:
        return ""
    return f" ({record.heldout.documents:,} documents are held out, {record.duplicates:,} are duplicates)"


def refuse_small(corpus: Corpus, order: SampleOrder, context_tokens: int, sequences: int) -> None:
    """Raises DataError, with numbers and what would work, when one batch would need some window twice."""
    if context_tokens < 1 or sequences < 1:
        raise DataError(
            f"a batch of {sequences} sequences of {context_tokens} tokens is none; both begin at 1"
        )
    for record, windows, share in zip(
        corpus.manifest.sources, order.orders, order.mixture.shares, strict=True
    ):
        tokens = record.train.tokens
        needed = ceil(share * sequences)
        if tokens > context_tokens and windows.num_windows >= needed:
            continue
        works: list[str] = []
        context = min(tokens - 1, tokens // needed)
        if context >= 1:
            works.append(f"context_tokens ≤ {context:,}")
        if windows.num_windows >= 1 and tokens > context_tokens:
            works.append(f"a global batch of ≤ {max(1, int(windows.num_windows / share)):,} sequences")
        works.append(f"at least {max(needed * context_tokens, context_tokens + 1):,} training tokens of it")
        raise DataError(
            f"source {record.source.path!r} is too small: it has {tokens:,} training tokens in "
            f"{record.train.documents:,} documents, and one batch takes {needed:,} windows of "
            f"{context_tokens:,} from it{_left_out(record)}. Works: {', or '.join(works)}"
        )
