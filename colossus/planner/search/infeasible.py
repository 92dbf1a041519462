"""No plan: which limit binds, and the smallest change that helps."""

from collections.abc import Sequence

import numpy as np

from colossus.errors import ConfigError
from colossus.planner.estimate.memory import memory_parts
from colossus.planner.search.best import Search
from colossus.planner.search.bounds import Problem, execution, limit_bytes
from colossus.spec.fleet import Pool
from colossus.spec.goal import Goal
from colossus.spec.model import ModelSpec


def explain_infeasible(
    model: ModelSpec,
    pools: Sequence[Pool],
    goal: Goal,
    sequence: int,
    sequences: int,
    problem: Problem,
    search: Search,
) -> str:
    """One sentence or two for the person who asked for it."""
    best = int(np.argmax(search.limits))
    peak = search.peaks.rows[search.peaks.place]
    layout, option = np.unravel_index(int(np.argmin(peak)), peak.shape)
    pool, room = pools[best], search.limits[best] - float(peak.min())
    where = f"{sum(p.num_chips for p in pools):,} chips of {', '.join(p.node.name for p in pools)}"
    if room >= 0:
        return (
            f"{model.name} fits on {where}, but no layout that fits leaves each data-parallel rank a sequence: the "
            f"largest batch is {sequences:,} sequences of {sequence:,} tokens; raise --max-batch, or fix fewer choices"
        )
    row = problem.layouts.take(np.array([layout]))
    choice = problem.options
    one = np.ones(1)
    x = execution(
        problem, row, one * choice.micro_batch[option], one * choice.recompute[option], one, 4.0 * row.pp
    )
    parts = memory_parts(problem.shape, x)
    sizes = {
        name.removesuffix("_bytes"): float(np.ravel(getattr(parts, name))[0]) / 2**30
        for name in parts.__dataclass_fields__
        if name != "fragmentation_bytes"
    }
    limit = limit_bytes(pool) / 2**30
    needs = limit - room / 2**30
    listed = ", ".join(
        f"{name} {size:.1f}" for name, size in sorted(sizes.items(), key=lambda kv: -kv[1])[:4]
    )
    axes = ", ".join(
        f"{name} {int(getattr(row, name)[0])}"
        for name in ("tp", "pp", "cp", "ep", "shard")
        if getattr(row, name)[0] > 1
    )
    text = (
        f"{model.name} does not fit on {where}: at best ({axes or 'one chip'}) the fullest rank needs {needs:.1f} "
        f"GiB of {limit:.1f} usable ({listed})"
    )
    fixed = ", ".join(f"{name}={value}" for name, value in goal.fixed.items())
    asked = f", with {fixed} fixed; fix fewer choices" if fixed else ""
    return f"{text}{asked}; {_remedy(model, pools, goal, sequence, sequences, problem)}"


def _remedy(
    model: ModelSpec, pools: Sequence[Pool], goal: Goal, sequence: int, sequences: int, problem: Problem
) -> str:
    """The smallest multiple of the fleet that fits."""
    from dataclasses import replace

    from colossus.planner.search.space import layouts

    for factor in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        larger = [_times(pool, factor) for pool in pools]
        try:
            tried = Search(
                replace(problem, pools=larger, layouts=layouts(model, larger, goal, sequence, sequences))
            )
        except ConfigError:
            continue
        if len(tried.bound):
            return f"it fits on {sum(pool.num_chips for pool in larger):,} such chips"
    return "a smaller model, shorter sequences or chips with more memory would help"


def _times(pool: Pool, factor: int) -> Pool:
    return pool.model_copy(update={"num_nodes": pool.num_nodes * factor})
