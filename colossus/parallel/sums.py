"""What is left to sum of a step's gradients beside what sharding sums.

Sharded data parallelism (FSDP2) sums what it scatters over the ranks of one replica group. Left are: parameters of
which every tensor-parallel rank has all, and sees other tokens; parameters that nothing shards; an embedding that is
also the head, on both ends of a pipeline; and the replica groups.

What only replica groups are left to sum, most of all numbers, goes layer by layer while the last backward pass is still
busy with the layers before. All ranks of a team begin these sums in one order, whatever their own passes are ready with
first; what is not begun when the passes are over, and all other sums, follow then.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from colossus.parallel.mesh import Mesh
from colossus.spec.layout import Group
from colossus.spec.parameters import layer_of
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


BETWEEN_REPLICAS = (Over("replica"),)
"""Most numbers of a model are summed so, and over no other ranks."""


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
    """All sums of a step, each parameter in at most one; those between replicas by layers. `on_both_ends`: those of
    which both ends of a pipeline have a gradient."""
    by_ranks: dict[tuple[tuple[Over, ...], int | None], list[str]] = {}
    for name, placement in placements.items():
        ends = (Over("ends"),) if name in on_both_ends else ()
        if over := ends + sums_of(placement, mesh):
            layer = layer_of(name) if over == BETWEEN_REPLICAS else None
            by_ranks.setdefault((over, layer), []).append(name)
    return tuple(Sum(tuple(names), over) for (over, _), names in by_ranks.items())


class GradientSums:
    """Sums local gradients in place, once a step. `replica_dtype`: what they travel in between replica groups; None: as
    they are."""

    def __init__(self, sums: Iterable[Sum], mesh: Mesh, *, replica_dtype: torch.dtype | None = None) -> None:
        sums = tuple(sums)
        self.mesh, self._replica_dtype = mesh, replica_dtype
        # Backward passes come by the last layers first, and by what stands before all layers last.
        ahead = [one for one in reversed(sums) if one.over == BETWEEN_REPLICAS]
        self._ahead = tuple(sorted(ahead, key=lambda one: layer_of(one.names[0]) is None))
        self._after = tuple(one for one in sums if one.over != BETWEEN_REPLICAS)
        self.names_ahead = frozenset(name for one in self._ahead for name in one.names)
        """Of gradients that `arrived` wants to know of."""
        self._here: dict[str, Tensor] = {}
        self._made: dict[str, torch.cuda.Event] = {}
        """On a GPU, when each of these was made: sharding has a stream of its own."""
        self._num_begun = 0
        self._under_way: list[list[_Travelling]] = []

    def reset(self) -> None:
        """Before a step's passes: forgets what one that was given up has left."""
        for travelling in self._under_way:
            for bucket in travelling:
                bucket.work.wait()
        self._under_way.clear()
        self._here.clear()
        self._made.clear()
        self._num_begun = 0

    def arrived(self, name: str, gradient: Tensor) -> None:
        """Call it when nothing more is added to a gradient in this step, on the stream that has made it."""
        self._here[name] = gradient
        if gradient.is_cuda:
            self._made[name] = torch.cuda.current_stream().record_event()
        while self._num_begun < len(self._ahead):
            names = self._ahead[self._num_begun].names
            if not all(name in self._here for name in names):
                return
            for made in filter(None, map(self._made.get, names)):
                torch.cuda.current_stream().wait_event(made)
            self._begin(self._here[name] for name in names)

    def finish(self, gradients: Mapping[str, Tensor]) -> None:
        """When the backward passes are over; `gradients` are all that are here."""
        while self._num_begun < len(self._ahead):
            self._begin(gradients[name] for name in self._ahead[self._num_begun].names)
        while self._under_way:
            self._take_oldest()
        for one in self._after:
            for bucket in _buckets(gradients[name] for name in one.names):
                for over in one.over:
                    self._travel(bucket, over).arrive()
        self.reset()

    @torch.no_grad()
    def _begin(self, gradients: Iterable[Tensor]) -> None:
        """The next sum of those that go ahead. That of one more layer may be under way: none holds up the one after it,
        and there are no more buffers than for two."""
        self._num_begun += 1
        if len(self._under_way) == 2:
            self._take_oldest()
        self._under_way.append([self._travel(bucket, *BETWEEN_REPLICAS) for bucket in _buckets(gradients)])

    def _take_oldest(self) -> None:
        for bucket in self._under_way.pop(0):
            bucket.arrive()

    @torch.no_grad()
    def _travel(self, bucket: list[Tensor], over: Over) -> "_Travelling":
        team = self.mesh.team(over.group)
        assert team is not None
        narrow = self._replica_dtype if over.group == "replica" else None
        shape = (over.num_parts, sum(gradient.numel() for gradient in bucket))
        # Every part in a row of its own: the ranks of the others add zeros.
        made = torch.empty if over.num_parts == 1 else torch.zeros
        sent = made(shape, dtype=narrow or bucket[0].dtype, device=bucket[0].device)
        for gradient, piece in _pieces(bucket, sent[over.part]):
            piece.copy_(gradient)
        work = dist.all_reduce(sent, group=team.process_group, async_op=True)
        return _Travelling(bucket, sent, over.part, work)


@dataclass(frozen=True, slots=True)
class _Travelling:
    """A sum that is under way, and the gradients that it is of."""

    bucket: list[Tensor]
    sent: Tensor
    part: int
    work: dist.Work

    @torch.no_grad()
    def arrive(self) -> None:
        self.work.wait()
        for gradient, piece in _pieces(self.bucket, self.sent[self.part]):
            gradient.copy_(piece)
        if self.sent.is_cuda:
            # It may be of another stream, which must not give its memory away before this one has read it.
            self.sent.record_stream(torch.cuda.current_stream())


def _pieces(bucket: list[Tensor], flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each of a bucket's gradients, and what of `flat` is of its shape."""
    start = 0
    for gradient in bucket:
        yield gradient, flat[start : start + gradient.numel()].view(gradient.shape)
        start += gradient.numel()


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
