"""The sharding table: how each parameter is split along each mesh axis, as data.

The planner counts bytes with it, the trainer places tensors with it, checkpoints name pieces with it. A parameter is
cut one dim after the other: over the ranks that compute with parts of it (`tp`; for experts `ep` and `expert_tp`), then
over those that only keep it for each other (`shards`, `expert_shards`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from colossus.spec.layout import Group, Layout, Mates, mates
from colossus.spec.model import ModelSpec
from colossus.spec.parameters import ParameterSpec
from colossus.spec.parts import AttentionSpec

COMPUTING: frozenset[Group] = frozenset({"tp", "ep", "expert_tp"})
"""Groups whose ranks compute with their part of a parameter; the others only keep it for each other."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One dim, cut over a group's ranks into `num_parts` parts of ⌈size / num_parts⌉, the last ones smaller or empty.

    Where there are fewer parts than ranks, neighbours hold the same one: keys and values that several heads share.
    """

    dim: int
    group: Group
    num_parts: int


class Box(NamedTuple):
    """A part of a tensor: where it starts in each dim, and its sizes."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """One parameter and its cuts, in the order in which they are made."""

    parameter: ParameterSpec
    cuts: tuple[Cut, ...]

    def box(self, mates_of: Callable[[Group], Mates], *, kept: bool = True) -> Box:
        """What a rank holds; without `kept`, what it computes with: the part before it is cut for keeping alone."""
        offsets, shape = [0] * len(self.parameter.shape), list(self.parameter.shape)
        for cut in self.cuts:
            if not kept and cut.group not in COMPUTING:
                continue
            place, size, _ = _part(cut, mates_of(cut.group))
            step = -(-shape[cut.dim] // size)
            start, end = min(place * step, shape[cut.dim]), min((place + 1) * step, shape[cut.dim])
            offsets[cut.dim] += start
            shape[cut.dim] = end - start
        return Box(tuple(offsets), tuple(shape))

    def cut(self, group: Group) -> Cut | None:
        return next((cut for cut in self.cuts if cut.group == group), None)

    def is_first_copy(self, mates_of: Callable[[Group], Mates], groups: tuple[Group, ...]) -> bool:
        """Whether a rank is the first of those in `groups` that hold the same part: what counts once counts here."""
        for group in groups:
            cut, here = self.cut(group), mates_of(group)
            if (here.place if cut is None else _part(cut, here).copy) > 0:
                return False
        return True


class _Part(NamedTuple):
    place: int
    num_parts: int
    copy: int


def _part(cut: Cut, here: Mates) -> _Part:
    """Which part a rank holds, and which of its copies."""
    ranks_of_part = here.size // cut.num_parts
    return _Part(here.place // ranks_of_part, cut.num_parts, here.place % ranks_of_part)


@dataclass(frozen=True, slots=True)
class ShardingTable:
    """Every parameter's placement, by name, under one layout."""

    layout: Layout
    expert_tp: int
    placements: Mapping[str, Placement]

    def __getitem__(self, name: str) -> Placement:
        return self.placements[name]

    def box(self, name: str, rank: int, *, kept: bool = True) -> Box:
        """What `rank` holds of a parameter of its stage."""
        return self.placements[name].box(lambda group: self.mates(rank, group), kept=kept)

    def mates(self, rank: int, group: Group) -> Mates:
        return mates(self.layout, self.expert_tp, rank, group)


@lru_cache(maxsize=32)
def sharding_table(
    model: ModelSpec, layout: Layout, expert_tp: int = 1, *, sharded: bool = True
) -> ShardingTable:
    """The table of `model` under `layout`; `sharded`: whether anything is split for keeping alone."""
    placed: dict[str, Placement] = {}
    for parameter in (*model.input_parameters(), *model.output_parameters()):
        placed[parameter.name] = _placement(model, parameter, layout, expert_tp, sharded)
    for group in model.layer_groups():
        for parameter in group.parameters:
            placement = _placement(model, parameter, layout, expert_tp, sharded)
            for layer in range(group.first_layer, group.first_layer + group.num_layers):
                placed[f"layers.{layer}.{parameter.name}"] = placement
    return ShardingTable(layout, expert_tp, placed)


def _placement(
    model: ModelSpec, parameter: ParameterSpec, layout: Layout, expert_tp: int, sharded: bool
) -> Placement:
    cuts = list(_computing_cuts(model, parameter, layout, expert_tp))
    shape = list(parameter.shape)
    for cut in cuts:
        shape[cut.dim] = -(-shape[cut.dim] // cut.num_parts)
    if sharded and parameter.role not in ("sparse_embedding", "balance"):
        keepers = layout.shard * layout.cp
        group: Group = "shards"
        if parameter.expert:
            keepers, group = layout.stage_ranks // (layout.ep * expert_tp), "expert_shards"
        if keepers > 1:
            cuts.append(Cut(_kept_dim(shape, keepers), group, keepers))
    return Placement(parameter, tuple(cuts))


def _kept_dim(shape: list[int], keepers: int) -> int:
    """Rows; of a stack of matrices the first dim that comes out even, so that no rank is left without a share."""
    if len(shape) == 3:
        return next((dim for dim in range(3) if shape[dim] % keepers == 0), 0)
    return 0


def _computing_cuts(
    model: ModelSpec, parameter: ParameterSpec, layout: Layout, expert_tp: int
) -> Iterator[Cut]:
    name = parameter.name
    if parameter.expert:
        if layout.ep > 1:
            yield Cut(0, "ep", layout.ep)
        inner = {"gate": 1, "up": 1, "down": 2}[name.split(".")[2]]
        if expert_tp > 1 and inner < len(parameter.shape):
            yield Cut(inner, "expert_tp", expert_tp)
        return
    if layout.tp == 1:
        return
    dim = tensor_dim(model, name)
    if dim is not None and dim < len(parameter.shape):
        yield Cut(dim, "tp", _num_parts(model, name, layout.tp))


_ROWS = ("attention.query.", "attention.query_up.", "attention.key_value_up.", "mlp.gate.", "mlp.up.",
         "mlp.shared.gate.", "mlp.shared.up.", "attention.sinks", "embedding.weight", "head.weight")  # fmt: skip
_KEYS_AND_VALUES = ("attention.key.", "attention.value.")
_COLUMNS = ("attention.output.weight", "mlp.down.weight", "mlp.shared.down.weight")


def tensor_dim(model: ModelSpec, name: str) -> int | None:
    """The dim of a dense parameter (named within its layer) that `tp` cuts; None where each rank has all of it.

    By rows: what heads, inner channels and tokens of the vocabulary come out of; by columns: what they go into
    (arXiv:1909.08053).
    """
    if name.startswith(_ROWS + _KEYS_AND_VALUES):
        return 0
    if name.startswith(_COLUMNS):
        return 1
    attention = model.attention
    if isinstance(attention, AttentionSpec) and attention.qk_norm_weights == "all_heads":
        return 0 if name.startswith(("attention.query_norm.", "attention.key_norm.")) else None
    return None


def _num_parts(model: ModelSpec, name: str, tp: int) -> int:
    if name.startswith((*_KEYS_AND_VALUES, "attention.key_norm.")):
        return min(tp, model.attention.num_kv_heads)
    return tp
