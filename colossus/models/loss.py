"""Cross-entropy of the head's predictions, without ever holding all logits."""

from typing import Any

import torch
from torch import Tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Goes through the tokens in chunks; makes each chunk's logits, its loss and at once its gradients.

    The backward pass then only scales them. For n tokens and a vocabulary of v this holds chunk·v logits in
    place of n·v, and computes none twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_tokens: int,
        multiplier: float,
        cap: float | None,
        z_loss: float,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = hidden.dtype
        head = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if wants_gradient else None
        # Added up in float32 also where the weight has been gathered in bfloat16.
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_head = torch.zeros_like(weight, dtype=wide) if wants_gradient else None
        objective = hidden.new_zeros((), dtype=torch.float32)
        loss = objective.clone()
        row_starts = torch.arange(chunk_tokens, device=hidden.device) * weight.shape[0]
        for start in range(0, hidden.shape[0], chunk_tokens):
            here = slice(start, start + chunk_tokens)
            chunk, target = hidden[here], targets[here, None]
            logits = chunk @ head.t()
            if multiplier != 1:
                logits *= multiplier
            if cap is not None:
                squashed = torch.tanh(logits / cap)
                logits = squashed * cap
            probabilities = torch.softmax(logits, -1, dtype=torch.float32)
            # The largest probability is at least 1/vocabulary: it cannot underflow as the target's own can.
            top_logit, top = logits.max(-1, keepdim=True)
            log_top = probabilities.gather(1, top).log()
            # Logits first: their difference is small where they themselves are large.
            chunk_loss = (top_logit.float() - logits.gather(1, target).float() - log_top).sum()
            loss += chunk_loss
            objective += chunk_loss
            if z_loss:
                log_partition = top_logit.float() - log_top
                objective += z_loss * log_partition.square().sum()
            if not wants_gradient:
                continue
            # d objective / d logits = softmax - one_hot(target) + 2·z·log_partition · softmax, in this order: the
            # last part is small beside 1 and would be rounded away.
            of_z_loss = probabilities * (2 * z_loss * log_partition) if z_loss else None
            gradient = probabilities
            # One flat index a row: much faster on a CPU than a scatter along the vocabulary.
            gradient.view(-1)[row_starts[: len(target)] + target[:, 0]] -= 1
            if of_z_loss is not None:
                gradient += of_z_loss
            if cap is not None:
                gradient *= 1 - squashed.float().square_()
            if multiplier != 1:
                gradient *= multiplier
            gradient = gradient.to(dtype)
            del logits, probabilities, of_z_loss  # else they stay while the next chunk's are made
            torch.mm(gradient, head, out=grad_hidden[here])
            grad_head += gradient.t() @ chunk
            del gradient
        ctx.mark_non_differentiable(loss)
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(weight.dtype))
        return objective, loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * scale, grad_head * scale, None, None, None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    chunk_tokens: int,
    multiplier: float = 1.0,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of the cross-entropy of `soft_cap(multiplier · hidden · head_weightᵀ)`, in nats.

    hidden: (tokens, hidden_size) in the dtype that the matmuls run in; head_weight: (vocab_size,
    hidden_size); targets: int64 (tokens,). Returns (objective, loss), float32 scalars: the objective to
    differentiate is the loss plus `z_loss` · log-partition² (arXiv:2204.02311), the loss is for reporting and
    carries no gradient.
    """
    # Inside the function torch says that gradients are wanted even where they are switched off.
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
    objective, loss = _ChunkedCrossEntropy.apply(
        hidden, head_weight, targets, chunk_tokens, multiplier, soft_cap, z_loss, wants_gradient
    )
    return objective, loss
