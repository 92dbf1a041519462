"""From a model, a fleet and a goal to the best plan, with its reasons."""

import math
import time
from datetime import date
from typing import Any

from colossus.errors import ConfigError
from colossus.planner.estimate.execution import RECOMPUTE, SHARDING
from colossus.planner.estimate.shape import ModelShape
from colossus.planner.explain.reasons import advice, reasons
from colossus.planner.result import Planned
from colossus.planner.run import power, scaling_law, spares
from colossus.planner.run.account import account
from colossus.planner.schedule.order import SCHEDULES
from colossus.planner.search.around import alternatives, mixture, pareto_front
from colossus.planner.search.bounds import limit_bytes
from colossus.planner.search.exact import exchange, layers_of_stages, pool_memory
from colossus.planner.search.fleet import NothingFits, Solved, Task, names, solve, subsets
from colossus.planner.search.infeasible import explain_infeasible
from colossus.planner.search.space import PRECISIONS
from colossus.spec.fleet import Fleet, Pool
from colossus.spec.goal import Goal
from colossus.spec.layout import Layout
from colossus.spec.model import ModelSpec
from colossus.spec.plan import Plan, PoolShare

LARGEST_PUBLISHED_BATCH_TOKENS = 15_360 * 4096
"""DeepSeek-V3 (arXiv:2412.19437); Llama 3.1 405B used 16M."""
LEAST_STEPS = 2000
"""A run of fewer steps has hardly a learning-rate schedule: the default batch leaves at least so many."""
USUAL_SEQUENCE_TOKENS = 8192
MOST_LAYERS = 4096
AS_ASKED = ("optimizer", "optimizer_state", "replica_sum", "float8")
"""Fields of a plan that the search weighs nothing in: as a goal fixes them, else as plans have them."""
EXPERT_LOAD = 1.1
"""Tokens of the rank with the busiest experts over the mean, with routers that are kept balanced (assumed: published
runs force equal loads)."""


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
    if model.num_layers > MOST_LAYERS:
        raise ConfigError(
            f"{model.name} has {model.num_layers:,} layers; a plan is looked for up to {MOST_LAYERS:,}"
        )
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
    shape = ModelShape.of(model, expert_load=EXPERT_LOAD)
    task = Task(model, shape, fleet, goal, tokens, sequence, sequences, tuple(pools), today)
    solved: dict[tuple[str, ...], Solved] = {}
    failures: list[ConfigError | NothingFits] = []
    for some in subsets(pools):
        try:
            solved[names(some)] = solve(task, some, of=solved.get(names(pools)))
        except (ConfigError, NothingFits) as failure:
            failures.append(failure)
    if not solved:
        if isinstance(failures[0], ConfigError):
            raise failures[0]
        raise ConfigError(
            explain_infeasible(
                model, pools, goal, sequence, sequences, failures[0].problem, failures[0].search
            )
        )
    best = min(solved.values(), key=lambda one: one.picked.objective)
    plan = _plan(task, best, ready)
    plan = plan.model_copy(update={"alternatives": alternatives(task, best)})
    plan = plan.model_copy(update={"reasons": reasons(plan)})
    gain = mixture(task, best, solved) if len(pools) > 1 else None
    plan = plan.model_copy(update={"advice": advice(plan, gain, today=today)})
    return Planned(
        plan=Plan.model_validate(dict(plan)),
        candidates=sum(one.search.num_candidates for one in solved.values()),
        feasible=sum(len(one.search.bound) for one in solved.values()),
        cpu_s=time.process_time() - started,
        front=pareto_front(task, best),
        mixture=gain,
    )


def largest_batch(goal: Goal, tokens: int, sequence: int) -> int:
    """Sequences of the largest batch: as asked, or the largest published, but not so large that few steps remain."""
    if goal.max_global_batch_sequences is not None:
        return goal.max_global_batch_sequences
    return max(1, int(min(LARGEST_PUBLISHED_BATCH_TOKENS, tokens / LEAST_STEPS) // sequence))


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


def _plan(task: Task, best: Solved, ready: dict[str, int]) -> Plan:
    problem, found = best.problem, best.found
    row, parts = best.picked.row, best.picked.parts
    layout = problem.layouts.take(found.candidates.layout[[row]])
    groups, counts = found.groups[row], found.micro_batches[row]
    stage = layers_of_stages(problem, layout)
    shares = []
    for i, pool in enumerate(problem.pools):
        if groups[i] == 0:
            continue
        option = int(found.candidates.option[row, i])
        memory = pool_memory(task.model, problem, found, row, i)
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
    as_asked: dict[str, Any] = {name: v for name, v in task.goal.fixed.items() if name in AS_ASKED}
    return Plan.model_construct(
        model=task.model,
        fleet=task.fleet,
        goal=task.goal,
        tokens=task.tokens,
        sequence_tokens=task.sequence,
        precision=PRECISIONS[int(layout.precision[0])],
        **as_asked,
        wide_matmuls=tuple(filter(None, str(task.goal.fixed.get("wide_matmuls", "")).split(","))),
        layout=Layout(replica=int(groups.sum()), **axes),
        expert_tp=int(layout.expert_tp[0]),
        context_exchange=exchange(problem, layout, int(found.candidates.option[row, 0])),
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
