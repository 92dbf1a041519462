"""Plans of any layout for real processes of this machine, by hand: what a plan file needs beside a job."""

from pathlib import Path
from typing import Any

from colossus.hardware import parse_fleet
from colossus.spec.goal import Goal
from colossus.spec.job import Job
from colossus.spec.model import ModelSpec
from colossus.spec.plan import Estimate, Plan, PoolShare
from colossus.spec.ranged import Ranged
from colossus.spec.run import OptimizerKind
from tests.parallel.layouts import job


def plan_of(
    model: ModelSpec,
    *,
    tokens: int = 10**6,
    like: Job | None = None,
    optimizer: OptimizerKind = "adamw",
    **settings: Any,
) -> Plan:
    """A plan of the job that `settings` (as of `layouts.job`) make. Its figures are invented."""
    made = like or job(model, **settings)
    some, nothing = Ranged.exactly(1.0), Ranged.exactly(0.0)
    num_ranks = made.layout.num_ranks
    fleet = parse_fleet(f"{'laptop' if num_ranks <= 16 else 'h100'}:{num_ranks}")
    estimate = Estimate(
        step_time_s=some, step_parts_s={"matmul": 1.0}, tokens_per_s=some, mfu=some, memory_bytes=some, days=some,
        goodput=some, goodput_whole_job=some, interruptions_per_day=nothing, interruptions_by_cause={},
        checkpoint_interval_s=60.0, facility_watts=some, energy_mwh=some, water_m3=nothing, co2_t=nothing,
        cost_usd=some, cost_owned_usd=some,
    )  # fmt: skip
    pools = tuple(
        PoolShare(
            node=f"laptop{i or ''}", num_groups=share.num_groups, micro_batch_sequences=share.micro_batch_sequences,
            num_micro_batches=share.num_micro_batches, recompute=share.recompute, busy_s=1.0,
            memory_bytes={"weights": 10**8}, memory_limit_bytes=10**10,
        )
        for i, share in enumerate(made.shares)
    )  # fmt: skip
    fields = {name: getattr(made, name) for name in Job.model_fields if name != "shares"}
    return Plan(
        model=model, fleet=fleet, goal=Goal(tokens=tokens), tokens=tokens, pools=pools, estimate=estimate, reasons={},
        optimizer=optimizer, **fields,
    )  # fmt: skip


def write_plan(path: Path, model: ModelSpec, **settings: Any) -> Path:
    path.write_text(plan_of(model, **settings).to_json(), encoding="utf-8")
    return path
