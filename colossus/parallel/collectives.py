"""What ranks exchange within a forward and backward pass: operators with a gradient, which compile without a break.

Each is an operator of its own and not a chain of torch's functional collectives: those return tensors that are still on
their way, and a compiled region that is given one directly drops its gradient in silence (torch 2.13).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from colossus.spec.layout import Group

# Named otherwise from torch 2.13 on.
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, slots=True)
class Team:
    """The ranks that this one works with in `group`, in the order of their places; this one is number `place`."""

    group: Group
    place: int
    ranks: tuple[int, ...]
    process_group: dist.ProcessGroup

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def name(self) -> str:
        """What operators know the process group by."""
        return str(self.process_group.group_name)


def all_gather(x: Tensor, dim: int, team: Team | None) -> Tensor:
    """Every rank's `x`, side by side along `dim`. The gradient is summed over ranks and scattered back."""
    return x if team is None else _all_gather(x, dim, team.size, team.name)


def reduce_scatter(x: Tensor, dim: int, team: Team | None) -> Tensor:
    """This rank's part along `dim` of the sum over ranks. The gradient is gathered."""
    return x if team is None else _reduce_scatter(x, dim, team.size, team.name)


def total(x: Tensor, team: Team | None) -> Tensor:
    """The sum over ranks, for something that all of them compute alike from it and that counts once: the gradient is
    that of the sum."""
    return x if team is None else _total(x, team.name)


def team_total(x: Tensor, team: Team | None) -> Tensor:
    """The sum over ranks, of which each makes something else: the gradient is summed over ranks too."""
    return x if team is None else _team_total(x, team.name)


def all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], team: Team) -> Tensor:
    """The first `sent[0]` rows go to the first rank of the team, and so on; `received` rows come from each."""
    return _all_to_all(x, list(sent), list(received), team.name)


def own_part(x: Tensor, dim: int, team: Team | None) -> Tensor:
    """This rank's part along `dim` of something that all ranks have: no exchange; the gradient stays in its part."""
    return x if team is None else x.tensor_split(team.size, dim)[team.place]


# --- the operators: x, then integers, then the process group's name ---


@torch.library.custom_op("colossus::all_gather", mutates_args=())
def _all_gather(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    made = x.new_empty(size, *x.shape)
    all_gather_into(
        made.flatten(0, 1) if x.dim() else made, x.contiguous(), group=_resolve_process_group(group)
    )
    return made.flatten(0, 1) if dim == 0 else made.movedim(0, dim).flatten(dim, dim + 1).contiguous()


@torch.library.custom_op("colossus::reduce_scatter", mutates_args=())
def _reduce_scatter(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    parts = x.unflatten(dim, (size, -1)).movedim(dim, 0).contiguous()
    made = x.new_empty(parts.shape[1:])
    reduce_scatter_into(made, parts.flatten(0, 1), group=_resolve_process_group(group))
    return made


@torch.library.custom_op("colossus::total", mutates_args=())
def _total(x: Tensor, group: str) -> Tensor:
    made = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(made, group=_resolve_process_group(group))
    return made


@torch.library.custom_op("colossus::team_total", mutates_args=())
def _team_total(x: Tensor, group: str) -> Tensor:
    return _total(x, group)


@torch.library.custom_op("colossus::all_to_all", mutates_args=())
def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    made = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(made, x.contiguous(), received, sent, group=_resolve_process_group(group))
    return made


@_all_gather.register_fake
def _(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    return x.new_empty(*x.shape[:dim], size * x.shape[dim], *x.shape[dim + 1 :])


@_reduce_scatter.register_fake
def _(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    return x.new_empty(*x.shape[:dim], x.shape[dim] // size, *x.shape[dim + 1 :])


@_total.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_team_total.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_all_to_all.register_fake
def _(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    return x.new_empty(sum(received), *x.shape[1:])


def _keep_integers(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.integers = inputs[1:]


def _gather_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return _reduce_scatter(gradient, *ctx.integers), None, None, None


def _scatter_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return _all_gather(gradient, *ctx.integers), None, None, None


def _all_to_all_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    sent, received, group = ctx.integers
    return _all_to_all(gradient, received, sent, group), None, None, None


_all_gather.register_autograd(_gather_backward, setup_context=_keep_integers)
_reduce_scatter.register_autograd(_scatter_backward, setup_context=_keep_integers)
_total.register_autograd(lambda ctx, gradient: (gradient, None), setup_context=_keep_integers)
_team_total.register_autograd(
    lambda ctx, gradient: (_total(gradient, *ctx.integers), None), setup_context=_keep_integers
)
_all_to_all.register_autograd(_all_to_all_backward, setup_context=_keep_integers)
