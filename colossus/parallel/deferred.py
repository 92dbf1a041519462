"""Weight gradients that are made later than input gradients: what zero-bubble schedules fill their bubbles with
(arXiv:2401.10241)."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from colossus.models import Decoder
from colossus.models.grouped import multiply_groups, sum_groups
from colossus.models.moe import Groups, StackedLinear
from colossus.models.parts import Linear


class Deferred:
    """Weight gradients that are still to be made, of one stage: each backward pass puts its own in a row."""

    def __init__(self) -> None:
        self.on = False
        """Whether backward passes put them off."""
        self._waiting: deque[list[Callable[[], None]]] = deque()

    def begin(self) -> None:
        """A backward pass of input gradients begins."""
        self.on = True
        self._waiting.append([])

    def put(self, make: Callable[[], None]) -> None:
        self._waiting[-1].append(make)

    def make_oldest(self) -> None:
        """Makes those of the backward pass that waits longest."""
        for make in self._waiting.popleft():
            make()


def defer_weight_gradients(model: Decoder, deferred: Deferred) -> None:
    """Makes linear maps put off their weights' gradients while `deferred` is on."""
    for module in model.modules():
        if type(module) is Linear and module is not model.head:
            module.forward = partial(_linear, module, deferred)
        elif isinstance(module, StackedLinear):
            module.forward = partial(_stacked, module, deferred)


def _linear(module: Linear, deferred: Deferred, x: Tensor) -> Tensor:
    made = _Deferring.apply(x, module.weight, deferred, _times, _gradient_of_linear, ())
    return made if module.bias is None else made + module.bias.to(x.dtype)


def _stacked(module: StackedLinear, deferred: Deferred, x: Tensor, groups: Groups) -> Tensor:
    made = _Deferring.apply(x, module.weight, deferred, multiply_groups, _gradient_of_stack, (groups.ends,))
    return made if module.bias is None else made + module.bias.to(x.dtype)[groups.experts]


def _times(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def _gradient_of_linear(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient.flatten(0, -2).t() @ x.flatten(0, -2)


def _gradient_of_stack(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return sum_groups(gradient, x, ends)


class _Deferring(torch.autograd.Function):
    """`multiply(x, weight, *more)`, whose weight's gradient is made at once or put off."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        deferred: Deferred,
        multiply: Callable[..., Tensor],
        weight_gradient: Callable[..., Tensor],
        more: tuple[Tensor, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, *more)
        # Not saved: sharded data parallelism gives the parameter its data back in place.
        ctx.weight, ctx.deferred, ctx.weight_gradient, ctx.multiply = (
            weight,
            deferred,
            weight_gradient,
            multiply,
        )
        return multiply(x, weight.to(x.dtype), *more)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *more = ctx.saved_tensors
        weight = ctx.weight
        grad_x = ctx.multiply(gradient, weight.to(gradient.dtype).transpose(-1, -2), *more)

        def make() -> Tensor:
            return ctx.weight_gradient(gradient, x, *more).to(weight.dtype)

        def add() -> None:
            made = make()
            weight.grad = made if weight.grad is None else weight.grad.add_(made)

        if ctx.deferred.on:
            ctx.deferred.put(add)
            return grad_x, None, None, None, None, None
        return grad_x, make(), None, None, None, None
