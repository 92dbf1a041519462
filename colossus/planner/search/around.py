"""What lies around the best plan: the next-best of every choice, other ways to use a mixed fleet, the Pareto front."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from colossus.planner.estimate.columns import Array
from colossus.planner.estimate.execution import RECOMPUTE, SHARDING
from colossus.planner.result import FrontPoint, MixtureGain
from colossus.planner.schedule.order import SCHEDULES
from colossus.planner.search import exact
from colossus.planner.search.best import Candidates, Search
from colossus.planner.search.bounds import Bounds, Problem
from colossus.planner.search.fleet import Solved, Task, chips, names
from colossus.planner.search.refine import choose
from colossus.planner.search.space import PRECISIONS
from colossus.spec.fleet import Pool
from colossus.spec.plan import Alternative

CHOICES = (
    "tp", "pp", "cp", "ep", "expert_tp", "shard", "sharding", "schedule", "virtual_stages", "precision",
    "micro_batch", "recompute",
)  # fmt: skip


def column_of(search: Search, candidates: Candidates, name: str) -> Array:
    """One choice of each candidate, as a number; of a mixed fleet the first pool's."""
    rows, choice = search.problem.layouts, search.problem.options
    if name in ("micro_batch", "recompute"):
        return np.asarray(getattr(choice, name)[candidates.option[:, 0]])
    return np.asarray(getattr(rows, {"virtual_stages": "chunks"}.get(name, name))[candidates.layout])


def word_of(name: str, number: float) -> str:
    words: dict[str, Sequence[str]] = {
        "sharding": SHARDING, "schedule": SCHEDULES, "precision": PRECISIONS, "recompute": RECOMPUTE,
    }  # fmt: skip
    return words[name][int(number)] if name in words else str(int(number))


def alternatives(task: Task, best: Solved) -> dict[str, Alternative]:
    """For each choice the best plan in which it is another."""
    search, found = best.search, best.found
    result = {}
    mine = found.take(np.array([best.picked.row]))
    for name in CHOICES:
        if name in task.goal.fixed:
            continue
        column = column_of(search, search.candidates, name)
        other = search.best(column != column_of(search, mine.candidates, name)[0], at_once=1024)
        fits = exact.fits(task.model, search, other)
        picked = choose(search.problem, search, other, most=20, fits=fits)
        if picked is not None:
            value = column_of(search, other.candidates.take(np.array([picked.row])), name)[0]
            result[name] = Alternative(
                value=word_of(name, float(value)), step_time_ratio=picked.objective / best.picked.objective
            )
    return result


def mixture(task: Task, best: Solved, solved: Mapping[tuple[str, ...], Solved]) -> MixtureGain:
    """What the other ways to use a mixed fleet would take, over the plan."""
    kinds = [pool.chip for pool in task.pools]
    weakest = {
        "memory_bytes": min(chip.memory_bytes for chip in kinds),
        "memory_bandwidth": min(chip.memory_bandwidth for chip in kinds),
        "peak_flops": {
            name: min(chip.peak_flops[name] for chip in kinds)
            for name in kinds[0].peak_flops
            if all(name in chip.peak_flops for chip in kinds)
        },
    }
    alike = tuple(
        pool.model_copy(
            update={"node": pool.node.model_copy(update={"chip": pool.chip.model_copy(update=weakest)})}
        )
        for pool in task.pools
    )
    without = {}
    for pool in task.pools:
        rest = solved.get(names([other for other in task.pools if other is not pool]))
        without[pool.node.name] = math.inf if rest is None else rest.picked.objective / best.picked.objective
    whole = solved.get(names(task.pools))
    problem = replace(
        task.problem(task.pools) if whole is None else whole.problem, pools=alike, all_alike=True
    )
    weak = weak_search(problem, whole)
    found = weak.best()
    picked = (
        choose(problem, weak, found, fits=exact.fits(task.model, weak, found)) if len(weak.bound) else None
    )
    return MixtureGain(
        all_as_weakest=math.inf if picked is None else picked.objective / best.picked.objective,
        without=without,
    )


def weak_search(problem: Problem, whole: Solved | None) -> Search:
    """Of pools made alike; one that is so already needs no new bounds."""
    if whole is None:
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


def pareto_front(task: Task, best: Solved) -> tuple[FrontPoint, ...]:
    """Candidates that no other beats in time, memory, energy, cost and size of a replica group at once."""
    problem, found = best.problem, best.found
    working = chips(problem, found)
    watts = working @ np.array([task.watts_per_chip(pool) for pool in problem.pools])
    dollars = working @ np.array([task.usd_per_chip_hour(pool) / 3600 for pool in problem.pools])
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
                values = [word_of(name, float(getattr(problem.options, name)[i])) for i in option]
                choice[name] = values[0] if len(set(values)) == 1 else " + ".join(values)
            else:
                number = float(getattr(search_columns, {"virtual_stages": "chunks"}.get(name, name))[layout])
                word = word_of(name, number)
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
