"""Muon: momentum whose update is replaced by the nearest orthogonal matrix, for the matrices of a network."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)
"""The one polynomial of the original Newton-Schulz iteration (kellerjordan.github.io/posts/muon)."""

_BEST: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
"""A polynomial for each step, each the best for what those before leave (Polar Express, arXiv:2505.16932)."""

_LIMIT: Coefficients = (1.875, -1.25, 0.375)
"""What they tend to: Newton-Schulz of fifth order."""

_SAFETY = 1.01
"""Singular values are taken for so much smaller than they are: each polynomial rises steeply just outside the
range that it is made for, and rounding to bfloat16 gets there: without this, values of 10,000 come about."""


def polynomials(num_steps: int) -> tuple[Coefficients, ...]:
    """The polynomials of `num_steps` steps of Polar Express."""
    safe = tuple((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _BEST)
    return safe[:num_steps] + (_LIMIT,) * (num_steps - len(safe))


POLAR_EXPRESS = polynomials(5)


def orthogonalise(matrices: Tensor, coefficients: Sequence[Coefficients], dtype: torch.dtype) -> Tensor:
    """The orthogonal factor of each matrix, about: all singular values move to near 1.

    matrices: (count, rows, columns), any rows and columns; the iteration multiplies on the smaller side. Runs
    in `dtype` and returns it.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in coefficients:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for matrices, and for stacks of them: one for each expert.

    The update of a (rows, columns) matrix is scaled by √max(1, rows/columns), so that its effect on outputs
    does not depend on its shape. Matrices of one shape are orthogonalised together in one batched matmul: on
    small models the calls, and not the arithmetic, are what costs.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        coefficients: Sequence[Coefficients] = POLAR_EXPRESS,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.coefficients = tuple(coefficients)
        self.dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    raise ValueError(
                        f"Muon is for matrices and stacks of matrices; got shape {tuple(parameter.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack(
                    [self._momentum(parameter, group["momentum"]) for parameter in parameters]
                )
                matrices = updates.view(-1, *shape[-2:])
                directions = orthogonalise(matrices, self.coefficients, self.dtype).view(updates.shape)
                step_size = group["lr"] * max(1.0, shape[-2] / shape[-1]) ** 0.5
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-step_size)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)
