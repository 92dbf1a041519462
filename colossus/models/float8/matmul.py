"""x · weightᵀ and its gradients in FP8.

All three products are written as left · rightᵀ, both contracted along their last dim, which is how the hardware wants
them in memory:

    y  (tokens, outputs) = x  (tokens, inputs)  · W  (outputs, inputs)ᵀ
    dx (tokens, inputs)  = g  (tokens, outputs) · Wᵀ (inputs, outputs)ᵀ
    dW (outputs, inputs) = gᵀ (outputs, tokens) · xᵀ (inputs, tokens)ᵀ

For the backward pass it keeps x and W as they are given, like a matmul in their own dtype: an input that several maps
share is kept once, and a weight that was gathered for this layer can be let go of.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from colossus.errors import ConfigError
from colossus.models.float8.recipe import E4M3, E5M2, MULTIPLE, WHOLE, Float8Recipe, Splits

Dim = Literal["tokens", "inputs", "outputs"]
Dims = tuple[Dim, Dim]
Scales = tuple[Tensor | None, Tensor | None]

TOKENS_INPUTS: Dims = ("tokens", "inputs")
OUTPUTS_INPUTS: Dims = ("outputs", "inputs")
TOKENS_OUTPUTS: Dims = ("tokens", "outputs")


class Narrow(NamedTuple):
    """`values · inverse` is what it stands for: float8 (…, rows, contracted), float32 (…, rows, 1) or (1, 1)."""

    values: Tensor
    inverse: Tensor

    def wide(self) -> Tensor:
        return self.values.float() * self.inverse


@dataclass(frozen=True)
class Float8Matmul:
    """What a `Linear` multiplies with in place of `F.linear`."""

    rowwise: bool
    gradient_format: torch.dtype
    emulate: bool
    splits: Splits = WHOLE

    @classmethod
    def of(cls, recipe: Float8Recipe, splits: Splits = WHOLE) -> "Float8Matmul":
        format = E5M2 if recipe.gradients == "e5m2" else E4M3
        return cls(recipe.scaling == "rowwise", format, recipe.emulate, splits)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: (…, inputs), bfloat16 or float32; weight: (outputs, inputs), as x. Returns (…, outputs), as x."""
        require_runnable(x, weight)
        made = _Float8Linear.apply(x.flatten(0, -2), weight, self).unflatten(0, x.shape[:-1])
        return made if bias is None else made + bias

    # The three products. `scales`: of the two tensors, where they are known already; else they are found.

    def output(self, x: Tensor, weight: Tensor, scales: Scales = (None, None)) -> Tensor:
        left = self._narrow(x, TOKENS_INPUTS, "inputs", E4M3, scales[0])
        right = self._narrow(weight, OUTPUTS_INPUTS, "inputs", E4M3, scales[1])
        return self._multiply(left, right, x.dtype, fast=True)

    def input_gradient(self, gradient: Tensor, weight: Tensor, scales: Scales = (None, None)) -> Tensor:
        left = self._narrow(gradient, TOKENS_OUTPUTS, "outputs", self.gradient_format, scales[0])
        right = self._narrow(weight, OUTPUTS_INPUTS, "outputs", E4M3, scales[1])
        return self._multiply(left, right, gradient.dtype, fast=False)

    def weight_gradient(self, gradient: Tensor, x: Tensor, scales: Scales = (None, None)) -> Tensor:
        gradient, x = _padded(gradient), _padded(x)
        left = self._narrow(gradient, TOKENS_OUTPUTS, "tokens", self.gradient_format, scales[0])
        right = self._narrow(x, TOKENS_INPUTS, "tokens", E4M3, scales[1])
        return self._multiply(left, right, gradient.dtype, fast=False)

    @property
    def products(self) -> tuple[Callable[..., Tensor], ...]:
        """Output, input gradient and weight gradient, for who makes them apart."""
        return self.output, self.input_gradient, self.weight_gradient

    def scale(self, tensor: Tensor, dims: Dims, along: Dim, format: torch.dtype) -> Tensor:
        """float32 (1, 1), or one for each entry of the dim that is not `along`, (rows, 1)."""
        over = (along,) if self.rowwise else dims
        amax = tensor.abs().amax([dims.index(dim) for dim in over], keepdim=True)
        return scale_for(over_ranks(amax, over, self.splits), format, power_of_two=self.rowwise).view(-1, 1)

    def _narrow(
        self, tensor: Tensor, dims: Dims, along: Dim, format: torch.dtype, scale: Tensor | None
    ) -> Narrow:
        """`along` becomes the last dim."""
        if scale is None:
            scale = self.scale(tensor, dims, along, format)
        return narrow(tensor.t() if dims[0] == along else tensor, scale, format)

    def _multiply(self, left: Narrow, right: Narrow, dtype: torch.dtype, *, fast: bool) -> Tensor:
        """left · rightᵀ in `dtype`. `fast`: partial sums may stay in the matrix units' short accumulators (about 14
        bits on Hopper, arXiv:2412.19437): good enough for outputs, not for gradients."""
        if self.emulate:
            made = left.values.float() @ right.values.float().t()
            return made.mul_(left.inverse).mul_(right.inverse.t()).to(dtype)
        if self.rowwise and not (fast and dtype == torch.bfloat16):
            # The kernel for scaled rows is slow with long accumulators and only writes bfloat16. Powers of two are as
            # exact afterwards.
            one = torch.ones((), dtype=torch.float32, device=left.values.device)
            made = _scaled(left.values, right.values, one, one, dtype, fast)
            return (made * left.inverse * right.inverse.t()).to(dtype)
        return _scaled(left.values, right.values, left.inverse, right.inverse.t(), dtype, fast)


def _scaled(left: Tensor, right: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    return torch._scaled_mm(left, right.t(), scale_a=a, scale_b=b, out_dtype=dtype, use_fast_accum=fast)


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: Float8Matmul) -> Tensor:
        ctx.how = how
        if how.rowwise:  # scales of rows are others along another dim
            ctx.save_for_backward(x, weight)
            return how.output(x, weight)
        scales = (
            how.scale(x, TOKENS_INPUTS, "inputs", E4M3),
            how.scale(weight, OUTPUTS_INPUTS, "inputs", E4M3),
        )
        ctx.save_for_backward(x, weight, *scales)
        return how.output(x, weight, scales)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        how: Float8Matmul = ctx.how
        x, weight, x_scale, weight_scale = (*ctx.saved_tensors, None, None)[:4]
        scale = None if how.rowwise else how.scale(gradient, TOKENS_OUTPUTS, "outputs", how.gradient_format)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = how.input_gradient(gradient, weight, (scale, weight_scale))
        if ctx.needs_input_grad[1]:
            grad_weight = how.weight_gradient(gradient, x, (scale, x_scale))
        return grad_x, grad_weight, None


def _padded(rows: Tensor) -> Tensor:
    """With rows of 0 up to a multiple of 16: where tokens are contracted, they too must be one."""
    missing = -rows.shape[0] % MULTIPLE
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def require_runnable(x: Tensor, weight: Tensor) -> None:
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(
            f"FP8 matmuls take inputs in bfloat16 or float32 and got {str(x.dtype).removeprefix('torch.')}: "
            "run the model in bfloat16."
        )
    odd = [size for size in weight.shape[-2:] if size % MULTIPLE]
    if odd:
        raise ConfigError(
            f"a weight of {' × '.join(map(str, weight.shape))} cannot be multiplied in FP8: {odd[0]} is not a multiple "
            f"of {MULTIPLE}. Leave this map out (`exclude`), or split it over fewer tensor-parallel ranks."
        )


# --- scales and casts ---


def over_ranks(amax: Tensor, over: tuple[Dim, ...], splits: Splits) -> Tensor:
    """Along dims that are split over ranks, the largest of all of them."""
    for dim in over:
        largest = getattr(splits, dim)
        if largest is not None:
            amax = largest(amax)
    return amax


def scale_for(amax: Tensor, format: torch.dtype, *, power_of_two: bool) -> Tensor:
    """Takes `amax` to the format's largest value, or below it by less than half: float32. Not-a-number stays it."""
    # In float64, so that compiled code, whose float32 division is another, finds the same scales. The bound keeps the
    # scale and its inverse finite for tensors of zeros.
    scale = (torch.finfo(format).max / amax.double().clamp(min=2.0**-100)).float()
    if not power_of_two:
        return scale
    without_mantissa = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(scale.isnan(), scale, without_mantissa)


def narrow(tensor: Tensor, scale: Tensor, format: torch.dtype) -> Narrow:
    """Nothing overflows and nothing is clamped: `amax · scale` is the format's largest value up to float32 rounding,
    far from where the cast would round up; an infinity or not-a-number makes its whole row not-a-number."""
    return Narrow((tensor.float() * scale).to(format).contiguous(), scale.reciprocal())
