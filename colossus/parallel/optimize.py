"""Optimizing what many ranks hold parts of: whole matrices for Muon, the gradient's norm, sums of sparse gradients and
of experts' loads. All else that optimizers do is element by element, and needs nobody else."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colossus.optim.muon import Orthogonalise, Piece, Round
from colossus.optim.row_adagrad import rows_and_values
from colossus.parallel.collectives import Team, all_gather_into
from colossus.parallel.mesh import Mesh
from colossus.spec.layout import Group
from colossus.spec.matrices import ROUND_ELEMENTS, Dealt, Split, deal_out
from colossus.spec.sharding import Placement

# --- Muon: parts come together as whole matrices, and directions go back ---


class MatrixRounds:
    """Muon's matrices, each on the rank that `spec/matrices.py` deals it to.

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
        dealt = deal_out(
            [self._placements[parameter] for parameter in parameters],
            [parameter.shape[0] if parameter.dim() == 3 else 1 for parameter in parameters],
            self._mesh.mates,
            round_elements=self._round_elements,
        )
        for one in dealt:
            teams = tuple(team for group in one.groups if (team := self._mesh.team(group)) is not None)
            yield TeamRound(one, parameters, teams)


@dataclass(frozen=True)
class TeamRound:
    """A round of matrices, and the teams that exchange their parts."""

    dealt: Dealt
    parameters: Sequence[Tensor]
    teams: tuple[Team, ...]

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        pieces: list[Piece] = []
        for matrix, _ in self.dealt.owned:
            parameter = self.parameters[matrix.parameter]
            last = pieces[-1] if pieces else None
            if last is not None and last.parameter is parameter and last.end == matrix.number:
                pieces[-1] = last._replace(end=matrix.number + 1)
            else:
                pieces.append(Piece(parameter, matrix.number, matrix.number + 1, matrix.shape))
        return tuple(pieces)

    def directions(self, updates: Iterator[Tensor], orthogonalise: Orthogonalise) -> Sequence[Tensor]:
        parts = [part for update in updates for part in update]
        like = parts[0].new_empty(0)
        levels = range(len(self.teams))
        # What is here of each matrix, by its number: at first of all, at last of those that are whole here.
        held = {i: part for i, part in enumerate(parts) if self.dealt.is_needed(i)}
        del parts
        for level in reversed(levels):
            held = self._gather(level, held, like)
        held = _orthogonalise_by_shape(held, orthogonalise)
        for level in levels:
            held = self._scatter(level, held, like)
        return self._joined(held)

    def _gather(self, level: int, held: dict[int, Tensor], like: Tensor) -> dict[int, Tensor]:
        """From parts to what they make together, on the rank of the team that owns it."""
        team, traffic = self.teams[level], self.dealt.gather(level)
        received: list[Iterator[Tensor]] = []
        if traffic is not None:
            received = _exchange(
                [[held[i] for i in to] for to in traffic.outgoing],
                [
                    [self.dealt.split(i, level)[0].shape(sender) for i in come]
                    for sender, come in enumerate(traffic.incoming)
                ],
                team,
                like,
            )
        made = {}
        for i, part in held.items():
            split, owner = self.dealt.split(i, level)
            if owner == team.place:
                parts = [
                    part if sender == owner else next(received[sender]) for sender in split.senders(owner)
                ]
                made[i] = torch.cat(parts, split.dim) if len(parts) > 1 else part
        return made

    def _scatter(self, level: int, held: dict[int, Tensor], like: Tensor) -> dict[int, Tensor]:
        """From what this rank owns to the parts that each rank of the team holds, copies among them."""
        team, traffic = self.teams[level], self.dealt.scatter(level)
        if traffic is None:
            return {}
        received = _exchange(
            [
                [_part_of(held[i], self.dealt.split(i, level)[0], place) for i in to]
                for place, to in enumerate(traffic.outgoing)
            ],
            [[self.dealt.split(i, level)[0].shape(team.place) for i in come] for come in traffic.incoming],
            team,
            like,
        )
        made = {}
        for i in self.dealt.concerned(level):
            split, owner = self.dealt.split(i, level)
            made[i] = _part_of(held[i], split, owner) if owner == team.place else next(received[owner])
        return made

    def _joined(self, directions: dict[int, Tensor]) -> list[Tensor]:
        """Of each piece: those of its matrices."""
        joined, start = [], 0
        for piece in self.pieces:
            count = piece.end - piece.first
            joined.append(torch.stack([directions[i] for i in range(start, start + count)]))
            start += count
        return joined


def _part_of(whole: Tensor, split: Split, place: int) -> Tensor:
    """The part that a rank holds."""
    return whole.narrow(split.dim, split.start(place), split.sizes[split.part(place)])


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
