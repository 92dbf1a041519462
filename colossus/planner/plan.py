"""From a model, a fleet and a goal to the best plan, with its reasons."""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from typing import Any

import numpy as np

from colossus.errors import ConfigError
from colossus.planner.estimate.execution import RECOMPUTE, SHARDING
from colossus.planner.estimate.memory import memory_parts
from colossus.planner.estimate.shape import ModelShape
from colossus.planner.estimate.step import StepParts, stage_layers
from colossus.planner.explain.reasons import advice, reasons
from colossus.planner.result import FrontPoint, MixtureGain, Planned
from colossus.planner.run import power, price, reliability, scaling_law, spares
from colossus.planner.run.account import account
from colossus.planner.schedule.order import SCHEDULES
from colossus.planner.search.best import (
    FRONT_SLACK,
    Bounds,
    Candidates,
    Evaluated,
    Problem,
    Search,
    choose,
    execution,
    in_flight_ratio,
    limit_bytes,
)
from colossus.planner.search.infeasible import explain_infeasible
from colossus.planner.search.space import PRECISIONS, Layouts, layouts, options
from colossus.spec.fleet import Fleet, Pool
from colossus.spec.goal import Goal
from colossus.spec.model import ModelSpec
from colossus.spec.plan import Alternative, Layout, Plan, PoolShare

LARGEST_PUBLISHED_BATCH_TOKENS = 15_360 * 4096
"""DeepSeek-V3 (arXiv:2412.19437); Llama 3.1 405B used 16M."""
LEAST_STEPS = 2000
"""A run of fewer steps has hardly a learning-rate schedule: the default batch leaves at least so many."""
USUAL_SEQUENCE_TOKENS = 8192


def make_plan(
    model: ModelSpec,
    fleet: Fleet,
    goal: Goal,
    *,
    sequence_tokens: int | None = None,
    today: date | None = None,
) -> Planned:
    """The best plan for `goal`. Raises ConfigError, with what binds and what would help, where there is none."""
    started = time.process_time()
    fleet.check()
    today = today or date.today()
    sequence = sequence_tokens or min(model.context_tokens, USUAL_SEQUENCE_TOKENS)
    if sequence > model.context_tokens:
        raise ConfigError(
            f"sequences of {sequence:,} tokens are longer than the context of {model.name}, {model.context_tokens:,}"
        )
    tokens = goal.tokens or math.ceil(
        scaling_law.tokens_for_loss(model.num_params(), goal.loss or 0.0).likely
    )
    sequences = largest_batch(goal, tokens, sequence)
    usable = [pool for pool in _within_power(fleet, goal) if pool.num_nodes > 0]
    ready = {pool.node.name: spares.num_spare_nodes(pool) for pool in usable}
    pools = [
        pool.model_copy(update={"num_nodes": pool.num_nodes - ready[pool.node.name]})
        for pool in usable
        if pool.num_nodes > ready[pool.node.name]
    ]
    task = _Task(model, ModelShape.of(model), fleet, goal, tokens, sequence, sequences, tuple(pools), today)
    whole = _try(task, tuple(pools))
    tried = [whole, *(_try(task, some, of=whole) for some in _subsets(pools)[1:])]
    best = min((t for t in tried if t.picked is not None), key=lambda t: t.objective, default=None)
    if best is None:
        if whole.problem is None or whole.search is None or whole.failure is not None:
            raise whole.failure or ConfigError(f"no plan for {model.name} on fleet {fleet.name}")
        raise ConfigError(
            explain_infeasible(model, pools, goal, sequence, sequences, whole.problem, whole.search)
        )
    plan = _plan(task, best, ready)
    plan = plan.model_copy(update={"alternatives": _alternatives(task, best)})
    plan = plan.model_copy(update={"reasons": reasons(plan)})
    mixture = _mixture(task, best, tried) if len(pools) > 1 else None
    plan = plan.model_copy(update={"advice": advice(plan, mixture, today=today)})
    return Planned(
        plan=Plan.model_validate(dict(plan)),
        candidates=sum(t.search.num_candidates for t in tried if t.search is not None),
        feasible=sum(len(t.search.bound) for t in tried if t.search is not None),
        cpu_s=time.process_time() - started,
        front=_front(task, best),
        mixture=mixture,
    )


def largest_batch(goal: Goal, tokens: int, sequence: int) -> int:
    """Sequences of the largest batch: as asked, or the largest published, but not so large that few steps remain."""
    if goal.max_global_batch_sequences is not None:
        return goal.max_global_batch_sequences
    return max(1, int(min(LARGEST_PUBLISHED_BATCH_TOKENS, tokens / LEAST_STEPS) // sequence))


@dataclass(frozen=True)
class _Task:
    """What is planned."""

    model: ModelSpec
    shape: ModelShape
    fleet: Fleet
    goal: Goal
    tokens: int
    sequence: int
    sequences: int
    pools: tuple[Pool, ...]
    today: date

    def problem(self, pools: Sequence[Pool]) -> Problem:
        return Problem(
            shape=self.shape,
            pools=pools,
            sequence=self.sequence,
            sequences=self.sequences,
            layouts=layouts(self.model, pools, self.goal, self.sequence, self.sequences),
            options=options(self.goal, self.sequences),
            fabric=self.fleet.fabric,
            chip_rates=[self.chip_rate(pool) for pool in pools],
            failures_per_chip_s=[
                reliability.failures(pool.chip.generation, pool.num_chips).per_day.likely
                / pool.num_chips
                / reliability.DAY_S
                for pool in pools
            ],
            absence_s=reliability.published("replica_absence_s").likely,
        )

    def chip_rate(self, pool: Pool) -> float:
        """What a chip-hour counts for in the objective; 0 where only time counts."""
        if self.goal.objective == "cost":
            return self.usd_per_chip_hour(pool)
        return self.watts_per_chip(pool) if self.goal.objective == "energy" else 0.0

    def usd_per_chip_hour(self, pool: Pool) -> float:
        try:
            return price.rent(pool.chip.name, self.today).usd_per_chip_hour.likely
        except ConfigError:
            return price.owned_chip_hour(pool.node, self.fleet.site, 0.9).total.likely

    def watts_per_chip(self, pool: Pool) -> float:
        return (power.drawn_watts_per_chip(pool.node, 0.9) * self.fleet.site.pue).likely


def _within_power(fleet: Fleet, goal: Goal) -> list[Pool]:
    """The fleet's pools, cut down in proportion to what the power limit of the goal can feed."""
    if goal.max_power_watts is None:
        return list(fleet.pools)
    needed = fleet.site.pue.likely * sum(
        pool.num_chips * power.rated_watts_per_chip(pool.node) for pool in fleet.pools
    )
    share = min(1.0, goal.max_power_watts / needed)
    pools = [pool.model_copy(update={"num_nodes": int(pool.num_nodes * share)}) for pool in fleet.pools]
    if not any(pool.num_nodes for pool in pools):
        least = min(
            power.rated_watts_per_chip(pool.node) * pool.node.num_chips * fleet.site.pue.likely
            for pool in fleet.pools
        )
        raise ConfigError(
            f"{goal.max_power_watts / 1e3:,.1f} kW feed no node of fleet {fleet.name}: the smallest takes "
            f"{least / 1e3:,.1f} kW with cooling"
        )
    return pools


# --- the choice ---


def _kept(task: _Task, search: Search) -> Evaluated:
    """What was evaluated and keeps the goal's limits."""
    goal = task.goal
    if goal.deadline_days is None and goal.budget_usd is None:
        return search.best(slack=FRONT_SLACK)
    layouts_, found = search.problem.layouts, []
    for part in np.unique(layouts_.part):
        here = layouts_.part[search.candidates.layout] == part
        found.append(search.best(here, slack=1.05))
    evaluated = Evaluated.joined(found)
    days = evaluated.seconds_per_token * task.tokens / spares.LIKELY_GOODPUT / 86_400
    chips = _chips(search.problem, evaluated)
    dollars = days * 24 * (chips @ np.array([task.usd_per_chip_hour(pool) for pool in search.problem.pools]))
    keeps = np.ones(len(days), dtype=bool)
    if goal.deadline_days is not None:
        keeps &= days <= goal.deadline_days
    if goal.budget_usd is not None:
        keeps &= dollars <= goal.budget_usd
    if not keeps.any():
        fastest, cheapest = int(np.argmin(days)), int(np.argmin(dollars))
        raise ConfigError(
            f"no plan keeps the limits of the goal: the fastest takes {days[fastest]:,.1f} days"
            + (f" (deadline {goal.deadline_days:g})" if goal.deadline_days is not None else "")
            + f" and {dollars[fastest]:,.0f} USD, the cheapest {dollars[cheapest]:,.0f} USD"
            + (f" (budget {goal.budget_usd:,.0f})" if goal.budget_usd is not None else "")
            + f" and {days[cheapest]:,.1f} days; fewer tokens than {task.tokens:.3g}, a smaller model or a larger "
            "fleet would help"
        )
    return evaluated.take(keeps)


def _chips(problem: Problem, found: Evaluated) -> np.ndarray[Any, Any]:
    """Chips that work [n, pools]."""
    return found.groups * problem.layouts.group_ranks[found.candidates.layout][:, None]


CHOICES = (
    "tp", "pp", "cp", "ep", "expert_tp", "shard", "sharding", "schedule", "virtual_stages", "precision",
    "micro_batch", "recompute",
)  # fmt: skip


def _column(search: Search, candidates: Candidates, name: str) -> np.ndarray[Any, Any]:
    """One choice of each candidate, as a number; of a mixed fleet the first pool's."""
    rows, choice = search.problem.layouts, search.problem.options
    if name in ("micro_batch", "recompute"):
        return np.asarray(getattr(choice, name)[candidates.option[:, 0]])
    return np.asarray(getattr(rows, {"virtual_stages": "chunks"}.get(name, name))[candidates.layout])


def _word(name: str, number: float) -> str:
    words: dict[str, Sequence[str]] = {
        "sharding": SHARDING, "schedule": SCHEDULES, "precision": PRECISIONS, "recompute": RECOMPUTE,
    }  # fmt: skip
    return words[name][int(number)] if name in words else str(int(number))


@dataclass(frozen=True)
class _Try:
    """The search over some of the pools, and the best it found."""

    pools: tuple[Pool, ...]
    problem: Problem | None = None
    search: Search | None = None
    found: Evaluated | None = None
    picked: tuple[int, float, float, StepParts] | None = None
    """Row, objective, step seconds, parts."""
    failure: ConfigError | None = None

    @property
    def objective(self) -> float:
        return math.inf if self.picked is None else self.picked[1]


def _subsets(pools: Sequence[Pool]) -> list[tuple[Pool, ...]]:
    """All pools, then each fewer: the best plan may leave a pool out."""
    return [some for size in range(len(pools), 0, -1) for some in itertools.combinations(pools, size)]


def _try(task: _Task, pools: tuple[Pool, ...], *, of: "_Try | None" = None) -> _Try:
    """The search over `pools`; what a search over more of them, `of`, has computed is used again where it holds."""
    try:
        if of is not None and of.search is not None and of.problem is not None and _same_nodes(of.pools):
            places = [of.pools.index(pool) for pool in pools]
            problem = replace(
                of.problem,
                pools=pools,
                chip_rates=[of.problem.chip_rates[i] for i in places],
                failures_per_chip_s=[of.problem.failures_per_chip_s[i] for i in places],
            )
            search = Search(problem, of.search.peaks, [of.search.bounds[i] for i in places])
        else:
            problem = task.problem(pools)
            search = Search(problem)
        if not len(search.bound):
            return _Try(pools, problem, search)
        found = _kept(task, search)
    except ConfigError as failure:
        return _Try(pools, failure=failure)
    return _Try(pools, problem, search, found, choose(problem, search, found))


def _same_nodes(pools: Sequence[Pool]) -> bool:
    """Whether the space of layouts does not depend on which of the pools are used."""
    kinds = {
        (pool.node.num_chips, pool.node.scale_up_chips, tuple(sorted(pool.chip.peak_flops))) for pool in pools
    }
    return len(kinds) == 1


def _alternatives(task: _Task, best: _Try) -> dict[str, Alternative]:
    """For each choice the best plan in which it is another."""
    search, found = best.search, best.found
    assert search is not None
    assert found is not None
    assert best.picked is not None
    result = {}
    mine = found.take(np.array([best.picked[0]]))
    for name in CHOICES:
        if name in task.goal.fixed:
            continue
        column = _column(search, search.candidates, name)
        other = search.best(column != _column(search, mine.candidates, name)[0], at_once=1024)
        picked = choose(search.problem, search, other, most=20)
        if picked is not None:
            value = _column(search, other.candidates.take(np.array([picked[0]])), name)[0]
            result[name] = Alternative(
                value=_word(name, float(value)), step_time_ratio=picked[1] / best.objective
            )
    return result


def _mixture(task: _Task, best: _Try, tried: Sequence[_Try]) -> MixtureGain:
    """What the other ways to use a mixed fleet would take, over the plan."""
    chips = [pool.chip for pool in task.pools]
    weakest = {
        "memory_bytes": min(chip.memory_bytes for chip in chips),
        "memory_bandwidth": min(chip.memory_bandwidth for chip in chips),
        "peak_flops": {
            name: min(chip.peak_flops[name] for chip in chips)
            for name in chips[0].peak_flops
            if all(name in chip.peak_flops for chip in chips)
        },
    }
    alike = tuple(
        pool.model_copy(
            update={"node": pool.node.model_copy(update={"chip": pool.chip.model_copy(update=weakest)})}
        )
        for pool in task.pools
    )
    without = {
        pool.node.name: next(
            t.objective for t in tried if t.pools == tuple(p for p in task.pools if p is not pool)
        )
        / best.objective
        for pool in task.pools
    }
    problem = replace(tried[0].problem or task.problem(task.pools), pools=alike, all_alike=True)
    weak = _weak_search(problem, tried[0])
    picked = choose(problem, weak, weak.best()) if len(weak.bound) else None
    return MixtureGain(
        all_as_weakest=(picked[1] if picked is not None else math.inf) / best.objective, without=without
    )


def _weak_search(problem: Problem, whole: _Try) -> Search:
    """Of pools made alike; one that is so already needs no new bounds."""
    if whole.search is None:
        return Search(problem)

    def numbers(pool: Pool) -> tuple[object, ...]:
        node, chip = pool.node, pool.chip
        return (
            sorted(chip.peak_flops.items()), chip.memory_bytes, chip.memory_bandwidth, chip.num_cores, chip.power_watts,
            node.scale_up_chips, node.scale_up_bandwidth, node.nic_bandwidth,
        )  # fmt: skip

    known = [
        next(
            (
                bound
                for bound, own in zip(whole.search.bounds, whole.pools, strict=True)
                if numbers(own) == numbers(pool)
            ),
            None,
        )
        for pool in problem.pools
    ]
    computed = [
        bound or Bounds.compute(problem, pool) for bound, pool in zip(known, problem.pools, strict=True)
    ]
    return Search(problem, whole.search.peaks, computed)


def _front(task: _Task, best: _Try) -> tuple[FrontPoint, ...]:
    """Candidates that no other beats in time, memory, energy, cost and size of a replica group at once."""
    problem, found = best.problem, best.found
    assert problem is not None
    assert found is not None
    chips = _chips(problem, found)
    watts = chips @ np.array([task.watts_per_chip(pool) for pool in problem.pools])
    dollars = chips @ np.array([task.usd_per_chip_hour(pool) / 3600 for pool in problem.pools])
    ranks = problem.layouts.group_ranks[found.candidates.layout]
    losses = np.stack(
        [
            np.round(np.log(found.seconds_per_token) / 0.002),  # differences of 0.2 % are none
            -np.floor(found.headroom_bytes / 2**30),
            np.round(np.log(found.seconds_per_token * watts) / 0.002),
            np.round(np.log(found.seconds_per_token * dollars) / 0.002),
            ranks,
        ],
        axis=1,
    )
    finite = np.flatnonzero(np.isfinite(losses).all(axis=1))
    order = finite[np.lexsort(losses[finite].T[::-1])]
    front: list[int] = []
    for row in order:
        better = losses[front] if front else np.empty((0, losses.shape[1]))
        if not np.any(np.all(better <= losses[row], axis=1)):
            front.append(int(row))
        if len(front) >= MOST_ON_FRONT:
            break
    search_columns = problem.layouts
    points = []
    for row in front:
        layout, option = found.candidates.layout[row], found.candidates.option[row]
        choice: dict[str, int | str] = {}
        for name in CHOICES:
            if name in ("micro_batch", "recompute"):
                values = [_word(name, float(getattr(problem.options, name)[i])) for i in option]
                choice[name] = values[0] if len(set(values)) == 1 else " + ".join(values)
            else:
                number = float(getattr(search_columns, {"virtual_stages": "chunks"}.get(name, name))[layout])
                word = _word(name, number)
                choice[name] = int(word) if word.isdigit() else word
        points.append(
            FrontPoint(
                choice=choice,
                seconds_per_token=float(found.seconds_per_token[row]),
                memory_headroom_bytes=float(found.headroom_bytes[row]),
                energy_joules_per_token=float(found.seconds_per_token[row] * watts[row]),
                cost_usd_per_token=float(found.seconds_per_token[row] * dollars[row]),
                group_ranks=int(ranks[row]),
            )
        )
    return tuple(points)


MOST_ON_FRONT = 60


# --- the plan ---


def _plan(task: _Task, best: _Try, ready: dict[str, int]) -> Plan:
    problem, found = best.problem, best.found
    assert problem is not None
    assert found is not None
    assert best.picked is not None
    row, _, _, parts = best.picked
    layout = problem.layouts.take(found.candidates.layout[[row]])
    groups, counts = found.groups[row], found.micro_batches[row]
    stage = _stage_layers(task.shape, layout)
    shares = []
    for i, pool in enumerate(problem.pools):
        if groups[i] == 0:
            continue
        option = int(found.candidates.option[row, i])
        memory = _memory(problem, layout, option, counts[i])
        shares.append(
            PoolShare(
                node=pool.node.name,
                num_groups=int(groups[i]),
                micro_batch_sequences=int(problem.options.micro_batch[option]),
                num_micro_batches=int(counts[i]),
                recompute=RECOMPUTE[int(problem.options.recompute[option])],
                spare_nodes=ready[pool.node.name],
                idle_chips=int(pool.num_chips - groups[i] * layout.group_ranks[0]),
                busy_s=float(found.busy_s[row, i]),
                memory_bytes=memory,
                memory_limit_bytes=int(limit_bytes(pool)),
            )
        )
    axes = {name: int(getattr(layout, name)[0]) for name in ("tp", "pp", "cp", "ep", "shard")}
    step_s = float(parts.total_s[0])
    tokens = int(
        sum(s.num_groups * axes["shard"] * s.micro_batch_sequences * s.num_micro_batches for s in shares)
        * task.sequence
    )
    return Plan.model_construct(
        model=task.model,
        fleet=task.fleet,
        goal=task.goal,
        tokens=task.tokens,
        sequence_tokens=task.sequence,
        precision=PRECISIONS[int(layout.precision[0])],
        layout=Layout(replica=int(groups.sum()), **axes),
        expert_tp=int(layout.expert_tp[0]),
        sharding=SHARDING[int(layout.sharding[0])],
        schedule=SCHEDULES[int(layout.schedule[0])],
        virtual_stages=int(layout.chunks[0]),
        stage_layers=stage,
        pools=tuple(shares),
        estimate=account(
            task.model, task.fleet, problem.pools, shares, axes, parts, step_s, tokens, task.tokens, task.sequence,
            PRECISIONS[int(layout.precision[0])], task.today,
        ),
        reasons={},
        alternatives={},
        advice=(),
    )  # fmt: skip


def _stage_layers(shape: ModelShape, layout: Layouts) -> tuple[int, ...]:
    most, first, last = (int(a[0]) for a in stage_layers(shape.layers, layout.pp, layout.chunks))
    stages = int(layout.pp[0])
    return (last,) if stages == 1 else (first, *[most] * (stages - 2), last)


def _memory(problem: Problem, layout: Layouts, option: int, micro_batches: float) -> dict[str, int]:
    one = np.ones(1)
    choice = problem.options
    x = execution(
        problem,
        layout,
        one * choice.micro_batch[option],
        one * choice.recompute[option],
        one,
        one * micro_batches,
    )
    parts = memory_parts(problem.shape, x)
    held = {f.name.removesuffix("_bytes"): float(getattr(parts, f.name)[0]) for f in fields(parts)}
    held["activations"] *= float(in_flight_ratio(x, layout.schedule)[0])
    held.pop("fragmentation", None)  # what the allocator caches it gives back before it fails
    return {name: int(size) for name, size in held.items()}
