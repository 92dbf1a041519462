"""The few sentences that an expert would say of a plan, each with a number or an inequality.

Pure functions of a Plan. They need no search: what the next-best choice would have cost is in the plan's alternatives.
"""

import math
from collections.abc import Iterator
from datetime import date

from colossus.errors import ConfigError
from colossus.planner.explain.facts import (
    GIB,
    LARGEST_DENSE_BATCH_TOKENS,
    LARGEST_PUBLISHED_BATCH_TOKENS,
    chip_name,
    compared,
    domain_bound,
    hours_lost_per_day,
    ideal_bubble,
    limit_text,
    pace_setter,
    pool_of,
)
from colossus.planner.explain.parts import bare, step_part, step_parts
from colossus.planner.result import MixtureGain
from colossus.planner.run.power import check_power, facility_limit_watts, rated_watts_per_chip
from colossus.spec.plan import Plan, PoolShare
from colossus.units import format_count

_NEGLIGIBLE = 0.005
"""Parts of a step below this share are not worth a sentence."""
_ONCE_PER_STEP = ("bubble", "data", "optimizer", "straggler", "fixed", "head")
"""Parts of a step that are not in the time of its micro-batches."""
_SPLIT_BY_TP = ("weights", "gradients", "activations", "attention", "loss", "gathered", "workspace")
"""Of memory's parts, those that tensor parallelism splits."""


def advice(plan: Plan, mixture: MixtureGain | None = None, *, today: date | None = None) -> tuple[str, ...]:
    """The few sentences that an expert would say, each with a number or an inequality.

    `mixture` is what a mixed fleet is worth, where that is known. The site's power limit is looked up for `today`.
    """
    found = [
        _on_tensor_parallelism(plan),
        _on_the_largest_cost(plan),
        _on_the_bubble(plan),
        *_on_pools(plan, mixture),
        _on_memory(plan),
        _on_price_of_limits(plan),
        _on_recovery(plan),
        _on_failures(plan),
        *_on_limits(plan),
        _on_power(plan, today or date.today()),
        _on_batch(plan),
        _on_unused_chips(plan),
    ]
    return tuple(sentence for sentence in found if sentence)


def memory_with_half_tp(plan: Plan, share: PoolShare) -> float:
    """Bytes, about: tp halved, and twice the ranks along shard, so that only what tp splits grows."""
    sharded = {"none": (), "optimizer": (), "gradients": ("gradients",), "weights": ("weights", "gradients")}
    kept = sharded[plan.sharding]
    return sum(
        size * (2 if bare(name) in _SPLIT_BY_TP and bare(name) not in kept else 1)
        for name, size in share.memory_bytes.items()
    )


def _on_tensor_parallelism(plan: Plan) -> str:
    tp, bound = plan.layout.tp, domain_bound(plan)
    if tp == 1:
        return ""
    other = plan.alternatives.get("tp")
    if other is not None:
        return f"{bound}; tp {other.value} would be {compared(other.step_time_ratio, plan.goal.objective)}."
    tightest = min(plan.pools, key=lambda share: share.memory_limit_bytes - share.peak_bytes)
    needed = memory_with_half_tp(plan, tightest)
    if needed > tightest.memory_limit_bytes:
        return (
            f"{bound}; tp {tp // 2} would need about {needed / GIB:.1f} GiB of the {limit_text(tightest)} of "
            f"{chip_name(plan, tightest)}."
        )
    return f"{bound}."


def _on_the_largest_cost(plan: Plan) -> str:
    parts = step_parts(plan)
    total = sum(parts.values())
    for name, seconds in parts.items():
        if name in ("matmul", "experts"):
            continue
        if name == "bubble":  # it has a sentence of its own
            return ""
        if seconds < _NEGLIGIBLE * total:
            break
        part = step_part(name)
        less = f" Less of it: {part.remedy}." if part.remedy else ""
        return f"Besides matmuls, most goes to {part.label}: {seconds / total:.1%} of the step, {part.what}.{less}"
    return ""


def _on_the_bubble(plan: Plan) -> str:
    ideal = ideal_bubble(plan)
    if ideal is None:
        return ""
    parts, pace = step_parts(plan), pace_setter(plan)
    bubble = parts.get("bubble", 0.0)
    work = sum(seconds for name, seconds in parts.items() if name not in _ONCE_PER_STEP)
    chunks = f", {plan.virtual_stages} virtual stages" if plan.virtual_stages > 1 else ""
    others = {name: seconds for name, seconds in parts.items() if name not in ("matmul", "experts")}
    largest = bubble > 0 and bubble == max(others.values())
    return (
        f"The bubble is {bubble / work if work else 0.0:.1%} of the micro-batches' own time; an ideal {plan.schedule} "
        f"pipeline has {ideal:.1%} (pp {plan.layout.pp}{chunks}, {pace.num_micro_batches} micro-batches)."
        + (
            f" It is what costs most besides matmuls. Less of it: {step_part('bubble').remedy}."
            if largest
            else ""
        )
    )


def _on_pools(plan: Plan, mixture: MixtureGain | None) -> Iterator[str]:
    if len(plan.pools) < 2:
        return
    small, large = min(plan.pools, key=_strength), max(plan.pools, key=_strength)
    names = chip_name(plan, small), chip_name(plan, large)
    what = [f"{_sequences(large)} sequences per rank and step where {names[0]} take {_sequences(small)}"]
    if large.recompute != small.recompute:
        what.append(f"recompute {large.recompute} in place of {small.recompute}")
    gain = ""
    if mixture is not None:
        without = mixture.without.get(large.node)
        gain = f"; all treated as the weakest would be {compared(mixture.all_as_weakest)}"
        gain += f", without {names[1]} {compared(without)}" if without is not None else ""
    yield f"{names[1]} take {', and '.join(what)}{gain}."
    slow, quick = (choose(plan.pools, key=lambda share: share.busy_s) for choose in (max, min))
    waiting = 1 - quick.busy_s / slow.busy_s
    if waiting >= 2 * _NEGLIGIBLE:
        yield (
            f"Groups of {chip_name(plan, slow)} set the pace at {slow.busy_s:.2f} s; those of "
            f"{chip_name(plan, quick)} wait {waiting:.1%} of each step for them."
        )


def _on_memory(plan: Plan) -> str:
    """The limit keeps a margin below what the chip has; it is the chip's own memory that must not be passed."""
    expected = plan.estimate.memory_bytes
    spread = expected.high / expected.likely if expected.likely else 1.0
    tightest = max(plan.pools, key=lambda share: share.peak_bytes / pool_of(plan, share).chip.memory_bytes)
    has, at_worst = pool_of(plan, tightest).chip.memory_bytes, tightest.peak_bytes * spread
    if at_worst <= has:
        return ""
    return (
        f"Memory of {chip_name(plan, tightest)} is {tightest.peak_bytes / has:.0%} full, and the estimate's high end, "
        f"{at_worst / GIB:.1f} GiB, is over the {has / GIB:.1f} GiB of the chip: rehearse one group before the run."
    )


def _on_price_of_limits(plan: Plan) -> str:
    """Alternatives are sought without the goal's limits, so that one can be better than the plan."""
    goal, better = plan.goal, {k: v for k, v in plan.alternatives.items() if v.step_time_ratio < 0.99}
    if not better or (goal.deadline_days is None and goal.budget_usd is None):
        return ""
    name, other = min(better.items(), key=lambda item: item[1].step_time_ratio)
    gain = compared(other.step_time_ratio, goal.objective)
    return f"The goal's limits have a price: {name} {other.value} would be {gain}, and breaks one of them."


def _on_recovery(plan: Plan) -> str:
    whole, best = plan.estimate.goodput_whole_job.likely, plan.estimate.goodput.likely
    lost, least = hours_lost_per_day(whole), hours_lost_per_day(best)
    if lost - least < 0.1:
        return f"Failures lose {lost:.1f} hours a day, whichever way the job recovers." if lost >= 0.1 else ""
    return (
        f"Restarting the whole job at each failure would lose {lost:.1f} hours a day; letting replica groups leave and "
        f"return loses {least:.1f}: {best / whole - 1:.1%} more training."
    )


def _on_failures(plan: Plan) -> str:
    per_day = plan.estimate.interruptions_per_day
    if per_day.likely < 0.05:
        return ""
    causes = sorted(plan.estimate.interruptions_by_cause.items(), key=lambda item: -item[1])
    if per_day.likely >= 1:
        rate = (
            f"Expect {per_day.likely:.3g} interruptions a day, one every {_duration(86_400 / per_day.likely)}"
        )
    else:
        rate = f"Expect an interruption every {1 / per_day.likely:.1f} days"
    cause = f", {causes[0][1]:.0%} of them by {causes[0][0]}" if causes else ""
    return f"{rate}{cause}; checkpoint every {_duration(plan.estimate.checkpoint_interval_s)}."


def _on_limits(plan: Plan) -> Iterator[str]:
    goal, estimate = plan.goal, plan.estimate
    for limit, value, unit in (
        (goal.deadline_days, estimate.days, "days" if goal.deadline_days != 1 else "day"),
        (goal.budget_usd, estimate.cost_usd, "USD"),
        (goal.max_power_watts, estimate.facility_watts, "W"),
    ):
        if limit is not None and value.high > limit:
            yield (
                f"The limit of {_amount(limit)} {unit} holds at the likely {_amount(value.likely)}, not at the high "
                f"end of {_amount(value.high)}."
                if value.likely <= limit
                else f"The limit of {_amount(limit)} {unit} does not hold: {_amount(value.likely)} are likely."
            )


def _on_power(plan: Plan, day: date) -> str:
    site = plan.fleet.site
    if math.isinf(limit := facility_limit_watts(site, day)):
        return ""
    try:
        check_power(plan.fleet.pools, site, day)
    except ConfigError as error:
        return f"Power binds: {error}."
    needed = site.pue.likely * sum(
        pool.num_chips * rated_watts_per_chip(pool.node) for pool in plan.fleet.pools
    )
    return (
        f"Power does not bind: the fleet is rated at {needed / 1e6:.0f} MW with cooling, and {site.name} feeds "
        f"{limit / 1e6:.0f} on {day}."
    )


def _on_batch(plan: Plan) -> str:
    tokens = plan.step_tokens
    times = tokens / LARGEST_PUBLISHED_BATCH_TOKENS
    if times > 1.005:
        return (
            f"{_millions(tokens)} tokens per step are {times:.1f} times the largest published batch (DeepSeek-V3, "
            f"{_millions(LARGEST_PUBLISHED_BATCH_TOKENS)}), and leave {plan.num_steps:,} steps: tokens may teach less. "
            f"To stay within what was tried: --max-batch 60M."
        )
    if tokens > LARGEST_DENSE_BATCH_TOKENS and plan.model.mlp.kind == "dense":
        return (
            f"{_millions(tokens)} tokens per step are over Llama 3 405B's {_millions(LARGEST_DENSE_BATCH_TOKENS)}; the "
            f"largest published are the {_millions(LARGEST_PUBLISHED_BATCH_TOKENS)} of DeepSeek-V3."
        )
    return ""


def _on_unused_chips(plan: Plan) -> str:
    idle = sum(share.idle_chips for share in plan.pools)
    spare = sum(share.spare_nodes * pool_of(plan, share).node.num_chips for share in plan.pools)
    if idle + spare < 0.02 * plan.fleet.num_chips:
        return ""
    group = plan.layout.group_ranks
    enough = any(share.idle_chips >= group for share in plan.pools)
    why = (
        f"left out, as another group of {group:,} would not help the goal"
        if enough
        else f"too few for another group of {group:,}"
    )
    return f"{idle + spare:,} of {plan.fleet.num_chips:,} chips do not train: {spare:,} in spare nodes, {idle:,} {why}."


# --- words ---


def _strength(share: PoolShare) -> tuple[int, int, str]:
    """How much of a step a pool's groups do; of equals, how much memory they have."""
    return share.micro_batch_sequences * share.num_micro_batches, share.memory_limit_bytes, share.node


def _sequences(share: PoolShare) -> str:
    return f"{share.micro_batch_sequences} × {share.num_micro_batches}"


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:,.0f}M"


def _amount(value: float) -> str:
    return format_count(value) if abs(value) >= 1000 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86_400 else f"{seconds / 86_400:.1f} days"
