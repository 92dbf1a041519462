"""A plan field by field: what each is, its value, why, what the next-best would have cost, and how it was computed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from colossus.errors import ConfigError, did_you_mean
from colossus.planner.explain.derive import choice_derived, estimate_derived, figure_derived, number
from colossus.planner.explain.facts import chip_name
from colossus.planner.explain.parts import bare, memory_part, step_part, step_parts
from colossus.planner.explain.reasons import reasons
from colossus.spec.plan import Alternative, Plan
from colossus.spec.ranged import Ranged
from colossus.units import format_bytes, format_count


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a plan, explained."""

    name: str
    what: str
    value: str
    why: str = ""
    next_best: Alternative | None = None
    how: tuple[str, ...] = ()
    """How it was computed: the formula, and the formula with this plan's numbers."""


CHOICES: Final[Mapping[str, str]] = {
    "precision": "What most matmuls run in; master weights and optimizer state are float32.",
    "tp": "Tensor parallelism: ranks that each matrix is split over. They talk inside every layer.",
    "pp": "Pipeline parallelism: ranks that the layers are split over, one stage after the other.",
    "cp": "Context parallelism: ranks that each sequence is split over.",
    "ep": "Expert parallelism: ranks that a layer's experts are spread over; it folds into shard × cp × tp.",
    "expert_tp": "Ranks that one expert is split over.",
    "shard": "Ranks of a replica group that take different samples and hold different shards of what is sharded.",
    "replica": "Replica groups: each holds one whole copy of the model, and is what fails, leaves and returns as one.",
    "sharding": "What is split over the shard axis besides the samples: ZeRO stages 0 to 3 (arXiv:1910.02054).",
    "schedule": "The order in which a stage runs forward and backward passes of the step's micro-batches.",
    "virtual_stages": "Chunks of layers on each pipeline rank: v of them make the bubble 1/v as long.",
    "stage_layers": "Layers of each pipeline rank.",
    "micro_batch": "Sequences that a rank passes through the model at once, by pool.",
    "num_micro_batches": "Micro-batches per step on each data-parallel rank, by pool.",
    "recompute": "What the backward pass computes again in place of keeping it, by pool.",
}
"""What the search chooses, in the order in which it is shown."""

GIVEN: Final[Mapping[str, str]] = {
    "model": "What is trained.",
    "fleet": "What it is trained on.",
    "goal": "How far, and on what terms.",
    "tokens": "Trained in the whole run.",
    "sequence_tokens": "Tokens of one sequence.",
    "optimizer": "What moves the weights; time, memory and exchanges are those of it. Muon is for matrices alone.",
    "optimizer_state": "What averages of gradients are kept in.",
}

FOLLOWS: Final[Mapping[str, str]] = {
    "global_batch": "Sequences per step, of all replica groups together.",
    "step_tokens": "Tokens per step.",
    "num_steps": "Optimizer steps of the whole run.",
    "group_ranks": "Chips of one replica group: what one failure takes away.",
    "num_ranks": "Chips that train.",
    "spare_nodes": "Nodes held ready to replace broken ones, by pool.",
    "idle_chips": "Chips left over, too few for another whole group, by pool.",
    "busy_s": "What one step takes the groups of a pool by themselves; the slowest pool sets the pace.",
}

ESTIMATES: Final[Mapping[str, str]] = {
    "step_time_s": "Seconds of one step.",
    "step_parts_s": "Where the likely step time goes, on the rank that sets the pace.",
    "tokens_per_s": "Tokens trained per second while steps run; interruptions are in days and goodput.",
    "mfu": "Model FLOPs utilisation: FLOPs that the model needs over the chips' peak. Recompute never counts.",
    "memory_bytes": "Peak on the fullest rank of the fleet.",
    "days": "Wall time of the whole run, interruptions included.",
    "goodput": "Share of wall time spent on steps that are kept, with the better of the two policies of recovery.",
    "goodput_whole_job": "The same when every failure restarts the whole job.",
    "interruptions_per_day": "Unplanned interruptions, by published failure rates of such nodes.",
    "interruptions_by_cause": "Their shares, by published counts.",
    "checkpoint_interval_s": "Training between two checkpoints.",
    "facility_watts": "Drawn on average, cooling included.",
    "energy_mwh": "Of the whole run, cooling included.",
    "water_m3": "Used on site by the whole run; what power plants use is not in it.",
    "co2_t": "Tonnes of CO2 equivalents, of electricity by the grid's average mix.",
    "cost_usd": "Rented, where rents of all chips are known; else owned.",
    "cost_owned_usd": "Owned: wear of machines and buildings, electricity, operations.",
}

_OTHER_NAMES: Final = {
    "micro_batch_sequences": "micro_batch", "global_batch_sequences": "global_batch", "step_time": "step_time_s",
    "memory": "memory_bytes", "energy": "energy_mwh", "water": "water_m3", "co2": "co2_t", "cost": "cost_usd",
    "power": "facility_watts", "layout": "group_ranks", "batch": "global_batch", "steps": "num_steps",
    "sequence": "sequence_tokens", "failures": "interruptions_per_day", "step_parts": "step_parts_s",
    "tokens_per_second": "tokens_per_s",
}  # fmt: skip


_ONLY_PIPELINES: Final = ("bubble", "bubble_s", "pipeline", "pipeline_s")


def field_names(plan: Plan) -> tuple[str, ...]:
    """All that can be asked for, parts of step and memory among it."""
    parts = [f"{name}_s" for name in step_parts(plan)]
    held = {f"{bare(name)}_bytes": None for share in plan.pools for name in share.memory_bytes}
    names = [*CHOICES, *GIVEN, *FOLLOWS, *ESTIMATES, *parts, *held]
    return tuple(dict.fromkeys(names))


def explain_field(plan: Plan, name: str) -> Field:
    """One field of a plan. Raises ConfigError, with the nearest names, for one that a plan does not have."""
    short = name.strip().rpartition(".")[2].lower().replace("-", "_")
    short = _OTHER_NAMES.get(short, short)
    known = field_names(plan)
    for candidate in (short, f"{short}_s", f"{short}_bytes"):
        if candidate in known:
            return _field(plan, candidate)
    if short in _ONLY_PIPELINES and plan.layout.pp == 1:
        raise ConfigError(f"this plan has no {name}: all layers are on one stage, as pp is 1")
    raise ConfigError(f"a plan has no field {name!r}.{did_you_mean(short, {*known, *_OTHER_NAMES})}")


def _field(plan: Plan, name: str) -> Field:
    if name in CHOICES:
        return Field(
            name=name,
            what=CHOICES[name],
            value=choice(plan, name),
            why=reasons(plan).get(name, ""),
            next_best=plan.alternatives.get(name),
            how=tuple(choice_derived(plan, name)),
        )
    if name in GIVEN:
        return Field(name, GIVEN[name], _given(plan, name), plan.reasons.get(name, "it was given"))
    if name in FOLLOWS:
        return Field(
            name,
            FOLLOWS[name],
            _followed(plan, name),
            plan.reasons.get(name, ""),
            how=figure_derived(plan, name),
        )
    if name in ESTIMATES:
        return Field(
            name, ESTIMATES[name], _estimated(plan, name), plan.reasons.get(name, ""),
            how=tuple(estimate_derived(plan, name)),
        )  # fmt: skip
    return _part(plan, name)


# --- values ---


def choice(plan: Plan, name: str) -> str:
    """The value of a choice; where the pools differ, each one's."""
    layout, pools = plan.layout, plan.pools
    if name in type(layout).model_fields:
        return f"{getattr(layout, name):,}"
    match name:
        case "micro_batch":
            return _by_pool(plan, [str(share.micro_batch_sequences) for share in pools])
        case "num_micro_batches":
            return _by_pool(plan, [str(share.num_micro_batches) for share in pools])
        case "recompute":
            return _by_pool(plan, [share.recompute for share in pools])
        case "stage_layers":
            return runs(plan.stage_layers)
    return str(getattr(plan, name))


def runs(layers: tuple[int, ...]) -> str:
    """(7, 8, 8, 7) → `7, 2 × 8, 7`."""
    groups: list[list[int]] = []
    for count in layers:
        if groups and groups[-1][0] == count:
            groups[-1][1] += 1
        else:
            groups.append([count, 1])
    return ", ".join(f"{times} × {count}" if times > 1 else str(count) for count, times in groups)


def _by_pool(plan: Plan, values: list[str]) -> str:
    if len(set(values)) == 1:
        return values[0]
    return ", ".join(
        f"{value} on {chip_name(plan, share)}" for value, share in zip(values, plan.pools, strict=True)
    )


def _given(plan: Plan, name: str) -> str:
    match name:
        case "model":
            total, active = plan.model.num_params(), plan.model.num_active_params()
            return f"{plan.model.name}: {format_count(total)} parameters, {format_count(active)} active"
        case "fleet":
            pools = " + ".join(f"{pool.num_chips:,} {pool.chip.name}" for pool in plan.fleet.pools)
            return f"{plan.fleet.name}: {pools}"
        case "goal":
            return ", ".join(_goal(plan))
    value = getattr(plan, name)
    return value if isinstance(value, str) else f"{value:,}"


def _goal(plan: Plan) -> Iterator[str]:
    goal = plan.goal
    said = goal.model_dump(exclude_none=True, exclude_defaults=True, exclude={"fixed"})
    for name, value in (said | {"objective": goal.objective}).items():
        yield f"{name} {value:,}" if isinstance(value, int | float) else f"{name} {value}"
    for name, value in goal.fixed.items():
        yield f"fixed {name}={value}"


def _followed(plan: Plan, name: str) -> str:
    match name:
        case "global_batch":
            return f"{plan.global_batch_sequences:,} sequences"
        case "step_tokens":
            return f"{plan.step_tokens:,}"
        case "num_steps":
            return f"{plan.num_steps:,}"
        case "group_ranks" | "num_ranks":
            return f"{getattr(plan.layout, name):,}"
        case "busy_s":
            return _by_pool(plan, [f"{share.busy_s:.4g} s" for share in plan.pools])
    return _by_pool(plan, [f"{getattr(share, name):,}" for share in plan.pools])


def _estimated(plan: Plan, name: str) -> str:
    value = getattr(plan.estimate, name)
    if isinstance(value, Ranged):
        return with_range(name, value)
    if name == "step_parts_s":
        return ", ".join(
            f"{step_part(part).label} {seconds:.3g} s" for part, seconds in step_parts(plan).items()
        )
    if isinstance(value, dict):
        return ", ".join(
            f"{cause} {share:.0%}" for cause, share in sorted(value.items(), key=lambda i: -i[1])
        )
    return f"{value:,.0f} s"


def with_range(name: str, value: Ranged) -> str:
    """`9.87 s (8.9 to 10.9)`, in a unit that a person reads."""
    scale, _, form = _UNITS[name]
    low, high = (number(x * scale, form) for x in (value.low, value.high))
    likely = likely_text(name, value)
    return likely if low == high else f"{likely} ({low} to {high})"


def likely_text(name: str, value: Ranged) -> str:
    """`9.87 s`."""
    scale, unit, form = _UNITS[name]
    return f"{number(value.likely * scale, form)} {unit}".strip()


_UNITS: Final[Mapping[str, tuple[float, str, str]]] = {
    "step_time_s": (1, "s", ",.4g"), "tokens_per_s": (1, "tokens/s", ",.0f"), "mfu": (1, "", ".1%"),
    "memory_bytes": (2**-30, "GiB", ",.1f"), "days": (1, "days", ",.1f"), "goodput": (1, "", ".1%"),
    "goodput_whole_job": (1, "", ".1%"), "interruptions_per_day": (1, "per day", ".3g"),
    "facility_watts": (1e-6, "MW", ",.4g"), "energy_mwh": (1, "MWh", ",.4g"), "water_m3": (1, "m³", ",.4g"),
    "co2_t": (1, "t", ",.4g"), "cost_usd": (1, "USD", ",.0f"), "cost_owned_usd": (1, "USD", ",.0f"),
}  # fmt: skip
"""Factor, unit and form of each figure of an estimate."""


# --- parts ---


def _part(plan: Plan, name: str) -> Field:
    if name.endswith("_s"):
        short, parts = bare(name), step_parts(plan)
        part, seconds = step_part(short), parts[short]
        less = (f"less of it: {part.remedy}",) if part.remedy else ()
        share = seconds / sum(parts.values())
        return Field(
            name, f"Part of the step: {part.what}.", f"{seconds:.4g} s, {share:.1%} of the step", how=less
        )
    held = {
        chip_name(plan, share): sum(
            size for key, size in share.memory_bytes.items() if bare(key) == bare(name)
        )
        for share in plan.pools
    }
    part = memory_part(bare(name))
    value = ", ".join(f"{format_bytes(size)} on {chip}" for chip, size in held.items())
    less = (f"less of it: {part.remedy}",) if part.remedy else ()
    return Field(name, f"Memory of the fullest rank: {part.label}, {part.what}.", value, how=less)
