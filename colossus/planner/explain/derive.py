"""How the figures of a plan come about: each formula, and the formula with this plan's numbers."""

from collections.abc import Iterator

from colossus.planner.explain.facts import (
    GIB,
    LARGEST_PUBLISHED_BATCH_TOKENS,
    chip_name,
    held_chips,
    hours_lost_per_day,
    ideal_bubble,
    pace_setter,
    pool_of,
)
from colossus.planner.explain.parts import bare, memory_part, step_part, step_parts
from colossus.spec.plan import Plan
from colossus.units import format_bytes

_DAY_S = 86_400


def choice_derived(plan: Plan, name: str) -> Iterator[str]:
    layout, pace = plan.layout, pace_setter(plan)
    if name == "schedule" and (ideal := ideal_bubble(plan)) is not None:
        factor = (layout.pp - 1) / (ideal * pace.num_micro_batches)
        yield "bubble over work = (pp − 1) / (factor × micro-batches); the factor is virtual stages, or the schedule's"
        yield f"({layout.pp} − 1) / ({factor:.3g} × {pace.num_micro_batches}) = {ideal:.2%}"
    elif name in ("micro_batch", "recompute"):
        for share in plan.pools:
            peak, limit = format_bytes(share.peak_bytes), format_bytes(share.memory_limit_bytes)
            yield f"{chip_name(plan, share)}: {peak} of {limit} on the fullest rank, {share.busy_s:.4g} s per step"
    elif name == "replica":
        for share in plan.pools:
            yield f"{chip_name(plan, share)}: {share.num_groups:,} groups of {layout.group_ranks:,} chips"


def figure_derived(plan: Plan, name: str) -> tuple[str, ...]:
    layout = plan.layout
    match name:
        case "global_batch":
            terms = [
                f"{share.num_groups} × {layout.shard} × {share.micro_batch_sequences} × {share.num_micro_batches}"
                for share in plan.pools
            ]
            return (
                "sum over pools of groups × shard × micro-batch × micro-batches",
                f"{' + '.join(terms)} = {plan.global_batch_sequences:,}",
            )
        case "step_tokens":
            return (
                "global batch × tokens of a sequence",
                f"{plan.global_batch_sequences:,} × {plan.sequence_tokens:,} = {plan.step_tokens:,}",
                f"the largest published is DeepSeek-V3's {LARGEST_PUBLISHED_BATCH_TOKENS:,}",
            )
        case "num_steps":
            return (
                "tokens / tokens per step, rounded up",
                f"{plan.tokens:,} / {plan.step_tokens:,} = {plan.num_steps:,}",
            )
        case "group_ranks":
            return (
                "pp × shard × cp × tp",
                f"{layout.pp} × {layout.shard} × {layout.cp} × {layout.tp} = {layout.group_ranks:,}",
            )
        case "num_ranks":
            return (
                "replica groups × chips of a group",
                f"{layout.replica:,} × {layout.group_ranks:,} = {layout.num_ranks:,} of {plan.fleet.num_chips:,}",
            )
    return ()


def estimate_derived(plan: Plan, name: str) -> Iterator[str]:
    e, seconds = plan.estimate, plan.estimate.step_time_s.likely
    chips = held_chips(plan)
    chip_hours = chips * e.days.likely * 24
    match name:
        case "step_time_s" | "step_parts_s":
            parts = {part: s for part, s in step_parts(plan).items() if s >= 0.0005 * seconds}
            yield "the sum of its parts, on the rank that sets the pace"
            yield (
                " + ".join(f"{step_part(part).label} {s:.3g}" for part, s in parts.items())
                + f" = {seconds:.4g} s"
            )
        case "tokens_per_s":
            yield "tokens per step / seconds per step"
            yield f"{plan.step_tokens:,} / {seconds:.4g} = {e.tokens_per_s.likely:,.0f}"
        case "mfu":
            yield "model FLOPs per token × tokens/s / (chips × peak)"
            yield from _mfu(plan)
        case "memory_bytes":
            fullest = max(plan.pools, key=lambda share: share.peak_bytes)
            terms = [
                f"{memory_part(bare(p)).label} {size / GIB:.1f}"
                for p, size in fullest.memory_bytes.items()
                if size
            ]
            yield f"the sum of what the fullest rank of {chip_name(plan, fullest)} holds, in GiB"
            limit = format_bytes(fullest.memory_limit_bytes)
            yield f"{' + '.join(terms)} = {fullest.peak_bytes / GIB:.1f}, of {limit}"
        case "days":
            days = plan.tokens / plan.step_tokens * seconds / e.goodput.likely / _DAY_S
            yield "tokens / tokens per step × seconds per step / goodput"
            yield (
                f"{plan.tokens:,} / {plan.step_tokens:,} × {seconds:.4g} s / {e.goodput.likely:.4g} / 86,400 = "
                f"{days:,.1f} days"
            )
        case "goodput":
            yield "the better of restarting the whole job, and of replica groups that leave and return"
            yield (
                f"hours lost a day: whole job {hours_lost_per_day(e.goodput_whole_job.likely):.2f}, better policy "
                f"{hours_lost_per_day(e.goodput.likely):.2f}"
            )
        case "goodput_whole_job":
            yield "λ · interval · exp(−λ (restart + write)) / (exp(λ (interval + stall)) − 1), λ failures per second"
            yield (
                f"λ = {e.interruptions_per_day.likely:.4g} / 86,400 s, interval = {e.checkpoint_interval_s:,.0f} s: "
                f"{e.goodput_whole_job.likely:.2%}"
            )
        case "interruptions_per_day":
            nodes = plan.layout.num_ranks / 8
            yield "interruptions per 1,000 nodes of 8 chips and day × nodes that train / 1,000"
            per_day = e.interruptions_per_day.likely
            yield f"{per_day / nodes * 1000:.3g} × {nodes:,.0f} / 1,000 = {per_day:.4g}"
        case "interruptions_by_cause":
            yield "counted over 54 days of Llama 3 405B on 16,384 H100 (arXiv:2407.21783, table 5)"
        case "checkpoint_interval_s":
            mtbf = _DAY_S / e.interruptions_per_day.likely if e.interruptions_per_day.likely else float("inf")
            yield "where 1 − λ · interval = exp(−λ (interval + stall)); about √(2 · stall · time between failures)"
            yield f"{mtbf:,.0f} s between failures; no shorter than a write takes"
        case "facility_watts":
            watts = e.facility_watts.likely
            yield "watts per chip, with its part of node, network and cooling × chips that train or stand ready"
            yield f"{watts / chips:,.0f} W × {chips:,} = {watts / 1e6:,.4g} MW"
        case "energy_mwh":
            yield "facility watts × hours"
            megawatts, hours = e.facility_watts.likely / 1e6, e.days.likely * 24
            yield f"{megawatts:,.4g} MW × {hours:,.1f} h = {number(e.energy_mwh.likely)} MWh"
        case "water_m3":
            wue = plan.fleet.site.wue_litres_per_kwh.likely
            yield "energy of the computers (without cooling) × litres per kWh"
            pue = plan.fleet.site.pue.likely
            yield f"{number(e.energy_mwh.likely)} MWh / PUE {pue:g} × {wue:g} L/kWh = {number(e.water_m3.likely)} m³"
        case "co2_t":
            carbon = plan.fleet.site.carbon_kg_per_kwh.likely
            yield "energy × carbon of the grid's mix"
            yield f"{number(e.energy_mwh.likely)} MWh × {carbon:g} kg/kWh = {number(e.co2_t.likely)} t"
        case "cost_usd" | "cost_owned_usd":
            usd = getattr(e, name).likely
            each = usd / chip_hours if chip_hours else 0.0
            yield "chips that train or stand ready × hours × USD per chip and hour"
            yield f"{chips:,} × {e.days.likely * 24:,.1f} h × {each:.3g} USD = {usd:,.0f} USD"


def _mfu(plan: Plan) -> Iterator[str]:
    e = plan.estimate
    per_token = plan.model.flops_per_token(plan.sequence_tokens)
    group = plan.layout.group_ranks
    terms = []
    peak = 0.0
    for share in plan.pools:
        flops = pool_of(plan, share).chip.peak_flops[plan.precision]
        peak += share.num_groups * group * flops
        terms.append(f"{share.num_groups * group:,} × {flops / 1e12:,.4g}")
    yield (
        f"{per_token:.4g} × {e.tokens_per_s.likely:,.0f} / ({' + '.join(terms)} TFLOP/s) = "
        f"{per_token * e.tokens_per_s.likely / peak:.1%}"
    )


def number(value: float, form: str = ",.4g") -> str:
    """As by `form`, but never as 2.561e+04."""
    return format(value, ",.0f") if form.endswith("g") and abs(value) >= 1000 else format(value, form)
