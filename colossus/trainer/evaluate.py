"""Held-out text: what the model makes of text that it has never seen."""

import math
from dataclasses import dataclass

import torch

from colossus.data import Corpus, heldout_windows
from colossus.models import Decoder
from colossus.spec.plan import Plan
from colossus.trainer.step import loss_sums


@dataclass(frozen=True, slots=True)
class HeldOut:
    """`loss` in nats per token; `bits_per_byte` does not depend on the tokenizer."""

    loss: float
    bits_per_byte: float
    num_tokens: int


@torch.no_grad()
def evaluate(model: Decoder, corpus: Corpus, plan: Plan, *, max_tokens: int | None = None) -> HeldOut:
    """Loss over held-out documents, or over a fixed spread of them that has about `max_tokens` tokens.

    Windows of the training length that do not overlap: the first tokens of a window have little context, as
    in training. Raises DataError when nothing is held out.
    """
    windows = heldout_windows(corpus, plan.sequence_tokens, max_tokens)
    sequences = max(1, min(plan.micro_batch_sequences, 8))
    with torch.compiler.set_stance("force_eager"):  # a pass without gradients would be compiled anew
        total = sum(loss_sums(model, batch, plan)[1].loss.item() for batch in windows.batches(sequences))
    return HeldOut(
        loss=total / windows.num_tokens,
        bits_per_byte=total / math.log(2) / windows.num_bytes,
        num_tokens=windows.num_tokens,
    )
