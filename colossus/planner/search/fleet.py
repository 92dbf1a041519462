"""What is planned, and the best of it for every choice of pools."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date

import numpy as np

from colossus.errors import ConfigError
from colossus.planner.estimate.columns import Array
from colossus.planner.estimate.shape import ModelShape
from colossus.planner.run import power, price, reliability
from colossus.planner.search import exact
from colossus.planner.search.best import FRONT_SLACK, Evaluated, Search
from colossus.planner.search.bounds import Problem
from colossus.planner.search.refine import Picked, choose
from colossus.planner.search.space import layouts, options
from colossus.spec.fleet import Fleet, Pool
from colossus.spec.goal import Goal
from colossus.spec.model import ModelSpec


@dataclass(frozen=True)
class Task:
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
            optimizer="muon" if self.goal.fixed.get("optimizer") == "muon" else "adamw",
            optimizer_state="bfloat16" if self.goal.fixed.get("optimizer_state") == "bfloat16" else "float32",
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


class NothingFits(Exception):
    """No candidate of a search can be run."""

    def __init__(self, problem: Problem, search: Search) -> None:
        super().__init__()
        self.problem, self.search = problem, search


@dataclass(frozen=True)
class Solved:
    """The search over some of the pools, and the best it found."""

    pools: tuple[Pool, ...]
    problem: Problem
    search: Search
    found: Evaluated
    picked: Picked


def subsets(pools: Sequence[Pool]) -> list[tuple[Pool, ...]]:
    """All pools, then each fewer: the best plan may leave a pool out."""
    return [some for size in range(len(pools), 0, -1) for some in itertools.combinations(pools, size)]


def names(pools: Sequence[Pool]) -> tuple[str, ...]:
    """What tells choices of pools apart."""
    return tuple(pool.node.name for pool in pools)


def solve(task: Task, pools: tuple[Pool, ...], *, of: Solved | None = None) -> Solved:
    """The search over `pools`; what a search over more of them, `of`, has computed is used again where it holds.

    Raises ConfigError where a choice or a limit of the goal leaves nothing, NothingFits where memory does.
    """
    if of is not None and same_nodes(of.pools):
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
        raise NothingFits(problem, search)
    found = kept(task, search)
    picked = choose(problem, search, found, fits=exact.fits(task.model, search, found))
    if picked is None:
        raise NothingFits(problem, search)
    return Solved(pools, problem, search, found, picked)


def same_nodes(pools: Sequence[Pool]) -> bool:
    """Whether the space of layouts does not depend on which of the pools are used."""
    kinds = {
        (pool.node.num_chips, pool.node.scale_up_chips, tuple(sorted(pool.chip.peak_flops))) for pool in pools
    }
    return len(kinds) == 1


def kept(task: Task, search: Search) -> Evaluated:
    """What was evaluated and keeps the goal's limits."""
    goal = task.goal
    if goal.deadline_days is None and goal.budget_usd is None:
        return search.best(slack=FRONT_SLACK)
    layouts_, found = search.problem.layouts, []
    for part in np.unique(layouts_.part):
        here = layouts_.part[search.candidates.layout] == part
        found.append(search.best(here, slack=1.05))
    evaluated = Evaluated.joined(found)
    days = evaluated.seconds_per_token * search.stretch(evaluated) * task.tokens / 86_400
    working = chips(search.problem, evaluated)
    dollars = (
        days * 24 * (working @ np.array([task.usd_per_chip_hour(pool) for pool in search.problem.pools]))
    )
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


def chips(problem: Problem, found: Evaluated) -> Array:
    """Chips that are held [n, pools]: whole nodes."""
    working = found.groups * problem.layouts.group_ranks[found.candidates.layout][:, None]
    per_node = np.array([float(pool.node.num_chips) for pool in problem.pools])
    return np.asarray(np.ceil(working / per_node) * per_node)
