"""What a search returns beside the plan."""

from dataclasses import dataclass

from colossus.spec.plan import Plan


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A plan on the Pareto front: no other is better in all of these at once."""

    choice: dict[str, int | str]
    """The fields that were chosen: tp, pp, cp, ep, shard, micro-batch, recompute, schedule, precision …"""
    seconds_per_token: float
    memory_headroom_bytes: float
    energy_joules_per_token: float
    cost_usd_per_token: float
    group_ranks: int
    """Ranks of a replica group: what one failure takes away."""


@dataclass(frozen=True, slots=True)
class MixtureGain:
    """What a mixed fleet is worth: seconds per token of the other ways to use it, over the plan's."""

    all_as_weakest: float
    """Every GPU treated as the weakest one: the same micro-batch, count and recompute in all pools."""
    without: dict[str, float]
    """By pool: leaving it out."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and how it was found."""

    plan: Plan
    candidates: int
    feasible: int
    cpu_s: float
    front: tuple[FrontPoint, ...]
    mixture: MixtureGain | None
    """None for a fleet of one pool."""
