"""How often a run is interrupted, and what share of its time is spent on steps that are kept (goodput, ETTR).

Failures are a Poisson process. Two ways to go on are priced:

* whole job: everything stops, restarts, and goes on from the last checkpoint;
* replica groups: the group that failed leaves, the survivors redo the step and go on without it until it returns.

Both rest on one expression, exact for exponential failures. A job trains `interval` seconds, stands still `stall`
seconds for a checkpoint, and so on; the checkpoint can be loaded `write` seconds later. Failures come at rate λ. By
renewal and reward, look at one failure to the next: training lasts 1/λ on average, and since failure i + 1 finds
checkpoint k durable when it comes later than k (interval + stall) + write, the kept work is interval · Σ_k
exp(−λ (k (interval + stall) + write)). A restart of R seconds that failures interrupt too takes (exp(λR) − 1)/λ (Daly
2006). So

    goodput = λ · interval · exp(−λ (R + write)) / (exp(λ (interval + stall)) − 1)

which lies between 0 and 1 everywhere, and for small losses is the approximation of arXiv:2410.21680, which turns
negative for large ones.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from colossus.errors import ConfigError, did_you_mean
from colossus.planner.run.rates import table
from colossus.spec.base import Frozen
from colossus.spec.fleet import Generation
from colossus.spec.ranged import Ranged

DAY_S = 86_400
CHIPS_OF_A_RATE = 8
"""Published rates are per node, and their nodes have 8 chips."""

Seconds = Annotated[float, Field(ge=0)]


class Failures(Frozen):
    """Unplanned interruptions of a job."""

    per_day: Ranged
    by_cause: dict[str, float]
    """Shares; they sum to 1."""
    stop_every_group: tuple[str, ...] = ()
    """Causes that no replica group survives, such as a bug in the software that all of them run."""
    no_part_breaks: tuple[str, ...] = ()
    """Causes after which the node can be used again at once."""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.per_day.low < 0:
            raise ValueError(f"{self.per_day.low} failures a day; a rate is not negative")
        if not math.isclose(sum(self.by_cause.values()), 1.0, rel_tol=1e-6):
            raise ValueError(f"the shares of the causes sum to {sum(self.by_cause.values()):g}, not 1")
        return self

    @property
    def mtbf_s(self) -> Ranged:
        """Mean time between failures; low where failures are many."""
        if not self.per_day.low:
            raise ConfigError("without failures there is no mean time between them; per_day.low is 0")
        low, likely, high = self.per_day.high, self.per_day.likely, self.per_day.low
        return Ranged(low=DAY_S / low, likely=DAY_S / likely, high=DAY_S / high)

    def interruptions(self, days: float) -> Ranged:
        """How many to expect in a run of `days` wall days."""
        return self.per_day * days

    def share(self, causes: Sequence[str]) -> float:
        """Of all failures, those by one of `causes`."""
        return sum(self.by_cause.get(cause, 0.0) for cause in causes)


class Checkpoints(Frozen):
    """When a job writes its state, and what that costs it."""

    interval_s: Annotated[float, Field(gt=0)]
    """Training between two checkpoints."""
    stall_s: Seconds
    """How long training stands still for each."""
    write_s: Seconds = 0.0
    """From the end of the stall until the checkpoint can be loaded."""

    @model_validator(mode="after")
    def _one_at_a_time(self) -> Self:
        if self.write_s > self.interval_s:
            raise ValueError(
                f"a checkpoint takes {self.write_s:g} s to write, and the next begins after {self.interval_s:g} s; "
                f"checkpoint at most every {self.write_s:g} s"
            )
        return self


class Goodput(Frozen):
    """The share of wall time spent on steps that were kept, and where the rest of it likely goes."""

    share: Ranged
    lost: dict[str, float]
    """Shares of wall time at the likely values; with `share.likely` they sum to 1."""


def failures(generation: Generation, num_chips: int, causes: str = "llama3") -> Failures:
    """Of a job on `num_chips` chips, by published rates; `causes` names the study that they are divided by.

    Meant for some thousand chips and more; jobs of a few nodes are interrupted more often than in proportion.
    """
    if num_chips < 1:
        raise ConfigError(f"{num_chips} chips; a job has at least one")
    rates, studies = table("failures")["per_1000_node_days"], table("failures")["causes"]
    if causes not in studies:
        raise ConfigError(f"no table of causes is called {causes!r}.{did_you_mean(causes, studies)}")
    study, rate = studies[causes], rates[generation]
    total = sum(study["counts"].values())
    per_1000_node_days = Ranged(low=rate["low"], likely=rate["likely"], high=rate["high"])
    return Failures(
        per_day=per_1000_node_days * (num_chips / CHIPS_OF_A_RATE / 1000),
        by_cause={cause: count / total for cause, count in study["counts"].items()},
        stop_every_group=tuple(study["stop_every_group"]),
        no_part_breaks=tuple(study["no_part_breaks"]),
    )


def together(parts: Sequence[Failures]) -> Failures:
    """Of a job on several pools: rates add up, causes in proportion to the likely rates."""
    if not parts:
        raise ConfigError("a job on no pool at all has no failure rate; name at least one pool")
    total = sum((part.per_day for part in parts[1:]), start=parts[0].per_day)
    weights = [part.per_day.likely / total.likely if total.likely else 1 / len(parts) for part in parts]
    by_cause: dict[str, float] = {}
    for part, weight in zip(parts, weights, strict=True):
        for cause, share in part.by_cause.items():
            by_cause[cause] = by_cause.get(cause, 0.0) + weight * share
    return Failures(
        per_day=total,
        by_cause=by_cause,
        stop_every_group=tuple(dict.fromkeys(c for part in parts for c in part.stop_every_group)),
        no_part_breaks=tuple(dict.fromkeys(c for part in parts for c in part.no_part_breaks)),
    )


@cache
def published(name: str) -> Ranged:
    """How long things take, as published: `restart_s`, `replica_stall_s`, `replica_absence_s`, `repair_days`."""
    known = table("failures")["durations"]
    if name not in known:
        raise ConfigError(f"no duration is called {name!r}.{did_you_mean(name, known)}")
    return Ranged(low=known[name]["low"], likely=known[name]["likely"], high=known[name]["high"])


def best_interval_s(mtbf_s: float, stall_s: float, shortest_s: float) -> float:
    """The checkpoint interval of the highest goodput, but at least `shortest_s` (a step, or what a write takes).

    It solves 1 − λ·interval = exp(−λ (interval + stall)), the exact condition; Young's √(2 · stall · MTBF) is its limit
    for small stalls. How long a restart takes does not matter to it.
    """
    if not (mtbf_s > 0 and shortest_s > 0 and stall_s >= 0):
        raise ConfigError(
            f"no checkpoint interval for failures every {mtbf_s:g} s, stalls of {stall_s:g} s and a shortest interval "
            f"of {shortest_s:g} s; the first and the last must be positive, the stall not negative"
        )
    stall = stall_s / mtbf_s
    low, high = 0.0, 1.0  # of λ·interval
    for _ in range(100):
        middle = (low + high) / 2
        # expm1, as both sides are close to 1 for small stalls.
        if -math.expm1(-(middle + stall)) > middle:
            low = middle
        else:
            high = middle
    return max(shortest_s, low * mtbf_s)


def whole_job_goodput(failures: Failures, restart_s: Ranged, checkpoints: Checkpoints) -> Goodput:
    """Every failure stops the whole job, which restarts and loads its last checkpoint."""
    ends = [_kept(rate / DAY_S, restart, checkpoints) for rate, restart in _ends(failures.per_day, restart_s)]
    likely = ends[1]
    return Goodput(
        share=_shares([end.kept for end in ends]),
        lost={
            "restart": likely.restart,
            "work done again": likely.again,
            "checkpoint stalls": likely.stalled,
        },
    )


def replica_goodput(
    failures: Failures, num_groups: int, step_s: float, stall_s: Ranged, absence_s: Ranged, restart_s: Ranged,
    checkpoints: Checkpoints, missing_groups: float = 0.0,
) -> Goodput:  # fmt: skip
    """A failure stops one of `num_groups` replica groups; those by `failures.stop_every_group` stop the whole job.

    The survivors stand still for `stall_s`, redo the step, and go on without the group for `absence_s` more.
    `missing_groups` are away all the time, for want of spares (`expected_missing_groups`). Checkpoints serve those
    that stop the whole job only, so that they can be rarer. Losses to different causes are taken as independent.
    """
    if num_groups < 2:
        raise ConfigError(
            f"{num_groups} replica group leaves no survivors; take 2 or more groups, or restart the whole job"
        )
    if not (step_s > 0 and 0 <= missing_groups < num_groups):
        raise ConfigError(
            f"steps of {step_s:g} s with {missing_groups:g} of {num_groups} groups missing; a step takes time and at "
            f"least one group must be there"
        )
    shared = failures.share(failures.stop_every_group)
    every_step = Checkpoints(interval_s=step_s, stall_s=0.0)  # what the survivors hold
    kept: list[float] = []
    lost: list[dict[str, float]] = []
    for (rate, restart), (_, stall), (_, absence) in zip(
        _ends(failures.per_day, restart_s), _ends(failures.per_day, stall_s),
        _ends(failures.per_day, absence_s), strict=True,
    ):  # fmt: skip
        whole = _kept(shared * rate / DAY_S, restart, checkpoints)
        group_rate = (1 - shared) * rate / DAY_S
        # A group is up 1/λ_g, then away for what its own failures make of `absence`: present exp(−λ_g · absence).
        present = math.exp(-group_rate / num_groups * absence) * (1 - missing_groups / num_groups)
        alone = _kept(group_rate * present, stall, every_step)
        kept.append(whole.kept * alone.kept * present)
        lost.append({
            "restart": whole.restart,
            "work done again": whole.again + whole.kept * alone.again,
            "checkpoint stalls": whole.stalled,
            "quorum stalls": whole.kept * alone.restart,
            "absent groups": whole.kept * alone.kept * (1 - present),
        })  # fmt: skip
    return Goodput(share=_shares(kept), lost=lost[1])


def nodes_in_repair(failures: Failures, repair_days: Ranged) -> Ranged:
    """Nodes that are out on average: failures that break a part, times how long a repair takes (Little's law)."""
    return failures.per_day * (1 - failures.share(failures.no_part_breaks)) * repair_days


def num_spares(in_repair: float, confidence: float) -> int:
    """The fewest spare nodes that are enough, at any moment, with probability `confidence`.

    With Poisson failures the nodes in repair are Poisson too, however repair times are distributed (M/G/∞).
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"a confidence of {confidence:g}; it lies between 0 and 1, for example 0.99")
    return int(np.searchsorted(np.cumsum(_poisson(in_repair)), confidence))


def expected_missing_groups(in_repair: float, spares: int, nodes_per_group: int) -> float:
    """Replica groups that are away for want of nodes: E[⌈max(0, nodes in repair − spares) / nodes per group⌉].

    A group that lacks a node lends its others to the next one that does.
    """
    if spares < 0 or nodes_per_group < 1:
        raise ConfigError(
            f"{spares} spares for groups of {nodes_per_group} nodes; spares are at least 0, a group at least 1"
        )
    probabilities = _poisson(in_repair)
    short = np.maximum(0, np.arange(len(probabilities)) - spares)
    return float(probabilities @ np.ceil(short / nodes_per_group))


def straggler_slowdown(num_nodes: int, slow_share: float, slowdown: float) -> float:
    """How much longer a synchronous step takes on average when each node is slow by chance and by as much.

    All wait for one, so `slowdown` times the chance of at least one slow node: of some thousand nodes, always.
    """
    if num_nodes < 1 or not 0 <= slow_share <= 1 or slowdown < 0:
        raise ConfigError(
            f"{num_nodes} nodes of which a share of {slow_share:g} is slower by {slowdown:g}; that takes 1 node or "
            f"more, a share from 0 to 1, and a slowdown of 0 or more"
        )
    return slowdown * (1 - (1 - slow_share) ** num_nodes)


def _poisson(mean: float) -> np.ndarray:
    """Probabilities of 0, 1, 2, … [as many as matter]."""
    if not (mean >= 0 and math.isfinite(mean)):
        raise ConfigError(f"{mean:g} nodes in repair on average; that must be 0 or more, and finite")
    count = np.arange(int(mean + 12 * math.sqrt(mean) + 40))
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(count[1:]))])
    log_mean = math.log(mean) if mean else -math.inf
    with np.errstate(invalid="ignore"):
        log_probability = np.where(count == 0, -mean, count * log_mean - mean - log_factorial)
    return np.exp(log_probability)


class _Kept(Frozen):
    """Shares of wall time; they sum to 1."""

    kept: float
    restart: float
    again: float
    stalled: float


def _kept(rate: float, restart_s: float, checkpoints: Checkpoints) -> _Kept:
    """The module's expression, for `rate` failures per second."""
    interval, stall = checkpoints.interval_s, checkpoints.stall_s
    x = rate * (interval + stall)
    # x / (exp(x) − 1), without overflow for large x and without 0/0.
    durable = x * math.exp(-x) / -math.expm1(-x) if x > 0 else 1.0
    up = math.exp(-rate * restart_s)
    kept = up * math.exp(-rate * checkpoints.write_s) * durable * interval / (interval + stall)
    stalled = kept * stall / interval
    return _Kept(kept=kept, restart=1 - up, again=max(0.0, up - kept - stalled), stalled=stalled)


def _ends(per_day: Ranged, seconds: Ranged) -> list[tuple[float, float]]:
    """(rate, duration) with least, likely and most loss."""
    return [
        (per_day.low, seconds.low),
        (per_day.likely, seconds.likely),
        (per_day.high, seconds.high),
    ]


def _shares(least_loss_first: list[float]) -> Ranged:
    high, likely, low = least_loss_first
    # Equal ends may differ in the last digit.
    return Ranged(low=min(low, likely), likely=likely, high=max(high, likely))
