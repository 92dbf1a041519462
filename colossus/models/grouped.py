"""Rows of several experts, each multiplied with its expert's matrix, in one call.

On a GPU that is torch's grouped matmul. That one wants bfloat16 and aligned rows, also of tensors without data; so all
else goes through a loop over the experts, as an operator of its own: it runs anywhere, in any dtype, compiles without a
break, and torch's counter of FLOPs knows it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def multiply_groups(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x: (rows, inputs), the rows of each expert together; weight: (num_experts, outputs, inputs); ends: int32
    (num_experts,), where the rows of each expert end. Returns (rows, outputs)."""
    if x.device.type == "cuda" and x.dtype == torch.bfloat16 and _aligned(weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return _multiply(x, weight, ends)


def sum_groups(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The weight's gradient: each expert's gradientᵀ · x, (num_experts, outputs, inputs)."""
    if x.device.type == "cuda" and x.dtype == torch.bfloat16:
        return F.grouped_mm(gradient.t(), x, offs=ends)
    return _sum(gradient, x, ends)


def _aligned(weight: Tensor) -> bool:
    """Whether all rows start at multiples of 16 bytes."""
    return all(size * weight.dtype.itemsize % 16 == 0 for size in weight.shape[1:])


@torch.library.custom_op("colossus::multiply_groups", mutates_args=())
def _multiply(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    made = x.new_empty(x.shape[0], weight.shape[1])
    for expert, start, end in _spans(ends):
        if _has_kernel_for_each_shape(x):
            made[start:end] = torch.mm(_padded(x[start:end]), weight[expert].t())[: end - start]
        else:
            torch.mm(x[start:end], weight[expert].t(), out=made[start:end])
    return made


@torch.library.custom_op("colossus::sum_groups", mutates_args=())
def _sum(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Each expert's gradientᵀ · x: (num_experts, outputs, inputs)."""
    made = x.new_zeros(len(ends), gradient.shape[1], x.shape[1])
    for expert, start, end in _spans(ends):
        left, right = gradient[start:end], x[start:end]
        if _has_kernel_for_each_shape(x):
            left, right = _padded(left), _padded(right)
        torch.mm(left.t(), right, out=made[expert])
    return made


_ROWS = 64


def _has_kernel_for_each_shape(x: Tensor) -> bool:
    """bfloat16 on a CPU: its library makes a kernel for each shape that it meets and keeps a thousand of them, 0.5 MB
    each; and the rows of an expert are others in every step."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _padded(rows: Tensor) -> Tensor:
    """With rows of 0 up to a multiple of `_ROWS`: few shapes, and the same sums."""
    padded = rows.new_zeros(-(-rows.shape[0] // _ROWS) * _ROWS, rows.shape[1])
    padded[: rows.shape[0]] = rows
    return padded


def _spans(ends: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, one after the last) of experts that have rows."""
    borders = [0, *ends.tolist()]
    return [(i, borders[i], borders[i + 1]) for i in range(len(ends)) if borders[i] < borders[i + 1]]


@_multiply.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_sum.register_fake
def _(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], gradient.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    return _multiply(gradient, weight.transpose(1, 2), ends), _sum(gradient, x, ends), None


_multiply.register_autograd(_backward, setup_context=_keep)


@register_flop_formula([torch.ops.colossus.multiply_groups, torch.ops.colossus.sum_groups])
def _flops(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Two for each product: (rows, inputs) by (…, outputs, inputs), or (rows, outputs) by (rows, inputs)."""
    return 2 * a[0] * (b[1] * b[2] if len(b) == 3 else a[1] * b[1])
