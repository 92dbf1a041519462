"""Feed-forward parts on paper: one token goes through one MLP, or is sent to its experts one by one."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from colossus.spec.model import MlpSpec, MoeSpec
from tests.models.reference_norm import gelu, linear, sigmoid


def mlp(spec: MlpSpec | MoeSpec, weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """The MLP of this name: down(activation(up x)), or down(activation(gate x, up x))."""
    up = linear(x, weights, f"{name}.up")
    if spec.activation == "gelu":
        inner = gelu(up)
    elif spec.activation == "squared_relu":
        inner = torch.where(up > 0, up, 0 * up) ** 2
    else:
        gate = linear(x, weights, f"{name}.gate")
        if spec.activation == "swiglu":
            inner = gate * sigmoid(gate) * up
        elif spec.activation == "geglu":
            inner = gelu(gate) * up
        else:
            assert spec.activation == "clamped_swiglu"
            gate = torch.where(gate > 7, torch.full_like(gate, 7), gate)
            up = torch.where(up > 7, torch.full_like(up, 7), up)
            up = torch.where(up < -7, torch.full_like(up, -7), up)
            inner = gate * sigmoid(1.702 * gate) * (up + 1)
    return linear(inner, weights, f"{name}.down")


@dataclass(frozen=True)
class Routed:
    """What a router said of one token: (num_experts,) each, and the experts it chose."""

    logits: Tensor
    scores: Tensor
    chosen: tuple[int, ...]


def mixture(spec: MoeSpec, layer: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Routed]:
    router = spec.router
    logits = linear(x, layer, "mlp.router")
    if router.soft_cap is not None:
        logits = router.soft_cap * (logits / router.soft_cap).tanh()
    scores = sigmoid(logits) if router.scoring == "sigmoid" else logits.exp() / logits.exp().sum()
    chosen = _best(spec, scores.tolist(), layer.get("mlp.balance"))

    total = sum(scores[expert] for expert in chosen) if router.renormalized else 1.0
    made = torch.zeros_like(x)
    for expert in chosen:
        weight = scores[expert] / total * router.weight_multiplier
        of_expert = {
            name: tensor[expert] for name, tensor in layer.items() if name.startswith("mlp.experts.")
        }
        made = made + weight * mlp(spec, of_expert, "mlp.experts", x)
    if spec.shared is not None:
        made = (made + mlp(spec, layer, "mlp.shared", x)) * spec.shared.sum_multiplier
    return made, Routed(logits, scores, chosen)


def _best(spec: MoeSpec, scores: list[float], balance: Tensor | None) -> tuple[int, ...]:
    """The experts with the highest scores, each moved by its balancing bias, of the groups that are allowed."""
    if balance is not None:
        scores = [score + moved for score, moved in zip(scores, balance.tolist(), strict=True)]
    allowed = list(range(spec.num_experts))
    groups = spec.router.groups
    if groups is not None:
        size = spec.num_experts // groups.num_groups
        members = [allowed[start : start + size] for start in range(0, spec.num_experts, size)]
        # A group is as good as its best expert; where a bias balances the load, as its two best together.
        counted = 1 if balance is None else 2
        worth = [sum(sorted((scores[e] for e in group), reverse=True)[:counted]) for group in members]
        ranked = sorted(range(groups.num_groups), key=lambda g: worth[g], reverse=True)
        allowed = [expert for g in ranked[: groups.top_groups] for expert in members[g]]
    return tuple(sorted(allowed, key=lambda expert: scores[expert], reverse=True)[: spec.top_k])
