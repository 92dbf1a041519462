"""Balancing without a loss: a bias per expert, moved by the expert's load (arXiv:2408.15664)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Balancing(torch.optim.Optimizer):
    """Each step raises the bias of experts that were given fewer tokens than the mean by `lr`, and lowers the others'.

    It looks at loads in place of gradients: `loads` has those of each parameter's experts since they were last set to
    0, in the parameter's shape.
    """

    def __init__(self, loads: Mapping[nn.Parameter, Tensor], *, lr: float) -> None:
        super().__init__(list(loads), {"lr": lr})
        self.loads = loads

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                load = self.loads[parameter]
                parameter.add_((load.mean() - load).sign(), alpha=group["lr"])
