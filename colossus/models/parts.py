"""The small parts of a decoder: norm, rotary positions, linear maps, the feed-forward network.

Weights are float32 and are cast to their input's dtype where they are used, so the same module runs in
float32 and in bfloat16, and gradients arrive in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colossus.spec.model import MlpSpec, NormSpec, RopeSpec


class Linear(nn.Module):
    """`x · weightᵀ`, weight (outputs, inputs), no bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RmsNorm(nn.Module):
    """Root-mean-square normalisation over the last dim (arXiv:1910.07467)."""

    def __init__(self, size: int, spec: NormSpec) -> None:
        super().__init__()
        self.epsilon = spec.epsilon
        self.weight = nn.Parameter(torch.empty(size)) if spec.weighted else None

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], weight, self.epsilon)


class Rope(nn.Module):
    """Rotary positions (arXiv:2104.09864): channels i, i + size/2 turn by position · base^(-2i/size)."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, spec: RopeSpec, head_dim: int, context_tokens: int) -> None:
        super().__init__()
        self.spec, self.head_dim, self.context_tokens = spec, head_dim, context_tokens
        self.register_buffer("cosines", torch.empty(context_tokens, head_dim), persistent=False)
        self.register_buffer("sines", torch.empty(context_tokens, head_dim), persistent=False)

    def reset_buffers(self) -> None:
        """Fills the tables; to be called once the module is on a real device."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        positions = torch.arange(self.context_tokens, dtype=torch.float64)
        angles = torch.outer(positions, self.spec.base**-exponents)
        self.cosines.copy_(torch.cat([angles.cos(), angles.cos()], -1))
        self.sines.copy_(torch.cat([-angles.sin(), angles.sin()], -1))

    def forward(self, x: Tensor, first_position: int) -> Tensor:
        """x: (batch, tokens, heads, head_dim)."""
        here = slice(first_position, first_position + x.shape[1])
        cosines, sines = self.cosines[here, None].to(x.dtype), self.sines[here, None].to(x.dtype)
        first, second = x.chunk(2, -1)
        return x * cosines + torch.cat([second, first], -1) * sines


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


ACTIVATIONS = {"swiglu": F.silu, "geglu": gelu, "gelu": gelu, "squared_relu": squared_relu}


class Mlp(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, hidden_size: int, spec: MlpSpec) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.up = Linear(hidden_size, spec.intermediate_size)
        self.down = Linear(spec.intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GatedMlp(nn.Module):
    """down(activation(gate(x)) · up(x)) (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, spec: MlpSpec) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.gate = Linear(hidden_size, spec.intermediate_size)
        self.up = Linear(hidden_size, spec.intermediate_size)
        self.down = Linear(spec.intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))
