"""The small parts of a decoder: norms, linear maps, the feed-forward network.

Weights are float32 and are cast to their input's dtype where they are used, so the same module runs in
float32 and in bfloat16, and gradients arrive in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colossus.spec.model import Activation, LayerNormSpec, NormSpec


class Embedding(nn.Module):
    """Rows of a table, looked up."""

    def __init__(self, num_rows: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size))

    def forward(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.weight)


class Linear(nn.Module):
    """`x · weightᵀ + bias`, weight (outputs, inputs)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), _cast(self.bias, x.dtype))


class RmsNorm(nn.Module):
    """Root-mean-square normalisation over the last dim (arXiv:1910.07467)."""

    def __init__(self, size: int, spec: NormSpec) -> None:
        super().__init__()
        self.epsilon = spec.epsilon
        self.weight = nn.Parameter(torch.empty(size)) if spec.weighted else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], _cast(self.weight, x.dtype), self.epsilon)


class LayerNorm(nn.Module):
    """Normalisation of the last dim to mean 0 and variance 1 (arXiv:1607.06450)."""

    def __init__(self, size: int, spec: LayerNormSpec) -> None:
        super().__init__()
        self.epsilon = spec.epsilon
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), _cast(self.bias, x.dtype), self.epsilon)


def build_norm(size: int, spec: NormSpec | LayerNormSpec) -> nn.Module:
    return LayerNorm(size, spec) if isinstance(spec, LayerNormSpec) else RmsNorm(size, spec)


def _cast(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if weight is None else weight.to(dtype)


# --- feed-forward ---


class _SquaredRelu(torch.autograd.Function):
    """relu(x)² (arXiv:2109.08668). By hand it keeps one tensor for the backward pass; autograd keeps two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (gradient * positive).mul_(2)


def squared_relu(x: Tensor) -> Tensor:
    return _SquaredRelu.apply(x)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return gelu(gate) * up


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss's: extreme values are cut off, and the linear part is around 1."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


PLAIN = {"gelu": gelu, "squared_relu": squared_relu}
GATED = {"swiglu": swiglu, "geglu": geglu, "clamped_swiglu": clamped_swiglu}


class Mlp(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, hidden_size: int, inner_size: int, activation: Activation, *, bias: bool) -> None:
        super().__init__()
        self.activation = PLAIN[activation]
        self.up = Linear(hidden_size, inner_size, bias=bias)
        self.down = Linear(inner_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GatedMlp(nn.Module):
    """down(activation(gate(x), up(x))) (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, inner_size: int, activation: Activation, *, bias: bool) -> None:
        super().__init__()
        self.activation = GATED[activation]
        self.gate = Linear(hidden_size, inner_size, bias=bias)
        self.up = Linear(hidden_size, inner_size, bias=bias)
        self.down = Linear(inner_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x), self.up(x)))


def build_mlp(hidden_size: int, inner_size: int, activation: Activation, *, bias: bool) -> nn.Module:
    return (GatedMlp if activation in GATED else Mlp)(hidden_size, inner_size, activation, bias=bias)
