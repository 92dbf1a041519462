"""Experts' matmuls in FP8: rows of several experts, each with its expert's matrix.

One recipe, whatever the rest of the model has, as there is one kernel (Hopper's): scales of rows, e4m3 throughout. The
weights' gradients stay in the inputs' dtype: their sums run over the tokens of an expert, which in FP8 would have to be
padded to multiples of 16, expert by expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colossus.models.float8.matmul import Dim, Narrow, narrow, over_ranks, require_runnable, scale_for
from colossus.models.float8.recipe import E4M3, WHOLE, Splits
from colossus.models.grouped import multiply_groups, sum_groups


@dataclass(frozen=True)
class Float8Groups:
    """What a `StackedLinear` multiplies with in place of `multiply_groups`."""

    emulate: bool
    splits: Splits = WHOLE

    def __call__(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        require_runnable(x, weight)
        return _Float8Groups.apply(x, weight, ends, self)

    def output(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return self.multiply(self.narrow(x, "inputs"), self.narrow(weight, "inputs"), ends, x.dtype)

    def input_gradient(self, gradient: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        turned = self.narrow(weight.transpose(1, 2), "outputs")
        return self.multiply(self.narrow(gradient, "outputs"), turned, ends, gradient.dtype)

    def weight_gradient(self, gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        return sum_groups(gradient, x, ends)

    @property
    def products(self) -> tuple[Callable[..., Tensor], ...]:
        """Output, input gradient and weight gradient, for who makes them apart."""
        return self.output, self.input_gradient, self.weight_gradient

    def narrow(self, tensor: Tensor, along: Dim) -> Narrow:
        """tensor: (…, rows, contracted along `along`)."""
        amax = over_ranks(tensor.abs().amax(-1, keepdim=True), (along,), self.splits)
        return narrow(tensor, scale_for(amax, E4M3, power_of_two=True), E4M3)

    def multiply(self, left: Narrow, right: Narrow, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """left: (rows, contracted), right: (num_experts, made, contracted). Returns (rows, made) in `dtype`."""
        if self.emulate:
            return multiply_groups(left.wide(), right.wide(), ends).to(
                dtype
            )  # exact: scales are powers of two
        scales = left.inverse.squeeze(-1), right.inverse.squeeze(-1)
        return torch._scaled_grouped_mm(
            left.values,
            right.values.transpose(1, 2),
            *scales,
            offs=ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ).to(dtype)


class _Float8Groups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, how: Float8Groups) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(x, weight, ends)
        return how.output(x, weight, ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, ends = ctx.saved_tensors
        how: Float8Groups = ctx.how
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = how.input_gradient(gradient, weight, ends)
        if ctx.needs_input_grad[1]:
            grad_weight = how.weight_gradient(gradient, x, ends)
        return grad_x, grad_weight, None, None
