"""Muon: momentum whose update is replaced by the nearest orthogonal matrix, for the matrices of a network."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from colossus.optim.rounding import round_stochastically

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


class Piece(NamedTuple):
    """Matrices of one parameter, from `first` up to `end`: all of a matrix that is alone, some of a stack of them.

    Of each, the parameter may hold a part; `shape` is the whole's.
    """

    parameter: Tensor
    first: int
    end: int
    shape: tuple[int, int]

    def of(self, tensor: Tensor) -> Tensor:
        """(count, rows, columns): what belongs to these matrices of a tensor of the parameter's shape; a view."""
        return (tensor if tensor.dim() == 3 else tensor[None])[self.first : self.end]


Orthogonalise = Callable[[Tensor], Tensor]
"""From whole matrices (count, rows, columns) to their directions."""


class Round(Protocol):
    """Some of a step's matrices, those that are orthogonalised together."""

    @property
    def pieces(self) -> Sequence[Piece]: ...

    def directions(self, updates: Iterator[Tensor], orthogonalise: Orthogonalise) -> Sequence[Tensor]:
        """Of each piece, from its update; both are (count, rows, columns) of what is here."""
        ...


Rounds = Callable[[Sequence[Tensor]], Iterable[Round]]
"""Deals matrices out over rounds, and over ranks where each holds a part of them."""


class _OfOneShape(NamedTuple):
    pieces: list[Piece]

    def directions(self, updates: Iterator[Tensor], orthogonalise: Orthogonalise) -> Sequence[Tensor]:
        counts = [piece.end - piece.first for piece in self.pieces]
        return orthogonalise(torch.cat(list(updates))).split(counts)


def by_shape(parameters: Sequence[Tensor]) -> Iterable[Round]:
    """Whole matrices on one process: a round for each shape. On small models the calls, and not the arithmetic, are
    what costs."""
    rounds: dict[torch.Size, _OfOneShape] = {}
    for parameter in parameters:
        count = parameter.shape[0] if parameter.dim() == 3 else 1
        piece = Piece(parameter, 0, count, tuple(parameter.shape[-2:]))
        rounds.setdefault(parameter.shape, _OfOneShape([])).pieces.append(piece)
    return rounds.values()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for matrices, and for stacks of them: one for each expert.

    The update of a (rows, columns) matrix is scaled by √max(1, rows/columns), so that its effect on outputs does not
    depend on its shape. `rounds` says which matrices are orthogonalised together, and where. `state_dtype` is what
    momentum is kept in, float32 or bfloat16.
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
        state_dtype: torch.dtype | None = None,
        rounds: Rounds = by_shape,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.coefficients = tuple(coefficients)
        self.dtype, self.state_dtype = dtype, state_dtype
        self._rounds = rounds
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    raise ValueError(
                        f"Muon is for matrices and stacks of matrices; got shape {tuple(parameter.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                self._begin(parameter)
            for one in self._rounds(parameters):
                # Made as they are asked for: no more of them live at once than the round needs.
                updates = (self._update(piece, group["momentum"]) for piece in one.pieces)
                directions = one.directions(updates, self._orthogonalise)
                for piece, direction in zip(one.pieces, directions, strict=True):
                    rows, columns = piece.shape
                    weights = piece.of(piece.parameter)
                    weights.mul_(1 - group["lr"] * group["weight_decay"])
                    weights.add_(direction, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _begin(self, parameter: Tensor) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter, dtype=self.state_dtype)
        if state["momentum"].dtype == torch.bfloat16:
            state["step"] = state.get("step", torch.zeros((), device=parameter.device)) + 1

    def _update(self, piece: Piece, momentum: float) -> Tensor:
        """Moves the momentum; what is to be orthogonalised, in the dtype in which it will be."""
        state = self.state[piece.parameter]
        gradient, average = piece.of(piece.parameter.grad), piece.of(state["momentum"])
        if average.dtype == torch.bfloat16:
            kept, average = average, average.float().lerp_(gradient, 1 - momentum)
            kept.copy_(round_stochastically(average, state["step"]))
        else:
            average.lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum).to(self.dtype)

    def _orthogonalise(self, matrices: Tensor) -> Tensor:
        return orthogonalise(matrices, self.coefficients, self.dtype)
