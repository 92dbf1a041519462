"""The small parts of a decoder: norms, linear maps, the feed-forward network.

Weights are float32 and are cast to their input's dtype where they are used, so the same module runs in
float32 and in bfloat16, and gradients arrive in float32.
"""

from collections.abc import Callable
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

    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)
    """Set on an instance by what multiplies in a precision of its own."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight.to(x.dtype), _cast(self.bias, x.dtype))


class _RmsNorm(torch.autograd.Function):
    """By hand it keeps its input; on a CPU autograd keeps that in float32, and beside it what the weight multiplies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, scale, weight)
        normed = wide * scale
        return (normed if weight is None else normed.mul_(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        normed, gradient = x * scale, gradient.to(scale.dtype)
        grad_weight = None
        if weight is not None:
            grad_weight = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
            gradient = gradient * weight
        along = (gradient * normed).mean(-1, keepdim=True)
        return gradient.sub(normed.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None


class RmsNorm(nn.Module):
    """Root-mean-square normalisation over the last dim (arXiv:1910.07467)."""

    def __init__(self, size: int, spec: NormSpec) -> None:
        super().__init__()
        self.epsilon = spec.epsilon
        self.weight = nn.Parameter(torch.empty(size)) if spec.weighted else None

    def forward(self, x: Tensor) -> Tensor:
        weight = _cast(self.weight, x.dtype)
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return _RmsNorm.apply(x, weight, self.epsilon)
        return F.rms_norm(x, x.shape[-1:], weight, self.epsilon)


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


class _Swiglu(torch.autograd.Function):
    """silu(gate) · up. By hand it keeps what it is given; autograd keeps silu(gate) too."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


class _Geglu(torch.autograd.Function):
    """gelu(gate) · up. By hand it keeps what it is given; autograd keeps gelu(gate) too."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gelu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.gelu_backward(gradient * up, gate, approximate="tanh")
        return grad_gate, gelu(gate).mul_(gradient)


class _ClampedSwiglu(torch.autograd.Function):
    """By hand it keeps what it is given; autograd keeps four more tensors as large."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        clamped = gate.clamp(max=7.0)
        sigmoid = torch.sigmoid(1.702 * clamped)
        # (c · σ(1.702 c))' = σ · (1 + 1.702 c · (1 - σ)); what was cut off has no gradient.
        slope = sigmoid * (1 + 1.702 * clamped * (1 - sigmoid))
        grad_gate = gradient * (up.clamp(-7.0, 7.0) + 1) * slope * (gate <= 7.0)
        return grad_gate, gradient * (clamped * sigmoid) * (up.abs() <= 7.0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _Swiglu.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return _Geglu.apply(gate, up)


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss's: extreme values are cut off, and the linear part is around 1."""
    return _ClampedSwiglu.apply(gate, up)


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
