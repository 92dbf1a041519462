"""One step's arithmetic: micro-batches in, gradients of the mean token loss out."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from colossus.data import IGNORED, Batch
from colossus.models import Decoder, RouterLosses, chunked_cross_entropy
from colossus.models.moe import MixtureOfExperts
from colossus.spec.rank import RankPlan
from colossus.spec.run import Routing
from colossus.trainer.precision import DTYPES

NO_ROUTING = Routing(balance_loss=0.0, z_loss=0.0)


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


def loss_sums(
    model: Decoder,
    batch: Batch,
    plan: RankPlan,
    *,
    z_loss: float = 0.0,
    router_losses: RouterLosses | None = None,
) -> tuple[Tensor, Sums]:
    """The objective to differentiate (a sum over tokens) and the plain loss, of one micro-batch."""
    device = plan.machine.kind
    tokens, documents, targets = (
        torch.from_numpy(array).to(device) for array in (batch.tokens, batch.documents, batch.targets)
    )
    hidden = model(tokens, documents, dtype=DTYPES[plan.dtype], router_losses=router_losses).flatten(0, 1)
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


def accumulate_gradients(
    model: Decoder, batch: Batch, plan: RankPlan, *, z_loss: float = 0.0, routing: Routing = NO_ROUTING
) -> Sums:
    """Adds to every parameter's gradient that of the batch's mean token loss.

    Each micro-batch contributes the sum of its token losses divided by the whole batch's token count, so
    micro-batches of unequal size give exactly the gradient that the batch in one piece would; also the routers'
    losses, which are sums over sequences.
    """
    num_tokens = int((batch.targets != IGNORED).sum())
    losses = router_losses(routing, num_tokens, plan.machine.kind)
    total = torch.zeros((), device=plan.machine.kind)
    for micro_batch in split(batch, plan.micro_batch_sequences):
        objective, sums = loss_sums(model, micro_batch, plan, z_loss=z_loss, router_losses=losses)
        (objective / num_tokens).backward()
        total += sums.loss
    return Sums(total, num_tokens)


def router_losses(routing: Routing, num_tokens: int, device: str) -> RouterLosses | None:
    """Their weights, for a step of `num_tokens` on all ranks."""
    if not routing.balance_loss and not routing.z_loss:
        return None
    return RouterLosses(
        torch.tensor(routing.balance_loss / num_tokens, device=device),
        torch.tensor(routing.z_loss / num_tokens, device=device),
    )


def take_expert_loads(model: Decoder) -> float | None:
    """The busiest expert's tokens over the mean, the largest of all layers, since this was last asked; None where the
    model has no experts."""
    return worst_load([module.load for module in model.modules() if isinstance(module, MixtureOfExperts)])


def worst_load(loads: Collection[Tensor]) -> float | None:
    """Of each layer's loads, (num_experts,), the largest over the mean, the worst of all; sets them to 0."""
    if not loads:
        return None
    worst = torch.stack([load.max() / load.mean() for load in loads]).max().item()
    for load in loads:
        load.zero_()
    return worst
