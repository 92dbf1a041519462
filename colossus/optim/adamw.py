"""AdamW whose averages are kept in a narrower dtype than its weights: torch's keeps them in the weights' own."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from colossus.optim.rounding import round_stochastically


class NarrowAdamW(torch.optim.Optimizer):
    """torch's AdamW with both averages in bfloat16: 4 bytes of state per weight in place of 8.

    Arithmetic is float32's; only what is kept between steps is rounded, stochastically: with β₂ = 0.999 the average of
    squares shrinks by at most 0.1% a step, which rounding to the nearest would undo each time, so that a weight's
    largest gradient would slow it for good. State has the names that torch's has.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        # A tensor on the parameter's device: no step waits for it.
        step = state["step"].add_(1)
        average = state["exp_avg"].float().lerp_(parameter.grad, 1 - beta1)
        squares = state["exp_avg_sq"].float().mul_(beta2)
        squares.addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        state["exp_avg"].copy_(round_stochastically(average, step))
        state["exp_avg_sq"].copy_(round_stochastically(squares, step))
        spread = squares.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.addcdiv_(average.div_(1 - beta1**step), spread, value=-lr)
