"""Held-out text: what the model makes of text that it has never seen."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from colossus.data import IGNORED, Corpus, HeldOutWindows, heldout_windows
from colossus.evaluate.score import score
from colossus.models import Decoder
from colossus.spec.rank import RankPlan
from colossus.trainer.precision import DTYPES


@dataclass(frozen=True, slots=True)
class HeldOut:
    """`loss` in nats per token; `bits_per_byte` does not depend on the tokenizer."""

    loss: float
    bits_per_byte: float
    num_tokens: int


def evaluate(
    model: Decoder,
    corpus: Corpus,
    plan: RankPlan,
    *,
    max_tokens: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> HeldOut | None:
    """Loss over all held-out windows, or over every n-th so that they have about `max_tokens` tokens.

    Windows have the training length and do not overlap: the first tokens of a window have little context, as in
    training. Over all of them the bits per byte are exact; over some, the loss per token is theirs and the bytes per
    token are the whole held-out part's. None when `stop` said so, asked before each batch. Raises DataError when
    nothing is held out.
    """
    windows = heldout_windows(corpus, plan.sequence_tokens)
    stride = 1 if max_tokens is None else max(1, -(-windows.num_tokens // max_tokens))
    chosen = range(0, windows.num_windows, stride)
    sequences = max(1, min(plan.micro_batch_sequences, 8)) if stride == 1 else 1
    nats, num_tokens = 0.0, 0
    with torch.compiler.set_stance("force_eager"):  # a pass without gradients would be compiled anew
        for first in chosen[::sequences]:
            if stop is not None and stop():
                return None
            batch = windows.read(first, sequences)
            scores = score(
                model,
                batch.tokens,
                batch.targets,
                batch.documents,
                dtype=DTYPES[plan.dtype],
                chunk_tokens=plan.loss_chunk_tokens,
            )
            nats -= float(scores.log_probabilities.sum())
            num_tokens += int((batch.targets != IGNORED).sum())
    return held_out(nats, num_tokens, windows)


def held_out(nats: float, num_tokens: int, windows: HeldOutWindows) -> HeldOut:
    """The result of `num_tokens` of the windows' tokens whose losses add up to `nats`."""
    loss = nats / num_tokens
    return HeldOut(loss, loss / math.log(2) * windows.num_tokens / windows.num_bytes, num_tokens)
