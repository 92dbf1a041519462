"""Mixtures of experts: each token goes through a few of many MLPs, chosen by a router. No token is ever dropped."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colossus.models.grouped import multiply_groups
from colossus.models.parts import GATED, PLAIN, Linear, build_mlp
from colossus.spec.model import MoeSpec, RouterGroups


@dataclass(frozen=True, slots=True)
class RouterLosses:
    """Weights of two losses that keep routers healthy, float32 scalars. Their gradients join those of the hidden
    states that a mixture returns, whatever the objective is; so each weight is divided by the tokens of the step.

    `balance`: of the load-balance loss, 1 per token when all experts are chosen alike (arXiv:2101.03961). It is
    taken over each sequence (as in arXiv:2412.19437): a sum over sequences is the same for any split of the batch.
    `z`: of the router logits' squared log-partition, summed over tokens (arXiv:2202.08906).
    """

    balance: Tensor
    z: Tensor


class Router(Linear):
    """Scores of all experts for each token, in float32: small differences decide where a token goes."""

    def __init__(self, hidden_size: int, spec: MoeSpec) -> None:
        super().__init__(hidden_size, spec.num_experts, bias=spec.router.bias)
        self.soft_cap, self.scoring = spec.router.soft_cap, spec.router.scoring

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (tokens, hidden_size). Returns logits and scores, float32 (tokens, num_experts)."""
        logits = super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits, logits.sigmoid() if self.scoring == "sigmoid" else logits.softmax(-1)


class MixtureOfExperts(nn.Module):
    """Router, experts and what all tokens pass beside them."""

    load: Tensor
    """How many tokens each expert was given in backward passes: float32 (num_experts,), since last set to 0."""

    def __init__(self, hidden_size: int, spec: MoeSpec) -> None:
        super().__init__()
        self.spec = spec
        balance = nn.Parameter(torch.empty(spec.num_experts), requires_grad=False)
        self.balance = balance if spec.router.balancing_bias else None
        self.router = Router(hidden_size, spec)
        self.experts = Experts(hidden_size, spec)
        self.shared = None
        if spec.shared is not None:
            inner = spec.shared.intermediate_size
            self.shared = build_mlp(hidden_size, inner, spec.activation, bias=spec.bias)
        self.register_buffer("load", torch.empty(spec.num_experts), persistent=False)
        self._count_as_gradient()
        self.whole_sequences = ALL_HERE

    def reset_buffers(self) -> None:
        self.load.zero_()
        self._count_as_gradient()

    def _apply(self, *arguments: Any, **named: Any) -> "MixtureOfExperts":
        super()._apply(*arguments, **named)
        self._count_as_gradient()  # the load is another tensor now
        return self

    def _count_as_gradient(self) -> None:
        """The load is the gradient of a tensor that nothing depends on: so it is counted once for each backward pass,
        however often the forward pass is made for it, and also where torch's compiler has taken passes apart."""
        self._counting = torch.empty_like(self.load).requires_grad_()
        self._counting.grad = self.load

    def forward(self, x: Tensor, losses: RouterLosses | None = None) -> Tensor:
        """x: (rows, tokens, hidden_size)."""
        tokens = x.flatten(0, 1)
        logits, scores = self.router(tokens)
        chosen, weights = choose(scores, self.balance, self.spec)
        if torch.is_grad_enabled():
            counts = tokens_of_experts(chosen, self.spec.num_experts)
            weights = _WithGradient.apply(weights, self._counting, counts.to(self.load.dtype))
        mixed = self.experts(tokens, chosen, weights.to(x.dtype)).view_as(x)
        if self.shared is not None:
            mixed = mixed + self.shared(x)
            if self.spec.shared.sum_multiplier != 1:
                mixed = mixed * self.spec.shared.sum_multiplier
        if torch.is_grad_enabled() and losses is not None:
            loss = losses.z * logits.logsumexp(-1).square().sum()
            per_sequence = (*x.shape[:2], -1)
            loss = loss + losses.balance * balance_loss(
                scores.view(per_sequence), chosen.view(per_sequence), self.whole_sequences
            )
            mixed = _WithGradient.apply(mixed, loss, torch.ones_like(loss))
        return mixed


def choose(scores: Tensor, balance: Tensor | None, spec: MoeSpec) -> tuple[Tensor, Tensor]:
    """Each token's experts, the likeliest first, and their weights: int64 and float32 (tokens, top_k).

    scores: (tokens, num_experts). `balance` moves the choice and not the weights.
    """
    preferred = scores.detach()  # the choice has no gradient
    if balance is not None:
        preferred = preferred + balance
    if spec.router.groups is not None:
        preferred = _within_groups(preferred, spec.router.groups, 1 if balance is None else 2)
    chosen = preferred.topk(spec.top_k, -1).indices
    weights = scores.gather(1, chosen)
    if spec.router.renormalized:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * spec.router.weight_multiplier


def tokens_of_experts(chosen: Tensor, num_experts: int) -> Tensor:
    """How many tokens were given to each expert: int64 (num_experts,). Not `bincount`, which meta tensors lack and for
    which a GPU waits."""
    given = chosen.flatten()
    return given.new_zeros(num_experts).scatter_add_(0, given, torch.ones_like(given))


def _within_groups(preferred: Tensor, groups: RouterGroups, num_best: int) -> Tensor:
    """Only experts of the best groups can be chosen; a group is as good as its best experts' sum."""
    grouped = preferred.unflatten(-1, (groups.num_groups, -1))
    of_groups = grouped.topk(min(num_best, grouped.shape[-1]), -1).values.sum(-1)
    best = of_groups.topk(groups.top_groups, -1).indices
    left = torch.ones_like(of_groups, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(left[..., None], -torch.inf).flatten(-2)


def _all_here(sums: Tensor) -> Tensor:
    return sums


@dataclass(frozen=True, slots=True)
class WholeSequences:
    """From what is summed over the tokens of each sequence that are here to the sum over all of its tokens.

    `total` adds what stands elsewhere, of which there are `num_parts` in all.
    """

    num_parts: int = 1
    total: Callable[[Tensor], Tensor] = _all_here


ALL_HERE = WholeSequences()


def balance_loss(scores: Tensor, chosen: Tensor, whole: WholeSequences = ALL_HERE) -> Tensor:
    """Summed over sequences, times their tokens: num_experts · Σ share of choices · mean share of scores.

    scores: (rows, tokens, num_experts), chosen: (rows, tokens, top_k). The smallest is about the number of tokens.
    """
    num_tokens, num_experts = scores.shape[1] * whole.num_parts, scores.shape[2]
    shares = whole.total((scores / scores.sum(-1, keepdim=True)).sum(1)) / num_tokens
    choices = chosen.flatten(1)
    ones = torch.ones_like(choices, dtype=shares.dtype)
    counts = whole.total(torch.zeros_like(shares).scatter_add_(1, choices, ones))
    return (counts * shares).sum() * num_experts / chosen.shape[2]


class _WithGradient(torch.autograd.Function):
    """x as it is; in the backward pass `other` has gradient `its`, whatever x's is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor, its: Tensor) -> Tensor:
        ctx.save_for_backward(its)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (its,) = ctx.saved_tensors
        return gradient, its, None


# --- experts ---


class StackedLinear(nn.Module):
    """One linear map for each expert: weight (num_experts, outputs, inputs)."""

    multiply: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(multiply_groups)
    """Set on an instance by what multiplies in a precision of its own."""

    def __init__(self, num_experts: int, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(num_experts, outputs)) if bias else None

    def forward(self, x: Tensor, groups: "Groups") -> Tensor:
        """x: (rows, inputs), the rows of each expert together."""
        made = self.multiply(x, self.weight.to(x.dtype), groups.ends)
        return made if self.bias is None else made + self.bias.to(x.dtype)[groups.experts]


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows sorted by expert: each row's expert, int64 (rows,), and where the rows of each end, int32 (num_experts,)."""

    experts: Tensor
    ends: Tensor


class _Unsorted(torch.autograd.Function):
    """Row i to place `order[i]`. By hand it keeps the order alone; autograd keeps the rows too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return torch.empty_like(rows).index_copy_(0, order, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return gradient.index_select(0, order), None


def unsorted(rows: Tensor, order: Tensor) -> Tensor:
    """Undoes `rows[order]`."""
    return _Unsorted.apply(rows, order)


class Experts(nn.Module):
    """All experts' MLPs, stacked."""

    def __init__(self, hidden_size: int, spec: MoeSpec) -> None:
        super().__init__()
        num, inner = spec.num_experts, spec.intermediate_size
        self.gate = StackedLinear(num, hidden_size, inner, bias=spec.bias) if spec.gated else None
        self.up = StackedLinear(num, hidden_size, inner, bias=spec.bias)
        self.down = StackedLinear(num, inner, hidden_size, bias=spec.bias)
        self.activation = (GATED if spec.gated else PLAIN)[spec.activation]

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x: (tokens, hidden_size); chosen, weights: (tokens, top_k). Returns the weighted sums, as x."""
        experts, order = chosen.flatten().sort(stable=True)
        ends = tokens_of_experts(chosen, self.up.weight.shape[0]).cumsum(0).int()
        made = self.each(x[order // chosen.shape[1]], Groups(experts, ends))
        # Back in the tokens' order, and summed in the order of choice: the same sum on every machine.
        back = unsorted(made, order).view(*chosen.shape, -1)
        return (back * weights[..., None]).sum(1)

    def each(self, rows: Tensor, groups: Groups) -> Tensor:
        """Every row through its expert: (rows, hidden_size)."""
        up = self.up(rows, groups)
        inner = self.activation(up) if self.gate is None else self.activation(self.gate(rows, groups), up)
        return self.down(inner, groups)
