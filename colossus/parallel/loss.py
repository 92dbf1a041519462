"""Cross-entropy where each rank of a team has the logits of its part of the vocabulary (arXiv:1909.08053)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from colossus.parallel.collectives import Team


class _ParallelCrossEntropy(torch.autograd.Function):
    """As models/loss.py: chunk by chunk, with the gradients made at once. The ranks exchange three numbers a token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        first_row: int,
        team: Team,
        chunk_tokens: int,
        multiplier: float,
        cap: float | None,
        z_loss: float,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = hidden.dtype
        head = weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if wants_gradient else None
        grad_head = torch.zeros_like(weight, dtype=wide) if wants_gradient else None
        objective = hidden.new_zeros((), dtype=wide)
        loss = objective.clone()
        for start in range(0, hidden.shape[0], chunk_tokens):
            here = slice(start, start + chunk_tokens)
            chunk = hidden[here]
            logits = (chunk @ head.t()).to(wide)
            if multiplier != 1:
                logits *= multiplier
            squashed = None
            if cap is not None:
                squashed = torch.tanh(logits / cap)
                logits = squashed * cap
            target = targets[here, None] - first_row
            is_here = (target >= 0) & (target < head.shape[0])
            target = target.masked_fill(~is_here, 0)
            top = (
                logits.amax(-1, keepdim=True)
                if head.shape[0]
                else logits.new_full((len(chunk), 1), -torch.inf)
            )
            dist.all_reduce(top, dist.ReduceOp.MAX, group=team.process_group)
            logits.sub_(top)
            of_target = (logits.gather(1, target) if head.shape[0] else torch.zeros_like(top)).masked_fill(
                ~is_here, 0
            )
            exponents = logits.exp_()
            sums = torch.cat([exponents.sum(-1, keepdim=True), of_target], -1)
            dist.all_reduce(sums, group=team.process_group)
            partition, of_target = sums[:, :1], sums[:, 1:]
            log_partition = partition.log()
            chunk_loss = (log_partition - of_target).sum()
            loss += chunk_loss
            objective += chunk_loss
            if z_loss:
                objective += z_loss * (top + log_partition).square().sum()
            if not wants_gradient:
                continue
            probabilities = exponents.div_(partition)
            of_z_loss = probabilities * (2 * z_loss * (top + log_partition)) if z_loss else None
            gradient = probabilities
            if head.shape[0]:
                gradient.scatter_add_(1, target, -is_here.to(gradient.dtype))
            if of_z_loss is not None:
                gradient += of_z_loss
            if squashed is not None:
                gradient *= 1 - squashed.square_()
            if multiplier != 1:
                gradient *= multiplier
            gradient = gradient.to(dtype)
            del (
                logits,
                exponents,
                probabilities,
                of_z_loss,
                squashed,
            )  # else they stay while the next ones are made
            torch.mm(gradient, head, out=grad_hidden[here])
            grad_head += gradient.t() @ chunk
            del gradient
        ctx.mark_non_differentiable(loss)
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(weight.dtype))
        return objective, loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * scale, grad_head * scale, *(None,) * 8


def parallel_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    first_row: int,
    team: Team,
    chunk_tokens: int,
    multiplier: float = 1.0,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`models.loss.chunked_cross_entropy` of the same tokens on every rank of the team.

    head_weight: (rows of the vocabulary that are here, from `first_row` on, hidden_size). Objective and loss are the
    same on all ranks; the gradient of `hidden` is this rank's part of a sum over the team.
    """
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
    return _ParallelCrossEntropy.apply(
        hidden,
        head_weight,
        targets,
        first_row,
        team,
        chunk_tokens,
        multiplier,
        soft_cap,
        z_loss,
        wants_gradient,
    )
