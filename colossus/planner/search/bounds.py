"""What a search is over, and what needs no search: memory, and lower bounds of time, of every layout and option."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from colossus.planner.estimate.columns import Array
from colossus.planner.estimate.constants import Constants, shipped
from colossus.planner.estimate.execution import FASTEST_EXCHANGE, Execution, Hardware
from colossus.planner.estimate.measured import with_measured
from colossus.planner.estimate.memory import memory_constants, memory_parts
from colossus.planner.estimate.shape import ModelShape
from colossus.planner.estimate.step import head_s, stage_layers, step_parts
from colossus.planner.schedule import activations_in_flight
from colossus.planner.schedule.order import SCHEDULES
from colossus.planner.search.space import PRECISIONS, Layouts, Options
from colossus.spec.fleet import Fabric, Pool
from colossus.spec.model import BYTES_PER_ELEMENT, Dtype
from colossus.spec.run import OptimizerKind

Indices = npt.NDArray[np.intp]

SOFTWARE = "megatron-core"
"""The stack whose efficiency plans assume: the best that is published."""
ATTENTION = "cudnn"
USUAL_FABRIC_EFFICIENCY = 0.9
"""Of the InfiniBand fabrics that the constants were fitted on; a fabric that loses more to congestion is slower. An
oversubscribed tier costs rings nothing: a ring enters and leaves each block of nodes once."""
NVLINK_SHARP = ("hopper", "blackwell")
"""Generations whose NVLink switches add."""
AT_ONCE = 8192
"""Candidates evaluated together: their arrays stay in the cache."""
MARGIN = 0.04
"""Share of a chip's memory that plans leave free beyond what published runs could use."""
BUBBLE = {"zb-h1": 1 / 3, "zbv": 1 / 4, "dualpipev": 1 / 4}
"""The least bubble over that of 1F1B: weight gradients fill it (arXiv:2401.10241, arXiv:2405.15362)."""
BUBBLE_OF_SCHEDULE = np.array([BUBBLE.get(name, 1.0) for name in SCHEDULES])
PER_MICRO_BATCH = (
    "matmul_s", "attention_s", "experts_s", "elementwise_s", "head_s", "recompute_s", "launch_s", "tensor_s",
    "context_s", "expert_s", "shard_s", "pipeline_s",
)  # fmt: skip
"""The parts of a step that grow with the number of micro-batches."""
ON_ONE_RANK = tuple(name for name in PER_MICRO_BATCH if name not in ("shard_s", "pipeline_s", "head_s"))


@dataclass(frozen=True)
class Problem:
    """What is searched for: a model, the pools that can be used, and the largest batch."""

    shape: ModelShape
    pools: Sequence[Pool]
    sequence: int
    sequences: int
    """The largest global batch."""
    layouts: Layouts
    options: Options
    fabric: Fabric
    chip_rates: Sequence[float]
    """By pool: what an hour of a chip counts for in the objective; all 0: only time counts."""
    failures_per_chip_s: Sequence[float] = ()
    """By pool: failures of one chip per second; none: they do not count."""
    absence_s: float = 0.0
    """How long a replica group is away after one of its chips has failed."""
    optimizer: OptimizerKind = "adamw"
    optimizer_state: Dtype = "float32"
    all_alike: bool = False
    """Pools do not differ in micro-batch, count and recompute (the weakest decides)."""
    values: dict[str, float] = field(default_factory=shipped)

    def hardware(self, pool: Pool, precision: Array) -> tuple[Hardware, Constants]:
        """Of each row, by its precision."""
        places = np.unique(precision).astype(int)
        rows = np.searchsorted(places, precision.astype(int))
        names = [PRECISIONS[i] for i in places]
        nic = pool.node.nic_bandwidth * min(1.0, self.fabric.efficiency / USUAL_FABRIC_EFFICIENCY)
        hardware = Hardware.stack(
            [
                replace(
                    Hardware.of(pool.node, name, nic_bandwidth=nic),
                    domain_reduces=np.asarray(float(pool.chip.generation in NVLINK_SHARP)),
                    fabric_reduces=np.asarray(float(self.fabric.in_network_reduction)),
                )
                for name in names
            ]
        ).take(rows)
        generation = pool.chip.generation
        constants = Constants.gather(
            with_measured(self.values, pool.chip),
            [generation] * len(names),
            names,
            [SOFTWARE] * len(names),
            [ATTENTION] * len(names),
        )
        return hardware, constants.take(rows)


def execution(
    problem: Problem, rows: Layouts, micro_batch: Array, recompute: Array, groups: Array, micro_batches: Array
) -> Execution:
    """The candidates' columns, with all that Colossus's own trainer does."""
    one = np.ones_like(rows.tp)
    return Execution(
        sequence=one * problem.sequence,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        tp=rows.tp,
        pp=rows.pp,
        chunks=rows.chunks,
        cp=rows.cp,
        data=groups * rows.shard,
        shard=rows.shard,
        sharding=rows.sharding,
        ep=rows.ep,
        expert_tp=rows.expert_tp,
        recompute=recompute,
        sequence_parallel=one,
        flash=one,
        fused=one,
        few_launches=one,
        score_traffic=one,
        overlap_data=one,
        overlap_tensor=one,
        overlap_experts=one,
        one_copy_per_node=one,
        gradient_bytes=4.0 * one,
        exchange=FASTEST_EXCHANGE * one,
        keeps_gathered=one,
        muon=float(problem.optimizer == "muon") * one,
        state_bytes=BYTES_PER_ELEMENT[problem.optimizer_state] * one,
        whole_groups=one,
    )


@dataclass(frozen=True)
class Peaks:
    """Bytes on the fullest rank, by layout and option."""

    place: Indices
    """[layouts]: many layouts share a row."""
    rows: Array
    """[distinct, options]"""

    def of(self, layout: Any, option: Any) -> Array:
        return np.asarray(self.rows[self.place[layout], option])

    @classmethod
    def compute(cls, problem: "Problem") -> "Peaks":
        """Memory does not depend on the precision of matmuls, nor on how many groups there are."""
        rows, choice = problem.layouts, problem.options
        num_options = len(choice.micro_batch)
        distinct, place = distinct_rows(
            rows, [name for name in LAYOUT_NAMES if name not in ("precision", "part")]
        )
        peak = np.empty((len(distinct), num_options))
        step = max(1, 2 * AT_ONCE // num_options)
        for start in range(0, len(distinct), step):
            some = rows.take(np.repeat(distinct[start : start + step], num_options))
            size = len(some) // num_options
            micro_batch, recompute = np.tile(choice.micro_batch, size), np.tile(choice.recompute, size)
            x = execution(problem, some, micro_batch, recompute, np.ones_like(some.tp), 4.0 * some.pp)
            peak[start : start + size] = peak_bytes(problem.shape, x, some.schedule).reshape(
                size, num_options
            )
        return cls(place, peak)


@dataclass(frozen=True)
class Bounds:
    """Least seconds on one pool, by layout and option."""

    place: Indices
    """[layouts]: many layouts share a row."""
    per_micro_batch: Array
    """[distinct, options]: seconds of a micro-batch on the fullest stage."""
    others: Array
    """[distinct, options]: seconds of one micro-batch on the other stages, over the virtual stages."""
    bubble: Array
    """[layouts]: how much of that the schedule leaves as bubble."""

    def per_micro_batch_s(self, layout: Any, option: Any) -> Array:
        return np.asarray(self.per_micro_batch[self.place[layout], option])

    def bubble_s(self, layout: Any, option: Any) -> Array:
        return np.asarray(self.others[self.place[layout], option] * self.bubble[layout])

    @classmethod
    def compute(cls, problem: "Problem", pool: Pool) -> "Bounds":
        rows, choice = problem.layouts, problem.options
        num_options = len(choice.micro_batch)
        distinct, place = distinct_rows(rows, ["tp", "pp", "chunks", "cp", "ep", "expert_tp", "precision"])
        some = rows.take(distinct)
        # What a layer takes depends on fewer columns still.
        keys = np.stack([some.tp, some.cp, some.ep, some.expert_tp, some.precision], axis=1)
        of_layer, layer_place = np.unique(keys, axis=0, return_inverse=True)
        count = len(of_layer)
        tp, cp, ep, expert_tp, precision = (np.repeat(column, num_options) for column in of_layer.T)
        one = np.ones_like(tp)
        alone = Layouts(
            tp=tp, pp=one, chunks=one, cp=cp, ep=ep, expert_tp=expert_tp, shard=one, sharding=0 * one,
            schedule=0 * one, precision=precision, part=one,
        )  # fmt: skip
        micro_batch, recompute = np.tile(choice.micro_batch, count), np.tile(choice.recompute, count)
        hardware, constants = problem.hardware(pool, precision)
        x = execution(problem, alone, micro_batch, recompute, one, one)
        parts = step_parts(problem.shape, x, hardware, constants)
        layer = np.asarray(sum(getattr(parts, name) for name in ON_ONE_RANK) / problem.shape.layers)
        head = head_s(problem.shape, x, hardware, constants) * constants.stack
        layer, head = (a.reshape(count, num_options)[layer_place.reshape(-1)] for a in (layer, head))
        most, first, last = (a[:, None] for a in stage_layers(problem.shape.layers, some.pp, some.chunks))
        pp = some.pp[:, None]
        ends = last * layer + head
        front = np.where(pp > 1, first * layer, 0.0)
        slowest = np.maximum(np.maximum(ends, front), np.where(pp > 2, most * layer, 0.0))
        others = np.where(pp > 1, front + ends + (pp - 2.0) * most * layer - slowest, 0.0)
        return cls(
            place, slowest, others / some.chunks[:, None], BUBBLE_OF_SCHEDULE[rows.schedule.astype(int)]
        )


LAYOUT_NAMES = [f.name for f in fields(Layouts)]


def distinct_rows(rows: Layouts, names: Sequence[str]) -> tuple[Indices, Indices]:
    """One row for each distinct set of values of some columns, and the place of each row among these."""
    code = np.zeros(len(rows), dtype=np.int64)
    for name in names:
        column = getattr(rows, name)
        values = np.unique(column)
        code = code * len(values) + np.searchsorted(values, column)
    first, place = np.unique(code, return_index=True, return_inverse=True)[1:]
    return first, place.reshape(-1)


def limit_bytes(pool: Pool) -> float:
    """What a plan may fill of a chip."""
    return pool.chip.memory_bytes * (memory_constants()["usable"] - MARGIN)


def peak_bytes(shape: ModelShape, x: Execution, schedule: Array) -> Array:
    """Bytes of the fullest rank, under the schedule's own number of activations in flight."""
    parts = memory_parts(shape, x)
    return np.asarray(parts.needed_bytes + parts.activations_bytes * (in_flight_ratio(x, schedule) - 1.0))


def in_flight_ratio(x: Execution, schedule: Array) -> Array:
    """Activations that the schedule holds over those of (interleaved) 1F1B, which the memory model assumes."""
    usual = np.where(
        x.chunks > 1,
        activations_in_flight("interleaved", x.pp, x.chunks, x.micro_batches, 0.0),
        np.minimum(x.pp, x.micro_batches),
    )
    own = usual.copy()
    for index in np.unique(schedule).astype(int):
        name = SCHEDULES[index]
        if name in ("gpipe", "zb-h1", "zbv", "dualpipev"):
            held = activations_in_flight(name, x.pp, x.chunks, x.micro_batches, 0.0)
            own = np.where(schedule == index, held, own)
    return np.asarray(own / np.maximum(usual, 1e-9))
