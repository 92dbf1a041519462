"""One step's arithmetic: micro-batches in, gradients of the mean token loss out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from colossus.data import IGNORED, Batch
from colossus.models import Decoder, chunked_cross_entropy
from colossus.spec.rank import RankPlan
from colossus.trainer.precision import DTYPES


@dataclass(frozen=True, slots=True)
class Sums:
    """Over some tokens: their summed loss in nats, and how many there are. Sums add up; means do not."""

    loss: Tensor
    num_tokens: int


def split(batch: Batch, sequences: int) -> list[Batch]:
    """A batch in parts of `sequences`, the last one smaller where they do not come out even."""
    return [
        Batch(batch.tokens[i : i + sequences], batch.targets[i : i + sequences],
              batch.documents[i : i + sequences], batch.samples[i : i + sequences])
        for i in range(0, len(batch.samples), sequences)
    ]  # fmt: skip


def loss_sums(model: Decoder, batch: Batch, plan: RankPlan, *, z_loss: float = 0.0) -> tuple[Tensor, Sums]:
    """The objective to differentiate (a sum over tokens) and the plain loss, of one micro-batch."""
    device = plan.machine.kind
    tokens, documents, targets = (
        torch.from_numpy(array).to(device) for array in (batch.tokens, batch.documents, batch.targets)
    )
    hidden = model(tokens, documents, dtype=DTYPES[plan.dtype]).flatten(0, 1)
    targets = targets.flatten()
    if (batch.targets == IGNORED).any():
        counted = targets != IGNORED
        hidden, targets = hidden[counted], targets[counted]
    objective, loss = chunked_cross_entropy(
        hidden,
        model.head_weight,
        targets,
        chunk_tokens=plan.loss_chunk_tokens,
        multiplier=model.spec.logit_multiplier,
        soft_cap=model.spec.logit_soft_cap,
        z_loss=z_loss,
    )
    return objective, Sums(loss, targets.numel())


def accumulate_gradients(model: Decoder, batch: Batch, plan: RankPlan, *, z_loss: float = 0.0) -> Sums:
    """Adds to every parameter's gradient that of the batch's mean token loss.

    Each micro-batch contributes the sum of its token losses divided by the whole batch's token count, so
    micro-batches of unequal size give exactly the gradient that the batch in one piece would.
    """
    num_tokens = int((batch.targets != IGNORED).sum())
    total = torch.zeros((), device=plan.machine.kind)
    for micro_batch in split(batch, plan.micro_batch_sequences):
        objective, sums = loss_sums(model, micro_batch, plan, z_loss=z_loss)
        (objective / num_tokens).backward()
        total += sums.loss
    return Sums(total, num_tokens)
