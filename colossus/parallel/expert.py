"""Expert parallelism: each rank of a team has some of the experts; tokens travel to theirs and back (arXiv:2006.16668).

No token is dropped, so how many rows travel is known only when tokens have chosen. Where several ranks share each
expert, they first gather their tokens, and scatter the sums at the end.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from colossus.models import Decoder
from colossus.models.moe import (
    Experts,
    Groups,
    MixtureOfExperts,
    StackedLinear,
    WholeSequences,
    tokens_of_experts,
    unsorted,
)
from colossus.parallel.collectives import Team, all_gather, all_to_all, reduce_scatter, total
from colossus.parallel.given import given
from colossus.parallel.mesh import Mesh


def split_experts(model: Decoder, mesh: Mesh) -> None:
    """Makes mixtures compute with the experts that are here, and balance over whole sequences."""
    ep, expert_tp = mesh.team("ep"), mesh.team("expert_tp")
    sequence_teams = tuple(team for team in (mesh.team("cp"), mesh.team("tp")) if team is not None)
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            if ep is not None or expert_tp is not None:
                module.experts.forward = given(_through_experts, module.experts, ep, expert_tp)
            if expert_tp is not None and module.experts.down.bias is not None:
                down = module.experts.down
                down.forward = given(_with_share_of_bias, down, down.forward, expert_tp.size)
            if sequence_teams:
                module.whole_sequences = _whole_sequences(sequence_teams)


def _whole_sequences(teams: tuple[Team, ...]) -> WholeSequences:
    num_parts = 1
    for team in teams:
        num_parts *= team.size

    def over_all(sums: Tensor) -> Tensor:
        for team in teams:
            sums = total(sums, team)
        return sums

    return WholeSequences(num_parts, over_all)


def _with_share_of_bias(
    down: StackedLinear, forward: Any, num_ranks: int, x: Tensor, groups: Groups
) -> Tensor:
    """The ranks that share an expert add up what they make: each adds its share of the bias."""
    bias, down.bias = down.bias, None
    try:
        made = forward(x, groups)
    finally:
        down.bias = bias
    return made + (bias / num_ranks).to(x.dtype)[groups.experts]


def _through_experts(
    experts: Experts, ep: Team | None, expert_tp: Team | None, x: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """As `Experts.forward`: x (tokens, hidden_size), chosen and weights (tokens, top_k)."""
    x, weights = all_gather(x, 0, expert_tp), all_gather(weights, 0, expert_tp)
    chosen = all_gather(chosen, 0, expert_tp)
    num_here = experts.up.weight.shape[0]
    num_experts = num_here * (1 if ep is None else ep.size)
    numbers, order = chosen.flatten().sort(stable=True)
    rows = x[order // chosen.shape[1]]
    counts = tokens_of_experts(chosen, num_experts)
    if ep is None:
        made = experts.each(rows, Groups(numbers, counts.cumsum(0).int()))
    else:
        made = _travel(experts, ep, rows, counts, num_here)
    back = unsorted(made, order).view(*chosen.shape, -1)
    return reduce_scatter((back * weights[..., None]).sum(1), 0, expert_tp)


@torch.compiler.disable  # how many rows go where is another number in each pass: each would be compiled for
def _travel(experts: Experts, ep: Team, rows: Tensor, counts: Tensor, num_here: int) -> Tensor:
    """rows: sorted by expert, of which each rank of the team has `num_here`; counts: of rows for each expert."""
    # (source, expert here): how many rows come.
    coming = all_to_all(counts, [num_here] * ep.size, [num_here] * ep.size, ep).view(ep.size, num_here)
    sent = _row_counts(counts.view(ep.size, num_here), rows.shape[0])
    received = _row_counts(coming, rows.shape[0])
    arrived = all_to_all(rows, sent, received, ep)
    # They come sorted by source and then by expert; experts want all of theirs together.
    numbers = torch.arange(num_here, device=rows.device).repeat(ep.size)
    of_rows = torch.repeat_interleave(numbers, coming.flatten(), output_size=arrived.shape[0])
    numbers, order = of_rows.sort(stable=True)
    made = experts.each(arrived[order], Groups(numbers, coming.sum(0).cumsum(0).int()))
    return all_to_all(unsorted(made, order), received, sent, ep)


def _row_counts(counts: Tensor, num_rows: int) -> list[int]:
    """Rows to or from each rank, of counts (ranks, experts). Tensors without data are taken for evenly spread."""
    if isinstance(counts, FakeTensor):
        share, rest = divmod(num_rows, counts.shape[0])
        return [share + (rank < rest) for rank in range(counts.shape[0])]
    return counts.sum(1).tolist()
