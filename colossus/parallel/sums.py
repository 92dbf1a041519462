"""What is left to sum of a step's gradients once the backward passes are over.

Sharded data parallelism (FSDP2) has summed what it scatters over the ranks of one replica group. Left are: parameters
of which every tensor-parallel rank has all, and sees other tokens; parameters that nothing shards; an embedding that is
also the head, on both ends of a pipeline; and the replica groups.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from colossus.parallel.mesh import Mesh
from colossus.spec.layout import Group
from colossus.spec.sharding import Placement

BUCKET_BYTES = 256 * 2**20
"""Gradients are summed in buffers of about this size: large enough for full bandwidth, small beside the model."""


@dataclass(frozen=True, slots=True)
class Over:
    """A sum over the ranks of a group; where these hold `num_parts` different parts, over those with this one's, which
    is number `part`."""

    group: Group
    part: int = 0
    num_parts: int = 1


def sums_of(placement: Placement, mesh: Mesh) -> tuple[Over, ...]:
    """Within a replica group and then across: over whom a gradient is left to sum."""
    within: tuple[Group, ...] = (
        ("expert_tp", "expert_shards") if placement.parameter.expert else ("tp", "shards")
    )
    left = []
    for group in (*within, "replica"):
        here, cut = mesh.mates(group), placement.cut(group)
        if here.size == 1:
            continue
        if cut is None:
            left.append(Over(group))
        elif cut.num_parts < here.size:  # neighbours have copies
            left.append(Over(group, here.place * cut.num_parts // here.size, cut.num_parts))
    return tuple(left)


@dataclass(frozen=True, slots=True)
class Sum:
    """Gradients that are summed over the same ranks, in one order on all of them."""

    names: tuple[str, ...]
    over: tuple[Over, ...]


def plan_sums(
    placements: Mapping[str, Placement], mesh: Mesh, *, on_both_ends: frozenset[str] = frozenset()
) -> tuple[Sum, ...]:
    """All sums of a step, each parameter in at most one. `on_both_ends`: those of which both ends of a pipeline have a
    gradient."""
    by_ranks: dict[tuple[Over, ...], list[str]] = {}
    for name, placement in placements.items():
        ends = (Over("ends"),) if name in on_both_ends else ()
        if over := ends + sums_of(placement, mesh):
            by_ranks.setdefault(over, []).append(name)
    return tuple(Sum(tuple(names), over) for over, names in by_ranks.items())


@torch.no_grad()
def sum_gradients(
    gradients: Mapping[str, Tensor],
    sums: Sequence[Sum],
    mesh: Mesh,
    *,
    replica_dtype: torch.dtype | None = None,
) -> None:
    """Sums local gradients in place. `replica_dtype`: what they travel in between replica groups; None: as they are."""
    for one in sums:
        for bucket in _buckets(gradients[name] for name in one.names):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            for over in one.over:
                flat = _sum(flat, over, mesh, replica_dtype if over.group == "replica" else None)
            start = 0
            for gradient in bucket:
                gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
                start += gradient.numel()


def _sum(flat: Tensor, over: Over, mesh: Mesh, dtype: torch.dtype | None) -> Tensor:
    team = mesh.team(over.group)
    assert team is not None
    sent = flat if dtype is None else flat.to(dtype)
    if over.num_parts > 1:  # every part in a row of its own: the ranks of the others add zeros
        sent = sent.new_zeros(over.num_parts, len(flat)).index_copy_(
            0, torch.tensor([over.part], device=sent.device), sent[None]
        )
    dist.all_reduce(sent, group=team.process_group)
    return (sent[over.part] if over.num_parts > 1 else sent).to(flat.dtype)


def _buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    filled = BUCKET_BYTES
    for tensor in tensors:
        if filled + tensor.nbytes > BUCKET_BYTES or tensor.dtype != buckets[-1][0].dtype:
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += tensor.nbytes
    return buckets
