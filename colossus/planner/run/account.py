"""What a run takes: days, failures, energy, water, carbon, dollars; each with low, likely and high."""

import math
from collections.abc import Mapping, Sequence
from datetime import date

import numpy as np

from colossus.errors import ConfigError
from colossus.planner.estimate.step import StepParts
from colossus.planner.evidence import intervals
from colossus.planner.run import power, price, reliability
from colossus.spec.fleet import Chip, Fleet, Pool, Precision
from colossus.spec.model import ModelSpec
from colossus.spec.plan import Estimate, PoolShare
from colossus.spec.ranged import Ranged

STATE_BYTES_PER_PARAMETER = 14
"""A checkpoint: 16-bit weights, float32 master weights and two moments."""
DEVICE_TO_HOST_BYTES_PER_S = 25e9
"""Per chip, all chips of a node at once (assumed: half of PCIe 5 x16); training stands still meanwhile."""
LEAST_STALL_S = 1.0
"""For all ranks to agree on a checkpoint and to start it (assumed)."""
NODE_WRITE_BYTES_PER_S = 2e9
"""Of one node to shared storage, in the background (assumed)."""
LEAST_SHARE = 1e-6
"""Goodput below which a run is as good as endless."""
SPREAD_OF_MEMORY = (0.98, 1.08)
"""The published peaks lie within this of the prediction four times in five (benchmarks/planner_accuracy.md)."""


def account(
    model: ModelSpec,
    fleet: Fleet,
    pools: Sequence[Pool],
    shares: Sequence[PoolShare],
    axes: Mapping[str, int],
    parts: StepParts,
    step_s: float,
    step_tokens: int,
    tokens: int,
    sequence: int,
    precision: Precision,
    today: date,
) -> Estimate:
    """The estimate of a plan whose step takes `step_s` likely seconds."""
    by_name = {pool.node.name: pool for pool in pools}
    group = axes["tp"] * axes["pp"] * axes["cp"] * axes["shard"]
    chips = sum(share.num_groups for share in shares) * group
    pace = max(shares, key=lambda share: share.busy_s)
    low, high = step_interval(model, parts, by_name[pace.node].chip, precision, sequence, chips)
    step = Ranged(low=step_s * low, likely=step_s, high=step_s * high)
    rate = _inverse(step) * step_tokens
    peak = sum(share.num_groups * group * by_name[share.node].chip.peak_flops[precision] for share in shares)
    mfu = rate * (model.flops_per_token(sequence) / peak)

    # What trains or stands ready counts; chips left over can be used by others.
    used = [
        pool.model_copy(
            update={
                "num_nodes": math.ceil(share.num_groups * group / pool.node.num_chips) + share.spare_nodes
            }
        )
        for share in shares
        for pool in [by_name[share.node]]
    ]
    failures = reliability.together(
        [
            reliability.failures(by_name[share.node].chip.generation, share.num_groups * group)
            for share in shares
        ]
    )
    state = STATE_BYTES_PER_PARAMETER * model.num_params()
    stall_s = LEAST_STALL_S + state / group / DEVICE_TO_HOST_BYTES_PER_S
    write_s = state / (max(1, group // shares_node(by_name, shares)) * NODE_WRITE_BYTES_PER_S)
    mtbf_s = reliability.DAY_S / failures.per_day.likely
    interval_s = reliability.best_interval_s(mtbf_s, stall_s, max(step_s, write_s))
    checkpoints = reliability.Checkpoints(interval_s=interval_s, stall_s=stall_s, write_s=write_s)
    restart = reliability.published("restart_s")
    whole = reliability.whole_job_goodput(failures, restart, checkpoints).share
    groups = sum(share.num_groups for share in shares)
    goodput = whole
    if groups > 1:
        in_repair = reliability.nodes_in_repair(failures, reliability.published("repair_days"))
        spare = sum(share.spare_nodes for share in shares)
        missing = min(
            reliability.expected_missing_groups(
                in_repair.likely, spare, max(1, group // shares_node(by_name, shares))
            ),
            groups * 0.9,
        )
        by_replica = reliability.replica_goodput(
            failures,
            groups,
            step_s,
            reliability.published("replica_stall_s"),
            reliability.published("replica_absence_s"),
            restart,
            checkpoints,
            missing,
        ).share
        goodput = by_replica if by_replica.likely > whole.likely else whole

    days = _over(step * (tokens / step_tokens / reliability.DAY_S), goodput)
    busy = goodput.likely * (1.0 - float((parts.bubble_s / parts.total_s)[0]))
    energy = power.run_energy(used, fleet.site, days.likely, min(1.0, max(0.0, busy)))
    stretch = Ranged(low=days.low / days.likely, likely=1.0, high=days.high / days.likely)
    owned = price.owned_usd(used, fleet.site, days.likely, min(1.0, max(0.0, busy))) * stretch
    try:
        rented = Ranged.exactly(0.0)
        for pool in used:
            rent = price.rent(pool.chip.name, today).usd_per_chip_hour
            rented = rented + price.rented_usd(24 * days.likely * pool.num_chips, rent)
        cost = rented * stretch
    except ConfigError:
        cost = owned
    peak_bytes = float(max(share.peak_bytes for share in shares))
    return Estimate(
        step_time_s=step,
        step_parts_s={
            name.removesuffix("_s"): float(getattr(parts, name)[0]) for name in parts.__dataclass_fields__
        },
        tokens_per_s=rate,
        mfu=mfu,
        memory_bytes=Ranged(
            low=peak_bytes * SPREAD_OF_MEMORY[0], likely=peak_bytes, high=peak_bytes * SPREAD_OF_MEMORY[1]
        ),
        days=days,
        goodput=goodput,
        goodput_whole_job=whole,
        interruptions_per_day=failures.per_day,
        interruptions_by_cause=failures.by_cause,
        checkpoint_interval_s=interval_s,
        facility_watts=energy.facility_watts,
        energy_mwh=energy.facility_mwh * stretch,
        water_m3=energy.water_litres * stretch * 1e-3,
        co2_t=energy.tonnes_co2e * stretch,
        cost_usd=cost,
        cost_owned_usd=owned,
    )


def step_interval(
    model: ModelSpec, parts: StepParts, chip: Chip, precision: Precision, sequence: int, num_chips: int
) -> tuple[float, float]:
    """Low and high step time over the likely one, four times in five: of software that nobody measured."""
    spread, seen = intervals.shipped()
    sizes = np.array([[float(model.hidden_size), float(sequence), float(num_chips)]])
    distance = intervals.Distance.of(seen, [chip.generation], [precision], [None], sizes)
    low, high = intervals.interval(parts, distance, spread)
    likely = float(parts.total_s[0])
    return float(low[0]) / likely, float(high[0]) / likely


def shares_node(by_name: Mapping[str, Pool], shares: Sequence[PoolShare]) -> int:
    """Chips of a node; of a mixed fleet the smallest."""
    return min(by_name[share.node].node.num_chips for share in shares)


def _inverse(value: Ranged) -> Ranged:
    return Ranged(low=1 / value.high, likely=1 / value.likely, high=1 / value.low)


def _over(value: Ranged, share: Ranged) -> Ranged:
    return Ranged(
        low=value.low / max(share.high, LEAST_SHARE),
        likely=value.likely / max(share.likely, LEAST_SHARE),
        high=value.high / max(share.low, LEAST_SHARE),
    )
