"""Scales of FP8 matmuls that ranks share: those of one process."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from colossus.models.float8.recipe import Largest, Splits
from colossus.parallel.collectives import Team
from colossus.parallel.mesh import Mesh
from colossus.spec.sharding import ShardingTable


def splits_of(table: ShardingTable, mesh: Mesh) -> Callable[[str], Splits]:
    """What is split of the linear map of that name, for `use_float8`.

    The weight says it: cut along its outputs or inputs over tp (experts: over expert_tp), or, where it is whole, a map
    that sees this rank's own tokens. Over cp, all maps do. Other axes have other micro-batches, with their own scales.
    """

    def splits(name: str) -> Splits:
        placement = table[f"{name}.weight"]
        num_dims = len(placement.parameter.shape)
        over = mesh.team("expert_tp" if num_dims == 3 else "tp")
        cut = placement.cut("expert_tp" if num_dims == 3 else "tp")
        dim = None if cut is None else cut.dim - num_dims
        whole = num_dims == 2 and cut is None
        return Splits(
            tokens=None if num_dims == 3 else _largest_of(over if whole else None, mesh.team("cp")),
            outputs=_largest_of(over) if dim == -2 else None,
            inputs=_largest_of(over) if dim == -1 else None,
        )

    return splits


def _largest_of(*teams: Team | None) -> Largest | None:
    names = tuple(team.name for team in teams if team is not None)
    return partial(_over_all, names=names) if names else None


def _over_all(amax: Tensor, names: tuple[str, ...]) -> Tensor:
    for name in names:
        amax = largest(amax, name)
    return amax


@torch.library.custom_op("colossus::largest", mutates_args=())
def largest(amax: Tensor, group: str) -> Tensor:
    """Entry by entry, the largest of all ranks of the process group; not-a-number where any rank has it."""
    made = amax.float()  # magnitudes in bfloat16 are float32 numbers: exact
    # As integers these are in the same order, with not-a-number above all: `max` over floats may lose it.
    bits = made.view(torch.int32).clone()
    dist.all_reduce(bits, op=dist.ReduceOp.MAX, group=_resolve_process_group(group))
    return bits.view(torch.float32)


@largest.register_fake
def _(amax: Tensor, group: str) -> Tensor:
    return torch.empty_like(amax, dtype=torch.float32, memory_format=torch.contiguous_format)
