"""Ranks along the mesh axes: which rank stands where, and who works with whom. No torch, and nothing grows with the
number of ranks."""

import math
from typing import Final, Literal, NamedTuple

from colossus.errors import ConfigError
from colossus.spec.base import Frozen, Positive

Axis = Literal["replica", "pp", "shard", "cp", "tp"]
AXES: Final[tuple[Axis, ...]] = ("replica", "pp", "shard", "cp", "tp")
"""From the outermost to the innermost: ranks that differ in the last one stand side by side, within a node; a replica
group is a row of ranks without a gap."""

Group = Literal["tp", "cp", "pp", "replica", "shards", "ep", "expert_tp", "expert_shards", "ends", "group"]
"""Sets of ranks that work together. `shards`: ranks that share one copy of what is sharded, shard × cp; `ep`: those
among which the experts are dealt out; `expert_tp`: those that share each expert; `expert_shards`: those that share one
copy of their experts, what is left of shard × cp × tp; `ends`: the first and the last rank of a pipeline; `group`: a
whole replica group."""
GROUPS: Final[tuple[Group, ...]] = (
    "tp", "cp", "pp", "replica", "shards", "ep", "expert_tp", "expert_shards", "ends", "group",
)  # fmt: skip


class Coordinates(NamedTuple):
    """A rank's place on each axis, from 0."""

    replica: int
    pp: int
    shard: int
    cp: int
    tp: int


class Layout(Frozen):
    """Ranks along each mesh axis. A replica group is pp × shard × cp × tp ranks.

    Experts fold into shard × cp × tp: `ep` ranks deal them out, `expert_tp` share each, and the rest share one copy.
    """

    replica: Positive = 1
    pp: Positive = 1
    shard: Positive = 1
    cp: Positive = 1
    tp: Positive = 1
    ep: Positive = 1

    @property
    def num_ranks(self) -> int:
        return self.replica * self.group_ranks

    @property
    def group_ranks(self) -> int:
        """Ranks of one replica group, which holds one whole copy of the model."""
        return self.pp * self.shard * self.cp * self.tp

    @property
    def stage_ranks(self) -> int:
        """Ranks of a replica group that hold one pipeline stage, the ones that experts fold into."""
        return self.shard * self.cp * self.tp

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` stands. Raises ConfigError for one that is not there."""
        if not 0 <= rank < self.num_ranks:
            raise ConfigError(f"there is no rank {rank}: the layout has {self.num_ranks:,}, from 0 up")
        places = []
        for axis in reversed(AXES):
            size = getattr(self, axis)
            places.append(rank % size)
            rank //= size
        return Coordinates(*reversed(places))

    def rank(self, coordinates: Coordinates) -> int:
        """The rank that stands there."""
        rank = 0
        for axis, place in zip(AXES, coordinates, strict=True):
            rank = rank * getattr(self, axis) + place
        return rank


class Mates(NamedTuple):
    """A rank's place in a group of ranks that work together, and all of its ranks in order."""

    place: int
    ranks: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.ranks)


def mates(layout: Layout, expert_tp: int, rank: int, group: Group) -> Mates:
    """The ranks that `rank` works with in `group`, in the order of their places."""
    here = layout.coordinates(rank)
    if group in ("ep", "expert_tp", "expert_shards"):
        return _expert_mates(layout, expert_tp, rank, group)
    if group == "ends":
        return _ends(layout, rank, here)
    axes: tuple[Axis, ...]
    match group:
        case "shards":
            axes = ("shard", "cp")
        case "group":
            axes = ("pp", "shard", "cp", "tp")
        case _:
            axes = (group,)  # type: ignore[assignment]
    place, stride_sets = 0, [0]
    for axis in axes:
        size, stride = getattr(layout, axis), _stride(layout, axis)
        place = place * size + getattr(here, axis)
        stride_sets = [start + i * stride for start in stride_sets for i in range(size)]
    origin = rank - sum(getattr(here, axis) * _stride(layout, axis) for axis in axes)
    return Mates(place, tuple(origin + offset for offset in stride_sets))


def _ends(layout: Layout, rank: int, here: Coordinates) -> Mates:
    last = layout.pp - 1
    if last == 0 or here.pp not in (0, last):
        return Mates(0, (rank,))
    return Mates(here.pp // last, (layout.rank(here._replace(pp=0)), layout.rank(here._replace(pp=last))))


def _expert_mates(layout: Layout, expert_tp: int, rank: int, group: Group) -> Mates:
    """Within a stage's ranks, counted through: sharing an expert is innermost, then dealing them out, then copies."""
    inside = layout.stage_ranks
    place, origin = rank % inside, rank - rank % inside
    sizes = {"expert_tp": expert_tp, "ep": layout.ep, "expert_shards": inside // (expert_tp * layout.ep)}
    strides = {"expert_tp": 1, "ep": expert_tp, "expert_shards": expert_tp * layout.ep}
    size, stride = sizes[group], strides[group]
    mine = place // stride % size
    first = origin + place - mine * stride
    return Mates(mine, tuple(first + i * stride for i in range(size)))


def _stride(layout: Layout, axis: Axis) -> int:
    return math.prod(getattr(layout, inner) for inner in AXES[AXES.index(axis) + 1 :])
