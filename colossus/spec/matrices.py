"""Who orthogonalises which matrix, for an optimizer that needs whole ones (Muon), and who sends what to whom for it.

Dense matrices are dealt out over `tp` and `shards`, experts' over `expert_tp` and `expert_shards`, each to one rank
(arXiv:2502.16982, arXiv:2504.05295): in a round, the parts of a matrix travel to its rank, first within the team that
cut it last, then within the one that cut it first; it is orthogonalised there, and its direction travels back the same
way. Each rank does an equal share of the arithmetic, and of the memory beside the weights it holds a round's worth.
Stacks cut between their matrices stay where they are.

A team is the ranks of one group; `parallel/optimize.py` sends, and the planner prices, what is said here.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final, NamedTuple

from colossus.spec.layout import Group, Mates
from colossus.spec.sharding import Placement

__all__ = ["ROUND_ELEMENTS", "Dealt", "Matrix", "Owned", "Split", "Traffic", "deal", "deal_out"]

ROUND_ELEMENTS: Final = 2**26
"""Whole matrices that a rank orthogonalises at a time, and parts that it sends for it: 256 MiB each in float32. Fewer,
larger rounds keep all ranks busier and use more memory. Where a single matrix has more, as many as that has."""


class Split(NamedTuple):
    """How a team's ranks hold a matrix: in parts along a dim, each on `copies` neighbours."""

    whole: tuple[int, int]
    """What the parts make together; itself a part, where another team's ranks split the matrix first."""
    dim: int
    sizes: tuple[int, ...]
    copies: int

    def part(self, place: int) -> int:
        return place // self.copies

    def start(self, place: int) -> int:
        """Where the part of a rank begins, along `dim`."""
        return sum(self.sizes[: self.part(place)])

    def shape(self, place: int) -> tuple[int, int]:
        """Of the part that a rank holds."""
        size = self.sizes[self.part(place)]
        return (size, self.whole[1]) if self.dim == 0 else (self.whole[0], size)

    def sender(self, part: int, owner: int) -> int:
        """Who sends a part to the rank that puts the matrix together: that rank itself where it has it."""
        return owner if self.part(owner) == part else part * self.copies

    def senders(self, owner: int) -> list[int]:
        return [self.sender(part, owner) for part in range(len(self.sizes))]


class Matrix(NamedTuple):
    """A matrix of which each rank of some teams holds a part."""

    parameter: int
    """Which of the parameters it belongs to, in the order in which they were given."""
    number: int
    """In the parameter's stack."""
    shape: tuple[int, int]
    splits: tuple[Split, ...]
    """By team, in the order in which the matrix is cut."""

    @property
    def cost(self) -> int:
        """Of orthogonalising it, in proportion."""
        return math.prod(self.shape) * min(self.shape)

    @property
    def num_held(self) -> int:
        """Elements of the largest part, wherever it is: the same on all ranks."""
        rows, columns = self.shape
        for split in self.splits:
            parts = len(split.sizes)
            rows, columns = (-(-rows // parts), columns) if split.dim == 0 else (rows, -(-columns // parts))
        return rows * columns


class Owned(NamedTuple):
    """A matrix, and who orthogonalises it: a place in each team."""

    matrix: Matrix
    places: tuple[int, ...]


class Traffic(NamedTuple):
    """What a rank sends to each place of a team, and what comes from there: matrices by number, of each one part."""

    outgoing: tuple[tuple[int, ...], ...]
    incoming: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Dealt:
    """A round of matrices, each dealt to one rank of some teams, as one of these ranks sees it."""

    owned: Sequence[Owned]
    groups: tuple[Group, ...]
    """In the order of cuts, those in which the rank is alone left out."""
    here: tuple[int, ...]
    """The rank's place in each team."""
    team_sizes: tuple[int, ...]

    def split(self, i: int, level: int) -> tuple[Split, int]:
        """How the team of a level holds a matrix, and which of its ranks owns it."""
        matrix, places = self.owned[i]
        return matrix.splits[level], places[level]

    def is_owner(self, i: int, level: int) -> bool:
        return self.owned[i].places[level] == self.here[level]

    def is_needed(self, i: int) -> bool:
        """Whether this rank's part of a matrix goes on after the first exchange, and not a neighbour's copy of it."""
        for level, place in enumerate(self.here[:-1]):
            split, owner = self.split(i, level)
            if split.sender(split.part(place), owner) != place:
                return False
        return True

    def concerned(self, level: int) -> list[int]:
        """Matrices that this team exchanges: those that came to it through the teams that cut them later."""
        later = range(level + 1, len(self.groups))
        return [i for i in range(len(self.owned)) if all(self.is_owner(i, other) for other in later)]

    def gather(self, level: int) -> Traffic | None:
        """From parts to what they make together, on the rank of the team that owns it. None: nothing is exchanged."""
        concerned, here = self.concerned(level), self.here[level]
        if not any(len(self.split(i, level)[0].sizes) > 1 for i in concerned):
            return None
        outgoing: list[list[int]] = [[] for _ in range(self.team_sizes[level])]
        incoming: list[list[int]] = [[] for _ in range(self.team_sizes[level])]
        for i in concerned:
            if not self.is_needed(i):
                continue
            split, owner = self.split(i, level)
            if owner == here:
                for sender in split.senders(owner):
                    if sender != owner:
                        incoming[sender].append(i)
            elif split.sender(split.part(here), owner) == here:
                outgoing[owner].append(i)
        return Traffic(tuple(map(tuple, outgoing)), tuple(map(tuple, incoming)))

    def scatter(self, level: int) -> Traffic | None:
        """From what this rank owns to the parts that each rank of the team holds, copies among them."""
        concerned, here = self.concerned(level), self.here[level]
        if not concerned:
            return None
        outgoing: list[list[int]] = [[] for _ in range(self.team_sizes[level])]
        incoming: list[list[int]] = [[] for _ in range(self.team_sizes[level])]
        for i in concerned:
            _, owner = self.split(i, level)
            if owner == here:
                for place in range(self.team_sizes[level]):
                    if place != owner:
                        outgoing[place].append(i)
            else:
                incoming[owner].append(i)
        return Traffic(tuple(map(tuple, outgoing)), tuple(map(tuple, incoming)))

    def exchanges(self) -> Iterator[tuple[Group, int]]:
        """Of each exchange, in their order: the group, and the elements that this rank sends."""
        levels = range(len(self.groups))
        for level in reversed(levels):
            if (traffic := self.gather(level)) is not None:
                own = self.here[level]
                yield (
                    self.groups[level],
                    sum(math.prod(self.split(i, level)[0].shape(own)) for to in traffic.outgoing for i in to),
                )
        for level in levels:
            if (traffic := self.scatter(level)) is not None:
                sent = (
                    math.prod(self.split(i, level)[0].shape(place))
                    for place, numbers in enumerate(traffic.outgoing)
                    for i in numbers
                )
                yield self.groups[level], sum(sent)


def deal_out(
    placements: Sequence[Placement],
    counts: Sequence[int],
    mates: Callable[[Group], Mates],
    *,
    round_elements: int = ROUND_ELEMENTS,
) -> Iterator[Dealt]:
    """All rounds of a step. `placements`: of the matrices, and stacks of them, that a rank holds parts of, in one order
    on all ranks of a stage; `counts`: how many matrices of each are here, whole or in part."""
    by_groups: dict[tuple[Group, ...], list[Matrix]] = {}
    for parameter, (placement, count) in enumerate(zip(placements, counts, strict=True)):
        groups, splits = _splits(placement, mates)
        rows, columns = placement.parameter.shape[-2:]
        by_groups.setdefault(groups, []).extend(
            Matrix(parameter, number, (rows, columns), splits) for number in range(count)
        )
    for groups, matrices in by_groups.items():
        teams = [mates(group) for group in groups]
        sizes = tuple(team.size for team in teams)
        for owned in deal(matrices, sizes, round_elements):
            yield Dealt(owned, groups, tuple(team.place for team in teams), sizes)


def deal(matrices: Sequence[Matrix], team_sizes: Sequence[int], round_elements: int) -> list[list[Owned]]:
    """Rounds, in each of which every rank orthogonalises about as much as any other; the same on all ranks.

    The most expensive first, each to the rank that has least to do; then each round takes from the front of all ranks'
    queues, until one has `round_elements` of whole matrices, or of parts that it holds, or what the largest matrix has.
    """
    num_ranks = math.prod(team_sizes)
    least_busy = [(0, rank) for rank in range(num_ranks)]
    queues: list[list[int]] = [[] for _ in range(num_ranks)]
    for i in sorted(range(len(matrices)), key=lambda i: (-matrices[i].cost, i)):
        busy, rank = least_busy[0]
        queues[rank].append(i)
        heapq.heapreplace(least_busy, (busy + matrices[i].cost, rank))

    rounds: list[list[tuple[int, int]]] = [[]]
    whole, held = [0] * num_ranks, 0
    # Matrices beyond the limit are still dealt one to each rank, and not one to a round.
    limit = max([round_elements, *(math.prod(matrix.shape) for matrix in matrices)])
    for wave in zip_longest(*queues):
        for rank, i in enumerate(wave):
            if i is None:
                continue
            num_whole, num_held = math.prod(matrices[i].shape), matrices[i].num_held
            if rounds[-1] and max(whole[rank] + num_whole, held + num_held) > limit:
                rounds.append([])
                whole, held = [0] * num_ranks, 0
            rounds[-1].append((i, rank))
            whole[rank] += num_whole
            held += num_held
    # In the order of the parameters: neighbours in a stack are then updated in one go.
    return [[Owned(matrices[i], _places(rank, team_sizes)) for i, rank in sorted(one)] for one in rounds]


def _places(rank: int, team_sizes: Iterable[int]) -> tuple[int, ...]:
    """Of the `rank`th of all, its place in each team; the first team's ranks stand side by side."""
    places = []
    for size in team_sizes:
        places.append(rank % size)
        rank //= size
    return tuple(places)


def _splits(
    placement: Placement, mates: Callable[[Group], Mates]
) -> tuple[tuple[Group, ...], tuple[Split, ...]]:
    """The teams over which a parameter's matrices are dealt out, in the order of cuts, and how they hold each.

    A team that does not cut them has copies: all of a matrix is one part.
    """
    stack_dims = len(placement.parameter.shape) - 2
    rows, columns = placement.parameter.shape[-2:]
    shape = (rows, columns)
    groups, splits = [], []
    within: tuple[Group, ...] = (
        ("expert_tp", "expert_shards") if placement.parameter.expert else ("tp", "shards")
    )
    for group in within:
        team, cut = mates(group), placement.cut(group)
        if team.size == 1 or (cut is not None and cut.dim < stack_dims):
            continue
        dim = 0 if cut is None else cut.dim - stack_dims
        num_parts = 1 if cut is None else cut.num_parts
        split = Split(shape, dim, _sizes(shape[dim], num_parts), team.size // num_parts)
        shape = split.shape(team.place)
        groups.append(group)
        splits.append(split)
    return tuple(groups), tuple(splits)


def _sizes(size: int, num_parts: int) -> tuple[int, ...]:
    """Of parts of ⌈size / num_parts⌉, the last ones smaller or empty."""
    step = -(-size // num_parts)
    return tuple(min(step, max(0, size - part * step)) for part in range(num_parts))
