"""Optimizing what many ranks hold parts of: whole matrices for Muon, the gradient's norm, sums of sparse gradients and
of experts' loads. All else that optimizers do is element by element, and needs nobody else."""

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colossus.optim.muon import Orthogonalise, Piece, Round
from colossus.optim.row_adagrad import rows_and_values
from colossus.parallel.collectives import Team, all_gather_into
from colossus.parallel.mesh import Mesh
from colossus.spec.layout import Group
from colossus.spec.sharding import Placement

ROUND_ELEMENTS: Final = 2**26
"""Whole matrices that a rank orthogonalises at a time, and parts that it sends for it: 256 MiB each in float32. Fewer,
larger rounds keep all ranks busier and use more memory. Where a single matrix has more, as many as that has."""


# --- Muon: parts come together as whole matrices, and directions go back ---


class Split(NamedTuple):
    """How a team's ranks hold a matrix: in parts along a dim, each on `copies` neighbours."""

    whole: tuple[int, int]
    """What the parts make together; itself a part, where another team's ranks split the matrix first."""
    dim: int
    sizes: tuple[int, ...]
    copies: int

    def part(self, place: int) -> int:
        return place // self.copies

    def shape(self, place: int) -> tuple[int, int]:
        """Of the part that a rank holds."""
        size = self.sizes[self.part(place)]
        return (size, self.whole[1]) if self.dim == 0 else (self.whole[0], size)

    def take(self, whole: Tensor, place: int) -> Tensor:
        """The part that a rank holds."""
        part = self.part(place)
        return whole.narrow(self.dim, sum(self.sizes[:part]), self.sizes[part])

    def sender(self, part: int, owner: int) -> int:
        """Who sends a part to the rank that puts the matrix together: that rank itself where it has it."""
        return owner if self.part(owner) == part else part * self.copies

    def senders(self, owner: int) -> list[int]:
        return [self.sender(part, owner) for part in range(len(self.sizes))]


class Matrix(NamedTuple):
    """A matrix of which each rank of some teams holds a part."""

    parameter: Tensor
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


class MatrixRounds:
    """Deals Muon's matrices out over the ranks that hold parts or copies of them (arXiv:2502.16982, arXiv:2504.05295).

    Dense matrices are dealt out over `tp` and `shards`, experts' over `expert_tp` and `expert_shards`, each to one
    rank: in a round, the parts of a matrix travel to its rank, first within the team that cut it last, then within the
    one that cut it first; it is orthogonalised there, and its direction travels back the same way. Each rank does an
    equal share of the arithmetic, and of the memory beside the weights it holds a round's worth. Stacks cut between
    their matrices stay where they are.

    All ranks of a stage ask for the same parameters in the same order.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        placements: Mapping[str, Placement],
        mesh: Mesh,
        *,
        round_elements: int = ROUND_ELEMENTS,
    ) -> None:
        self._placements = {parameter: placements[name] for name, parameter in parameters.items()}
        self._mesh, self._round_elements = mesh, round_elements
        self._dealt: dict[tuple[int, ...], tuple[Round, ...]] = {}

    def __call__(self, parameters: Sequence[Tensor]) -> Iterable[Round]:
        key = tuple(id(parameter) for parameter in parameters)
        if key not in self._dealt:
            self._dealt[key] = tuple(self._deal(parameters))
        return self._dealt[key]

    def _deal(self, parameters: Sequence[Tensor]) -> Iterator[Round]:
        by_teams: dict[tuple[Group, ...], list[Matrix]] = {}
        for parameter in parameters:
            groups, splits = _splits(self._placements[parameter], self._mesh)
            rows, columns = self._placements[parameter].parameter.shape[-2:]
            by_teams.setdefault(groups, []).extend(
                Matrix(parameter, number, (rows, columns), splits)
                for number in range(parameter.shape[0] if parameter.dim() == 3 else 1)
            )
        for groups, matrices in by_teams.items():
            teams = tuple(team for group in groups if (team := self._mesh.team(group)) is not None)
            for owned in deal(matrices, [team.size for team in teams], self._round_elements):
                yield TeamRound(owned, teams)


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


def _places(rank: int, team_sizes: Sequence[int]) -> tuple[int, ...]:
    """Of the `rank`th of all, its place in each team; the first team's ranks stand side by side."""
    places = []
    for size in team_sizes:
        places.append(rank % size)
        rank //= size
    return tuple(places)


def _splits(placement: Placement, mesh: Mesh) -> tuple[tuple[Group, ...], tuple[Split, ...]]:
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
        team, cut = mesh.team(group), placement.cut(group)
        if team is None or (cut is not None and cut.dim < stack_dims):
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


@dataclass(frozen=True)
class TeamRound:
    """A round of matrices, each dealt to one rank of `teams`, which are in the order of cuts."""

    owned: Sequence[Owned]
    teams: tuple[Team, ...]

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        pieces: list[Piece] = []
        for matrix, _ in self.owned:
            last = pieces[-1] if pieces else None
            if last is not None and last.parameter is matrix.parameter and last.end == matrix.number:
                pieces[-1] = last._replace(end=matrix.number + 1)
            else:
                pieces.append(Piece(matrix.parameter, matrix.number, matrix.number + 1, matrix.shape))
        return tuple(pieces)

    def directions(self, updates: Iterator[Tensor], orthogonalise: Orthogonalise) -> Sequence[Tensor]:
        parts = [part for update in updates for part in update]
        like = parts[0].new_empty(0)
        levels = range(len(self.teams))
        # What is here of each matrix, by its number: at first of all, at last of those that are whole here.
        held = {i: part for i, part in enumerate(parts) if self._is_needed(i)}
        del parts
        for level in reversed(levels):
            held = self._gather(level, held, like)
        held = _orthogonalise_by_shape(held, orthogonalise)
        for level in levels:
            held = self._scatter(level, held, like)
        return self._joined(held)

    def _is_needed(self, i: int) -> bool:
        """Whether this rank's part of a matrix goes on after the first exchange, and not a neighbour's copy of it."""
        matrix, places = self.owned[i]
        return all(
            split.sender(split.part(team.place), owner) == team.place
            for split, owner, team in list(zip(matrix.splits, places, self.teams, strict=True))[:-1]
        )

    def _concerned(self, level: int) -> list[int]:
        """Matrices that this team exchanges: those that came to it through the teams that cut them later."""
        later = range(level + 1, len(self.teams))
        return [i for i in range(len(self.owned)) if all(self._is_owner(i, other) for other in later)]

    def _is_owner(self, i: int, level: int) -> bool:
        return self.owned[i].places[level] == self.teams[level].place

    def _gather(self, level: int, held: dict[int, Tensor], like: Tensor) -> dict[int, Tensor]:
        """From parts to what they make together, on the rank of the team that owns it."""
        team = self.teams[level]
        outgoing: list[list[Tensor]] = [[] for _ in team.ranks]
        expected: list[list[tuple[int, int]]] = [[] for _ in team.ranks]
        for i, part in held.items():
            split, owner = self._split(i, level)
            if owner == team.place:
                for sender in split.senders(owner):
                    if sender != owner:
                        expected[sender].append(split.shape(sender))
            elif split.sender(split.part(team.place), owner) == team.place:
                outgoing[owner].append(part)
        is_cut = any(len(self._split(i, level)[0].sizes) > 1 for i in self._concerned(level))
        received = _exchange(outgoing, expected, team, like) if is_cut else []
        made = {}
        for i, part in held.items():
            split, owner = self._split(i, level)
            if owner == team.place:
                parts = [
                    part if sender == owner else next(received[sender]) for sender in split.senders(owner)
                ]
                made[i] = torch.cat(parts, split.dim) if len(parts) > 1 else part
        return made

    def _scatter(self, level: int, held: dict[int, Tensor], like: Tensor) -> dict[int, Tensor]:
        """From what this rank owns to the parts that each rank of the team holds, copies among them."""
        team, concerned = self.teams[level], self._concerned(level)
        outgoing: list[list[Tensor]] = [[] for _ in team.ranks]
        expected: list[list[tuple[int, int]]] = [[] for _ in team.ranks]
        for i in concerned:
            split, owner = self._split(i, level)
            if owner == team.place:
                for place in range(team.size):
                    if place != owner:
                        outgoing[place].append(split.take(held[i], place))
            else:
                expected[owner].append(split.shape(team.place))
        received = _exchange(outgoing, expected, team, like) if concerned else []
        made = {}
        for i in concerned:
            split, owner = self._split(i, level)
            made[i] = split.take(held[i], owner) if owner == team.place else next(received[owner])
        return made

    def _split(self, i: int, level: int) -> tuple[Split, int]:
        """How a team holds a matrix, and which of its ranks owns it."""
        matrix, places = self.owned[i]
        return matrix.splits[level], places[level]

    def _joined(self, directions: dict[int, Tensor]) -> list[Tensor]:
        """Of each piece: those of its matrices."""
        joined, start = [], 0
        for piece in self.pieces:
            count = piece.end - piece.first
            joined.append(torch.stack([directions[i] for i in range(start, start + count)]))
            start += count
        return joined


def _orthogonalise_by_shape(whole: dict[int, Tensor], orthogonalise: Orthogonalise) -> dict[int, Tensor]:
    by_shape: dict[torch.Size, list[int]] = {}
    for i, matrix in whole.items():
        by_shape.setdefault(matrix.shape, []).append(i)
    directions = {}
    for numbers in by_shape.values():
        made = orthogonalise(torch.stack([whole[i] for i in numbers]))
        directions.update(zip(numbers, made, strict=True))
    return directions


def _exchange(
    outgoing: list[list[Tensor]], expected: list[list[tuple[int, int]]], team: Team, like: Tensor
) -> list[Iterator[Tensor]]:
    """Sends each rank of the team its tensors; those that come from each, in the order in which it sent them."""
    flat = [part.reshape(-1) for parts in outgoing for part in parts]
    sent = torch.cat(flat) if flat else like.new_empty(0)
    num_sent = [sum(part.numel() for part in parts) for parts in outgoing]
    num_received = [sum(map(math.prod, shapes)) for shapes in expected]
    received = like.new_empty(sum(num_received))
    dist.all_to_all_single(received, sent, num_received, num_sent, group=team.process_group)
    return [
        iter(
            [
                part.view(shape)
                for part, shape in zip(one.split([*map(math.prod, shapes)]), shapes, strict=True)
            ]
        )
        for one, shapes in zip(received.split(num_received), expected, strict=True)
    ]


# --- the gradient ---


@torch.no_grad()
def gradient_norm(
    gradients: Mapping[str, Tensor],
    placements: Mapping[str, Placement],
    mesh: Mesh,
    *,
    on_both_ends: frozenset[str] = frozenset(),
) -> Tensor:
    """The 2-norm of the whole gradient, float32, from what each rank holds of it, summed over ranks already.

    Every element counts once, on the first of the ranks of a replica group that have it. `on_both_ends`: names of what
    both ends of a pipeline have. The same bits on all ranks: each adds up the same numbers in the same order, which a
    sum over ranks would leave to the network.
    """
    counted = []
    for name, gradient in gradients.items():
        if placements[name].is_first_copy(mesh.mates, _holders(placements[name], name in on_both_ends)):
            counted.append(rows_and_values(gradient)[1] if gradient.is_sparse else gradient)
    square = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if counted:
        norms = torch.stack(torch._foreach_norm(counted, 2, dtype=torch.float32))
        square = norms.double().square().sum()
    team = mesh.team("group")
    if team is not None:
        squares = square.new_empty(team.size)
        all_gather_into(squares, square[None], group=team.process_group)
        square = squares.sum()
    return square.sqrt().float()


def _holders(placement: Placement, on_both_ends: bool) -> tuple[Group, ...]:
    """Groups that between them are all ranks of a replica group that may hold a parameter."""
    if placement.parameter.expert:
        return ("expert_tp", "ep", "expert_shards")
    return ("tp", "shards", "ends") if on_both_ends else ("tp", "shards")


@torch.no_grad()
def sum_sparse(gradient: Tensor, teams: Sequence[Team]) -> Tensor:
    """The sum of a sparse gradient over the ranks of one team after another: coalesced, and the same on all of them."""
    rows, values = rows_and_values(gradient)
    for team in teams:
        counts = torch.zeros(team.size, dtype=torch.long, device=values.device)
        all_gather_into(counts, counts.new_tensor([len(rows)]), group=team.process_group)
        # All send equally much: what fills up the shorter ones is cut off again.
        num_rows = counts.tolist()
        if not any(num_rows):
            continue
        all_rows = _gather_padded(rows, num_rows, team)
        all_values = _gather_padded(values, num_rows, team)
        total = torch.sparse_coo_tensor(all_rows[None], all_values, gradient.shape, check_invariants=False)
        rows, values = rows_and_values(total)
    return torch.sparse_coo_tensor(
        rows[None], values, gradient.shape, is_coalesced=True, check_invariants=False
    )


def _gather_padded(x: Tensor, counts: list[int], team: Team) -> Tensor:
    """The first `counts[i]` rows of the `i`th rank's, one after the other."""
    longest = max(counts)
    padded = x.new_zeros(longest, *x.shape[1:])
    padded[: len(x)] = x
    gathered = x.new_empty(team.size, longest, *x.shape[1:])
    all_gather_into(gathered.flatten(0, 1), padded, group=team.process_group)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


@torch.no_grad()
def sum_loads(loads: Iterable[Tensor], teams: Sequence[Team]) -> None:
    """Sums how many tokens each expert was given, in place, over teams whose ranks have other tokens: all layers'
    together, once for each team."""
    loads = list(loads)
    if not loads or not teams:
        return
    flat = torch.cat([load.reshape(-1) for load in loads])
    for team in teams:
        dist.all_reduce(flat, group=team.process_group)
    for load, total in zip(loads, flat.split([load.numel() for load in loads]), strict=True):
        load.copy_(total.view_as(load))
