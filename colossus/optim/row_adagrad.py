"""Adagrad with one learning rate per row, for tables of which a step touches few rows."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class RowAdagrad(torch.optim.Optimizer):
    """`row -= lr · gradient / √(sum over steps of the mean square of the row's gradient)`.

    Takes sparse gradients and touches only their rows, so a step costs what the batch names and not what the
    table holds; the state is one number per row. Dense gradients are taken as well.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, epsilon: float = 1e-10) -> None:
        super().__init__(params, {"lr": lr, "epsilon": epsilon})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                rows, gradient = rows_and_values(parameter.grad)
                state = self.state[parameter]
                if not state:
                    state["square_sum"] = parameter.new_zeros(parameter.shape[0])
                square_sum = state["square_sum"]
                square_sum.index_add_(0, rows, gradient.square().mean(1))
                scale = (square_sum[rows].sqrt() + group["epsilon"]).reciprocal_()
                parameter.index_add_(0, rows, gradient * scale[:, None], alpha=-group["lr"])


def rows_and_values(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that a 2-dim gradient touches, each once, and their values: (rows,), (rows, columns)."""
    if not gradient.is_sparse:
        return torch.arange(gradient.shape[0], device=gradient.device), gradient
    gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()
