"""Why each choice of a plan is what it is; and, from advice.py, what deserves attention.

Pure functions of a Plan.
"""

from collections.abc import Iterator

from colossus.planner.explain.advice import advice
from colossus.planner.explain.facts import GIB, domain_bound, ideal_bubble, limit_text, pace_setter
from colossus.spec.plan import Plan
from colossus.units import format_count

__all__ = ["advice", "reasons"]


def reasons(plan: Plan) -> dict[str, str]:
    """Why each choice is what it is, by field, a sentence each: the plan's own, and for other fields a general one."""
    return {**dict(_general_reasons(plan)), **plan.reasons}


def _general_reasons(plan: Plan) -> Iterator[tuple[str, str]]:
    layout, pace = plan.layout, pace_setter(plan)
    domain = min(pool.node.scale_up_chips for pool in plan.fleet.pools)
    if layout.tp == 1:
        yield "tp", "a layer's matmuls fit on one chip, and nothing is sent inside a layer"
    else:
        yield "tp", domain_bound(plan).removeprefix(f"tp {layout.tp} ")
    weights = plan.model.num_params()
    if layout.pp > 1:
        yield "pp", f"each stage has {max(plan.stage_layers)} of {plan.model.num_layers} layers"
        yield (
            "stage_layers",
            (
                "the layers divide evenly"
                if len(set(plan.stage_layers)) == 1
                else "the first and the last stage have the embedding and the head to carry besides"
            ),
        )
        ideal = ideal_bubble(plan) or 0.0
        yield (
            "schedule",
            f"its bubble is at least {ideal:.1%} of the work, with {pace.num_micro_batches} micro-batches",
        )
        yield (
            "virtual_stages",
            f"{plan.virtual_stages} chunks of layers on each rank make the bubble that much shorter",
        )
    else:
        yield "pp", f"all {plan.model.num_layers} layers fit on one rank, so there is no bubble"
        yield "stage_layers", "there is one stage"
        yield "schedule", "without pp there is nothing to schedule"
        yield "virtual_stages", "without pp there are no virtual stages"
    yield (
        "cp",
        (
            f"sequences of {plan.sequence_tokens:,} tokens fit on one rank"
            if layout.cp == 1
            else f"{plan.sequence_tokens:,} tokens of a sequence are {plan.sequence_tokens // layout.cp:,} on each "
            f"rank; keys and values by {plan.context_exchange}"
        ),
    )
    mlp = plan.model.mlp
    if mlp.kind == "dense":
        yield "ep", "the model has no experts"
        yield "expert_tp", "the model has no experts"
    else:
        held = mlp.num_experts / layout.ep
        within = "within" if layout.ep <= domain else "beyond"
        yield (
            "ep",
            f"{held:g} of {mlp.num_experts} experts on each rank, {within} the NVLink domain of {domain}",
        )
        yield (
            "expert_tp",
            f"each expert's matrices are split over {plan.expert_tp} rank{'s'[: plan.expert_tp > 1]}",
        )
    yield (
        "shard",
        f"groups of {layout.group_ranks:,} chips: {layout.shard} shards of its samples and of what is sharded",
    )
    yield "replica", f"whole groups of {layout.group_ranks:,} chips, beside spares"
    yield (
        "sharding",
        {
            "none": f"each rank holds the whole state of its {format_count(weights / (layout.tp * layout.pp))} weights",
            "optimizer": "the optimizer's state is split, and weights are sent once per step",
            "gradients": "gradients and the optimizer's state are split",
            "weights": "weights are split too: least memory, most traffic",
        }[plan.sharding],
    )
    chips = {pool.chip.name for pool in plan.fleet.pools}
    yield "precision", f"{', '.join(sorted(chips))} run it; master weights stay float32"
    for name in ("optimizer", "optimizer_state"):
        yield name, "asked for" if name in plan.goal.fixed else f"the usual one; --fix {name}=… takes another"
    yield "micro_batch", (f"the fullest rank holds {pace.peak_bytes / GIB:.1f} of {limit_text(pace)}")
    yield (
        "num_micro_batches",
        (
            f"with {layout.shard} × {layout.replica} data-parallel ranks they make {plan.global_batch_sequences:,} "
            f"sequences per step"
        ),
    )
    yield (
        "recompute",
        (
            "all activations fit"
            if pace.recompute == "none"
            else "keeping everything would not fit, or cost more"
        ),
    )
