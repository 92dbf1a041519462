"""Estimate beside report, field by field: how far a prediction was from what a run measured, and whether it said so.

Every field of the estimate has a row. One that nothing measures says why.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from colossus.observe.report import SETTLING_STEPS, Report
from colossus.spec.plan import Estimate, Plan
from colossus.spec.ranged import Ranged
from colossus.spec.rank import RankPlan
from colossus.units import format_seconds

FOLLOW: Final = ("tokens_per_s", "mfu")
"""Fields that follow from the step time: their gap is the same gap."""
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Gap:
    """One field of an estimate, and what was measured of it."""

    field: str
    estimate: Ranged | None
    """None where it is more than one number."""
    report: Ranged | None
    """Median and spread; None where it is not measured."""
    note: str = ""
    """Why it is not measured, or what to know of the measurement."""

    @property
    def difference(self) -> float | None:
        """Report over estimate, less 1: +0.1 where a step took a tenth longer than was likely."""
        if self.estimate is None or self.report is None or not self.estimate.likely:
            return None
        return self.report.likely / self.estimate.likely - 1.0

    @property
    def within(self) -> bool | None:
        """Whether the median lies in the estimate's interval; None where there is none to lie in."""
        if self.estimate is None or self.report is None or self.estimate.low == self.estimate.high:
            return None
        return self.estimate.low <= self.report.likely <= self.estimate.high


def gaps(plan: Plan, report: Report) -> tuple[Gap, ...]:
    """A row for every field of the plan's estimate, in its order."""
    found = {gap.field: gap for gap in _measured(plan, report)}
    return tuple(found.get(name) or _absent(plan.estimate, name) for name in Estimate.model_fields)


def rank_gaps(plan: RankPlan, report: Report) -> tuple[Gap, ...]:
    """The same for a run of one process, whose estimate has no intervals."""
    estimate, memory = plan.estimate, plan.estimate.memory
    expected, counted = memory.total_bytes, "counted, not measured: it follows from the model"
    if report.device_kind == "cuda":  # what is measured is in tensors
        expected -= memory.baseline_bytes + memory.fragmentation_bytes
    return (
        Gap("memory_bytes", Ranged.exactly(expected), _fullest(report), report.memory_note),
        Gap("flops_per_step", Ranged.exactly(estimate.flops_per_step), None, counted),
        Gap("step_time_s", Ranged.exactly(estimate.step_time_s), report.step_time_s, _unsteady(report)),
    )  # fmt: skip


_NOT_MEASURED: Final[Mapping[str, str]] = {
    "step_parts_s": "a run logs whole steps, not yet their parts",
    "goodput_whole_job": "a run has one policy of recovery: what it came to is in goodput",
    "interruptions_by_cause": "a run logs that a process died, not yet of what",
    "facility_watts": "no power meter is read during a run",
    "energy_mwh": "no power meter is read during a run",
    "water_m3": "no water meter is read during a run",
    "co2_t": "it follows from energy, which is not measured",
    "cost_usd": "no bill is read",
    "cost_owned_usd": "no bill is read",
}


def _absent(estimate: Estimate, name: str) -> Gap:
    value = getattr(estimate, name)
    if isinstance(value, int | float):
        value = Ranged.exactly(value)
    return Gap(
        name,
        value if isinstance(value, Ranged) else None,
        None,
        _NOT_MEASURED.get(name, "a run logs nothing of it"),
    )


def _measured(plan: Plan, report: Report) -> Iterator[Gap]:
    """What a run logs something of."""
    estimate, wall = plan.estimate, report.wall
    yield Gap("step_time_s", estimate.step_time_s, report.step_time_s, _unsteady(report))
    yield Gap("tokens_per_s", estimate.tokens_per_s, report.tokens_per_s, _unsteady(report))
    rate = report.tokens_per_s
    mfu = None if rate is None else rate * (plan.model.flops_per_token(plan.sequence_tokens) / _peak(plan))
    yield Gap("mfu", estimate.mfu, mfu, _unsteady(report))
    over_ranks = "the spread is over its ranks" if len(report.memory_bytes_by_rank) > 1 else ""
    yield Gap("memory_bytes", _memory(plan, report), _fullest(report), report.memory_note or over_ranks)
    if report.num_steps >= plan.num_steps:
        yield Gap("days", estimate.days, Ranged.exactly(wall.total_s / _DAY_S))
    else:
        done = f"{report.num_steps:,} of the plan's {plan.num_steps:,} steps are trained"
        yield Gap("days", estimate.days, None, done)
    goodput = None if wall.goodput is None else Ranged.exactly(wall.goodput)
    note = "evaluations take from it, and the estimate has none" if wall.evaluating_s else ""
    yield Gap("goodput", estimate.goodput, goodput, note if goodput else "no step is done")
    yield _interruptions(estimate, report)
    interval = report.checkpoint_interval_s
    yield Gap(
        "checkpoint_interval_s",
        Ranged.exactly(estimate.checkpoint_interval_s),
        None if interval is None else Ranged.exactly(interval),
        "fewer than two checkpoints came due" if interval is None else "as the run's configuration has it",
    )


def _interruptions(estimate: Estimate, report: Report) -> Gap:
    """A rate is measured once so much time has passed that one interruption was to be expected."""
    name, days = "interruptions_per_day", report.wall.total_s / _DAY_S
    if days * estimate.interruptions_per_day.likely >= 1.0:
        return Gap(name, estimate.interruptions_per_day, Ranged.exactly(report.num_crashes / days))
    expected = f"{1.0 / max(1e-12, estimate.interruptions_per_day.likely):,.0f} days"
    seen = f"{report.num_crashes} in {format_seconds(report.wall.total_s)}"
    return Gap(name, estimate.interruptions_per_day, None, f"{seen}, and one in {expected} is expected")


def _unsteady(report: Report) -> str:
    if report.step_time_s is not None:
        return ""
    return (
        f"none of the {report.num_steps:,} steps counts: each is among the first {SETTLING_STEPS} of a process, "
        f"follows an evaluation, or ran while a checkpoint was written"
    )


def _fullest(report: Report) -> Ranged | None:
    """Of all ranks; the spread is that over them."""
    held = report.memory_bytes_by_rank
    return Ranged(low=min(held), likely=max(held), high=max(held)) if held else None


def _memory(plan: Plan, report: Report) -> Ranged:
    """Of the estimate, what is measured: all of it on a CPU, on a GPU what is in tensors."""
    estimate = plan.estimate.memory_bytes
    if report.device_kind != "cuda":
        return estimate
    held = max(plan.pools, key=lambda share: share.peak_bytes).memory_bytes
    beside = sum(held.get(name, 0) for name in ("context", "communication", "fragmentation"))
    return estimate * (1.0 - beside / estimate.likely)


def _peak(plan: Plan) -> float:
    """FLOP/s of all chips that train, as the plan's fleet has them."""
    chips = {pool.node.name: pool.chip for pool in plan.fleet.pools}
    return sum(
        share.num_groups * plan.layout.group_ranks * chips[share.node].peak_flops[plan.precision]
        for share in plan.pools
    )


def circumstances(plan: Plan, report: Report) -> tuple[str, ...]:
    """What makes a comparison say less of the estimate than it seems to."""
    notes = []
    chips = tuple(dict.fromkeys(pool.chip.name for pool in plan.fleet.pools))
    kinds = {pool.chip.generation for pool in plan.fleet.pools}
    again = (
        "measure this machine (colossus doctor --calibrate --out here.toml) and plan with --fleet here.toml"
    )
    if report.device_kind == "cpu" and kinds != {"cpu"}:
        notes.append(f"The plan is for {' and '.join(chips)}, and the run was trained on a CPU: {again}.")
    elif kinds == {"cpu"} and any(pool.chip.measured is None for pool in plan.fleet.pools):
        notes.append(f"The plan's rates are a catalog's, not this machine's: {again}.")
    for pool in plan.fleet.pools:
        source = pool.chip.measured.source if pool.chip.measured else ""
        away = [host for host in report.hosts if f" {host}," not in source]
        if source and away:
            notes.append(f"The plan's rates were {source}; the run was trained on {', '.join(away)}.")
    return tuple(notes)
