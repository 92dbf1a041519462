"""Plans made by hand, for tests of what is printed, explained, compared and drawn. Their figures are invented, but
they hang together: parts add up to the step, the batch to its groups, energy to watts and days."""

from typing import Any

from colossus.hardware import parse_fleet
from colossus.planner.result import FrontPoint, MixtureGain, Planned
from colossus.spec.goal import Goal
from colossus.spec.layout import Layout
from colossus.spec.plan import Alternative, Estimate, Plan, PoolShare
from colossus.spec.ranged import Ranged
from colossus.zoo import find

GIB = 2**30


def ranged(likely: float, spread: float = 0.1) -> Ranged:
    return Ranged(low=likely * (1 - spread), likely=likely, high=likely * (1 + spread))


def memory(activations: float) -> dict[str, int]:
    gib = {"weights": 5.9, "gradients": 11.8, "optimizer": 4.4, "activations": activations, "communication": 1.7,
           "workspace": 2.1, "fragmentation": 2.3, "context": 0.9}  # fmt: skip
    return {name: int(value * GIB) for name, value in gib.items()}


def mixed_plan(**changes: Any) -> Plan:
    """Llama 3.1 405B on 150,000 H100 and 50,000 H200."""
    fleet = parse_fleet("colossus-200k")
    model = find("llama3.1-405b")
    pools = (
        PoolShare(
            node=fleet.pools[0].node.name, num_groups=290, micro_batch_sequences=1, num_micro_batches=32,
            recompute="selective", spare_nodes=180, idle_chips=80, busy_s=8.42,
            memory_bytes=memory(36.6), memory_limit_bytes=int(79.18 * GIB),
        ),
        PoolShare(
            node=fleet.pools[1].node.name, num_groups=96, micro_batch_sequences=2, num_micro_batches=17,
            recompute="none", spare_nodes=94, idle_chips=96, busy_s=8.31,
            memory_bytes=memory(91.5), memory_limit_bytes=int(139.80 * GIB),
        ),
    )  # fmt: skip
    layout = Layout(replica=386, pp=16, shard=4, cp=1, tp=8, ep=1)
    parts = {"matmul": 4.90, "attention": 0.62, "elementwise": 0.51, "head": 0.03, "recompute": 0.20, "launch": 0.0,
             "tensor": 0.70, "data": 0.21, "pipeline": 0.06, "bubble": 0.86, "optimizer": 0.02, "straggler": 0.26,
             "fixed": 0.05}  # fmt: skip
    step_s = sum(parts.values())
    batch = sum(p.num_groups * layout.shard * p.micro_batch_sequences * p.num_micro_batches for p in pools)
    sequence, tokens = 8192, 15_000_000_000_000
    speed = batch * sequence / step_s
    peak = 989.4e12 * layout.num_ranks
    goodput, watts = 0.95, 285e6
    days = -(-tokens // (batch * sequence)) * step_s / goodput / 86_400
    megawatt_hours = watts * days * 24 / 1e6
    estimate = Estimate(
        step_time_s=ranged(step_s, 0.08), step_parts_s=parts, tokens_per_s=ranged(speed, 0.08),
        mfu=ranged(model.flops_per_token(sequence) * speed / peak, 0.08),
        memory_bytes=ranged(float(pools[1].peak_bytes), 0.05), days=ranged(days, 0.12),
        goodput=Ranged(low=0.91, likely=goodput, high=0.97),
        goodput_whole_job=Ranged(low=0.62, likely=0.74, high=0.84),
        interruptions_per_day=Ranged(low=57.5, likely=94.7, high=162.5),
        interruptions_by_cause={"faulty GPU": 0.353, "GPU HBM3 memory": 0.172, "software bug": 0.129, "other": 0.346},
        checkpoint_interval_s=480.0, facility_watts=ranged(watts, 0.15), energy_mwh=ranged(megawatt_hours, 0.2),
        water_m3=ranged(megawatt_hours / 1.3 * 0.38, 0.5), co2_t=ranged(megawatt_hours * 0.47, 0.4),
        cost_usd=ranged(200_000 * days * 24 * 2.3, 0.3), cost_owned_usd=ranged(200_000 * days * 24 * 1.6, 0.3),
    )  # fmt: skip
    plain: dict[str, Any] = {
        "model": model, "fleet": fleet, "goal": Goal(tokens=tokens), "tokens": tokens, "sequence_tokens": sequence,
        "precision": "bfloat16", "layout": layout, "sharding": "optimizer", "schedule": "interleaved",
        "virtual_stages": 8, "stage_layers": (7, *(8,) * 14, 7), "pools": pools, "estimate": estimate,
        "reasons": {"tp": "the largest that stays within the NVLink domain of 8"},
        "alternatives": {
            "tp": Alternative(value="4", step_time_ratio=1.061), "pp": Alternative(value="8", step_time_ratio=1.034),
            "precision": Alternative(value="fp8", step_time_ratio=0.78),
            "schedule": Alternative(value="1f1b", step_time_ratio=1.09),
        },
    }  # fmt: skip
    return Plan(**{**plain, **changes})


def laptop_plan() -> Plan:
    """GPT-2 on one CPU, without anything to choose."""
    fleet, model = parse_fleet("laptop"), find("gpt2")
    pool = PoolShare(
        node=fleet.pools[0].node.name, num_groups=1, micro_batch_sequences=8, num_micro_batches=4, recompute="none",
        busy_s=400.0, memory_bytes={"weights": 500_000_000, "optimizer": 1_000_000_000},
        memory_limit_bytes=fleet.pools[0].chip.memory_bytes,
    )  # fmt: skip
    exactly = Ranged.exactly
    estimate = Estimate(
        step_time_s=ranged(400.0), step_parts_s={"matmul": 380.0, "head": 20.0}, tokens_per_s=ranged(81.92),
        mfu=ranged(0.4), memory_bytes=ranged(1.5e9), days=ranged(150.0), goodput=exactly(0.999),
        goodput_whole_job=exactly(0.999), interruptions_per_day=exactly(0.00025),
        interruptions_by_cause={"other": 1.0}, checkpoint_interval_s=3600.0, facility_watts=ranged(60.0),
        energy_mwh=ranged(0.2), water_m3=exactly(0.0), co2_t=ranged(0.08), cost_usd=ranged(20.0),
        cost_owned_usd=ranged(20.0),
    )  # fmt: skip
    return Plan(
        model=model, fleet=fleet, goal=Goal(tokens=10**9), tokens=10**9, sequence_tokens=1024,
        precision="float32", layout=Layout(), sharding="none", schedule="none", stage_layers=(12,), pools=(pool,),
        estimate=estimate, reasons={},
    )  # fmt: skip


def planned(plan: Plan | None = None) -> Planned:
    """As the search returns it."""
    plan = plan or mixed_plan()
    front = tuple(
        FrontPoint(
            choice={"tp": 8, "pp": pp, "cp": 1, "ep": 1, "shard": 4, "micro_batch": 1, "recompute": recompute,
                    "schedule": "interleaved", "precision": "bfloat16"},
            seconds_per_token=seconds, memory_headroom_bytes=room * GIB, energy_joules_per_token=energy,
            cost_usd_per_token=cost, group_ranks=32 * pp,
        )
        for pp, recompute, seconds, room, energy, cost in (
            (16, "none", 2.26e-8, 15.0, 6.4, 2.9e-6), (8, "selective", 2.41e-8, 22.0, 6.6, 3.0e-6),
            (16, "full", 2.83e-8, 41.0, 7.4, 3.6e-6),
        )
    )  # fmt: skip
    mixture = None
    if len(plan.pools) > 1:
        mixture = MixtureGain(all_as_weakest=1.043, without={pool.node: 1.3 for pool in plan.pools})
    return Planned(plan=plan, candidates=18_432, feasible=3_214, cpu_s=1.7, front=front, mixture=mixture)
