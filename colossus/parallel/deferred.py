"""Weight gradients that are made later than input gradients: what zero-bubble schedules fill their bubbles with
(arXiv:2401.10241)."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colossus.models import Decoder
from colossus.models.float8.grouped import Float8Groups
from colossus.models.float8.matmul import Float8Matmul
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

    @torch.no_grad()
    def make_oldest(self) -> None:
        """Makes those of the backward pass that waits longest, and lets go of what each was made from."""
        waiting = deque(self._waiting.popleft())
        while waiting:
            waiting.popleft()()


def defer_weight_gradients(model: Decoder, deferred: Deferred) -> None:
    """Makes linear maps put off their weights' gradients while `deferred` is on."""
    for module in model.modules():
        if type(module) is Linear and module is not model.head:
            module.forward = partial(_linear, module, deferred)
        elif isinstance(module, StackedLinear):
            module.forward = partial(_stacked, module, deferred)


def _linear(module: Linear, deferred: Deferred, x: Tensor) -> Tensor:
    how = module.multiply
    products = (
        how.products if isinstance(how, Float8Matmul) else (F.linear, _input_gradient, _weight_gradient)
    )
    flat = _Deferring.apply(x.flatten(0, -2), module.weight, deferred, products, ())
    made = flat.unflatten(0, x.shape[:-1])
    return made if module.bias is None else made + module.bias.to(x.dtype)


def _stacked(module: StackedLinear, deferred: Deferred, x: Tensor, groups: Groups) -> Tensor:
    how = module.multiply
    products = (
        how.products if isinstance(how, Float8Groups) else (multiply_groups, _groups_gradient, sum_groups)
    )
    made = _Deferring.apply(x, module.weight, deferred, products, (groups.ends,))
    return made if module.bias is None else made + module.bias.to(x.dtype)[groups.experts]


def _input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient @ weight


def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient.t() @ x


def _groups_gradient(gradient: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return multiply_groups(gradient, weight.transpose(1, 2), ends)


class _Deferring(torch.autograd.Function):
    """`output(x, weight, *more)`, whose weight's gradient is made at once or put off.

    products: output, input_gradient(gradient, weight, *more), weight_gradient(gradient, x, *more)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        deferred: Deferred,
        products: tuple[Callable[..., Tensor], ...],
        more: tuple[Tensor, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, *more)
        # Not saved: sharded data parallelism gives the parameter its data back in place.
        ctx.weight, ctx.deferred = weight, deferred
        output, ctx.input_gradient, ctx.weight_gradient = products
        return output(x, weight.to(x.dtype), *more)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *more = ctx.saved_tensors
        weight = ctx.weight
        grad_x = ctx.input_gradient(gradient, weight.to(gradient.dtype), *more)

        def make() -> Tensor:
            return ctx.weight_gradient(gradient, x, *more).to(weight.dtype)

        def add() -> None:
            made = make()
            weight.grad = made if weight.grad is None else weight.grad.add_(made)

        if ctx.deferred.on:
            ctx.deferred.put(add)
            return grad_x, None, None, None, None
        return grad_x, make(), None, None, None
