"""What a model makes of text: loss per token, and bits per byte, which do not depend on the tokenizer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from colossus.data import IGNORED, Progress, SilentProgress
from colossus.errors import CheckpointError
from colossus.evaluate.score import CHUNK_TOKENS, score
from colossus.evaluate.windows import Piece, windows
from colossus.models import Decoder


@dataclass(frozen=True, slots=True)
class TextLoss:
    """Over some text; two of them add up to that over both texts."""

    nats: float
    """Summed loss of all targets."""
    num_tokens: int
    """Targets: the tokens of the text and one END for each document."""
    num_bytes: int
    """UTF-8 bytes of the text."""
    num_documents: int

    def __add__(self, other: "TextLoss") -> "TextLoss":
        return TextLoss(
            self.nats + other.nats,
            self.num_tokens + other.num_tokens,
            self.num_bytes + other.num_bytes,
            self.num_documents + other.num_documents,
        )

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        """nats / (ln 2 · bytes): comparable across tokenizers."""
        return self.nats / (math.log(2) * self.num_bytes)

    @property
    def perplexity(self) -> float:
        """exp(loss per token); infinite where that is more than a float holds."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def text_losses(
    model: Decoder,
    pieces: Iterable[Piece],
    *,
    context_tokens: int,
    stride_tokens: int | None = None,
    sequences: int = 8,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
    chunk_tokens: int = CHUNK_TOKENS,
    progress: Progress | None = None,
) -> dict[int, TextLoss]:
    """The loss over the pieces, for each owner of some; documents stand end to end and do not see each other.

    stride_tokens: how far on each window begins; None: as long as one, so that they do not overlap, as in training.
    sequences: windows at a time. Memory holds one batch, one document and a number for each owner. `progress` hears
    of windows' tokens. Raises ConfigError for a stride that does not fit, CheckpointError when a loss is not finite.
    """
    progress = progress or SilentProgress()
    nats: dict[int, float] = {}
    counts: dict[int, list[int]] = {}  # tokens, bytes, documents

    def counted(pieces: Iterable[Piece]) -> Iterable[Piece]:
        for piece in pieces:
            entry = counts.setdefault(piece.owner, [0, 0, 0])
            for column, more in enumerate((piece.num_tokens, piece.num_bytes, 1)):
                entry[column] += more
            yield piece

    stride = context_tokens if stride_tokens is None else stride_tokens
    batches = windows(
        counted(pieces),
        context_tokens=context_tokens,
        stride_tokens=stride,
        sequences=sequences,
        padding=padding,
    )
    with torch.compiler.set_stance("force_eager"):  # a pass without gradients would be compiled anew
        for batch in batches:
            scores = score(
                model, batch.tokens, batch.targets, batch.documents, dtype=dtype, chunk_tokens=chunk_tokens
            )
            there = batch.targets != IGNORED
            owners = batch.owners[there]
            if not len(owners):
                continue
            first = int(owners.min())
            sums = np.bincount(owners - first, -scores.log_probabilities[there])
            for owner in np.unique(owners):
                nats[int(owner)] = nats.get(int(owner), 0.0) + float(sums[owner - first])
            progress.advance(int(there.sum()))
    if any(not math.isfinite(total) for total in nats.values()):
        raise CheckpointError(
            f"the loss of {model.spec.name} is not a finite number on this text: its weights hold infinity or NaN, or "
            f"make it"
        )
    return {owner: TextLoss(nats[owner], *counts[owner]) for owner in counts}
