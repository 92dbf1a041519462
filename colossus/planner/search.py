"""The search: the best candidate of a space, exactly, by evaluating few of them.

A candidate is a layout and, for each pool, a micro-batch and recompute. Its time has a closed-form lower bound: a
micro-batch's compute on the fullest stage, times their number, and the pipeline's least bubble. Candidates are
evaluated in the order of their bounds, thousands at a time as arrays, until the bounds exceed the best time found;
the others cannot be better. What differs only in the number of micro-batches is one candidate: a step's time is
affine in it, so the largest that the batch allows is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from colossus.planner.columns import Array
from colossus.planner.constants import Constants, shipped
from colossus.planner.execution import Execution, Hardware
from colossus.planner.rank_memory import memory_constants, memory_parts
from colossus.planner.schedule import activations_in_flight, makespan_s
from colossus.planner.schedule.order import SCHEDULES
from colossus.planner.schedule.times import StageTimes
from colossus.planner.shape import ModelShape
from colossus.planner.space import PRECISIONS, Layouts, Options
from colossus.planner.step import StepParts, head_s, stage_layers, step_parts
from colossus.spec.fleet import Pool

Indices = npt.NDArray[np.intp]

SOFTWARE = "megatron-core"
"""The stack whose efficiency plans assume: the best that is published."""
ATTENTION = "cudnn"
AT_ONCE = 8192
"""Candidates evaluated together: their arrays stay in the cache."""
OPTIONS_PER_POOL = 3
"""Of a mixed fleet: choices of micro-batch and recompute kept per layout and pool, the fastest per sequence."""
MARGIN = 0.04
"""Share of a chip's memory that plans leave free beyond what published runs could use."""
FRONT_SLACK = 1.25
"""The Pareto front is exact among candidates up to this much slower than the best."""
BUBBLE = {"zb-h1": 1 / 3, "zbv": 1 / 4, "dualpipev": 1 / 4}
"""The least bubble over that of 1F1B: weight gradients fill it (arXiv:2401.10241, arXiv:2405.15362)."""
_BUBBLE = np.array([BUBBLE.get(name, 1.0) for name in SCHEDULES])
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
    chip_rates: Sequence[float]
    """By pool: what an hour of a chip counts for in the objective; all 0: only time counts."""
    all_alike: bool = False
    """Pools do not differ in micro-batch, count and recompute (the weakest decides)."""
    values: dict[str, float] = field(default_factory=shipped)

    def hardware(self, pool: Pool, precision: Array) -> tuple[Hardware, Constants]:
        """Of each row, by its precision."""
        places = np.unique(precision).astype(int)
        rows = np.searchsorted(places, precision.astype(int))
        names = [PRECISIONS[i] for i in places]
        hardware = Hardware.stack([Hardware.of(pool.node, name) for name in names]).take(rows)
        generation = pool.chip.generation
        constants = Constants.gather(
            self.values, [generation] * len(names), names, [SOFTWARE] * len(names), [ATTENTION] * len(names)
        )
        return hardware, constants.take(rows)


@dataclass(frozen=True)
class Candidates:
    """Rows of a search: `layout` [n] and `option` [n, pools], indices."""

    layout: Indices
    option: Indices

    def __len__(self) -> int:
        return len(self.layout)

    def take(self, rows: Any) -> "Candidates":
        return Candidates(self.layout[rows], self.option[rows])


@dataclass(frozen=True)
class Evaluated:
    """Candidates with what was found; arrays [n], or [n, pools]."""

    candidates: Candidates
    seconds_per_token: Array
    objective: Array
    step_s: Array
    busy_s: Array
    """[n, pools]: what a step takes each pool by itself."""
    groups: Array
    micro_batches: Array
    headroom_bytes: Array

    def take(self, rows: Any) -> "Evaluated":
        return Evaluated(**{f.name: getattr(self, f.name)[rows] if f.name != "candidates"
                            else self.candidates.take(rows) for f in fields(self)})  # fmt: skip

    @staticmethod
    def joined(parts: "Sequence[Evaluated]") -> "Evaluated":
        return Evaluated(
            Candidates(
                np.concatenate([part.candidates.layout for part in parts]),
                np.concatenate([part.candidates.option for part in parts]),
            ),
            *(
                np.concatenate([getattr(part, f.name) for part in parts])
                for f in fields(Evaluated)
                if f.name != "candidates"
            ),
        )


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
    )


@dataclass(frozen=True)
class Bounds:
    """By pool and by layout and option [layouts, options]: least seconds, and whether it fits."""

    per_micro_batch_s: Array
    bubble_s: Array
    headroom_bytes: Array


def bounds(problem: Problem, pool: Pool) -> Bounds:
    """The lower bounds of every layout with every option on one pool, and what memory they leave."""
    rows, choice = problem.layouts, problem.options
    num_layouts, num_options = len(rows), len(choice.micro_batch)
    # What a layer takes depends on few columns: each distinct set is computed once.
    keys = np.stack([rows.tp, rows.cp, rows.ep, rows.expert_tp, rows.precision], axis=1)
    distinct, place = np.unique(keys, axis=0, return_inverse=True)
    place = place.reshape(-1)
    count = len(distinct)
    tp, cp, ep, expert_tp, precision = (np.repeat(column, num_options) for column in distinct.T)
    one = np.ones_like(tp)
    alone = Layouts(
        tp=tp, pp=one, chunks=one, cp=cp, ep=ep, expert_tp=expert_tp, shard=one, sharding=0 * one,
        schedule=0 * one, precision=precision, part=one,
    )  # fmt: skip
    micro_batch, recompute = np.tile(choice.micro_batch, count), np.tile(choice.recompute, count)
    hardware, constants = problem.hardware(pool, precision)
    x = execution(problem, alone, micro_batch, recompute, one, one)
    parts = step_parts(problem.shape, x, hardware, constants)
    layer = sum(getattr(parts, name) for name in ON_ONE_RANK) / problem.shape.layers
    head = head_s(problem.shape, x, hardware, constants) * constants.stack
    layer, head = (a.reshape(count, num_options)[place] for a in (np.asarray(layer), np.asarray(head)))
    most, first, last = stage_layers(problem.shape.layers, rows.pp, rows.chunks)
    most, first, last = most[:, None], first[:, None], last[:, None]
    pp, chunks = rows.pp[:, None], rows.chunks[:, None]
    ends = last * layer + head
    slowest = np.maximum(np.maximum(ends, np.where(pp > 1, first * layer, 0.0)), np.where(pp > 2, most * layer, 0.0))
    others = np.where(pp > 1, first * layer + ends + (pp - 2.0) * most * layer - slowest, 0.0)
    bubble = others / chunks * _BUBBLE[rows.schedule.astype(int)][:, None]
    return Bounds(slowest, bubble, _headroom(problem, pool, num_layouts, num_options))


def _headroom(problem: Problem, pool: Pool, num_layouts: int, num_options: int) -> Array:
    """Bytes that the fullest rank leaves of what can be used; negative: it does not fit."""
    rows, choice = problem.layouts, problem.options
    # Memory does not depend on the precision of matmuls, nor on how many groups there are.
    keys = np.stack([getattr(rows, f.name) for f in fields(Layouts) if f.name not in ("precision", "part")], axis=1)
    distinct, place = np.unique(keys, axis=0, return_index=True, return_inverse=True)[1:]
    headroom = np.empty((len(distinct), num_options))
    limit = pool.chip.memory_bytes * (memory_constants()["usable"] - MARGIN)
    step = max(1, 2 * AT_ONCE // num_options)
    for start in range(0, len(distinct), step):
        some = rows.take(np.repeat(distinct[start : start + step], num_options))
        size = len(some) // num_options
        micro_batch, recompute = np.tile(choice.micro_batch, size), np.tile(choice.recompute, size)
        x = execution(problem, some, micro_batch, recompute, np.ones_like(some.tp), 4.0 * some.pp)
        peak = peak_bytes(problem.shape, x, some.schedule)
        headroom[start : start + size] = (limit - peak).reshape(size, num_options)
    return headroom[place.reshape(-1)]


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


class Search:
    """The bounds of a problem, and what has been evaluated of it."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.bounds = [bounds(problem, pool) for pool in problem.pools]
        rows = problem.layouts
        self.groups = np.stack(
            [np.floor(pool.num_chips * rows.part / rows.group_ranks) for pool in problem.pools], axis=1
        )
        self.candidates = self._candidates()
        self.bound = self._bound(self.candidates)
        possible = np.isfinite(self.bound)
        self.num_candidates = len(rows) * len(problem.options.micro_batch) ** (1 if len(problem.pools) == 1 else 2)
        self.candidates, self.bound = self.candidates.take(possible), self.bound[possible]
        order = np.argsort(self.bound, kind="stable")
        self.candidates, self.bound = self.candidates.take(order), self.bound[order]

    def _candidates(self) -> Candidates:
        num_layouts, num_options = self.bounds[0].headroom_bytes.shape
        if len(self.problem.pools) == 1:
            grid = np.indices((num_layouts, num_options)).reshape(2, -1)
            return Candidates(grid[0], grid[1][:, None])
        if self.problem.all_alike:
            grid = np.indices((num_layouts, num_options)).reshape(2, -1)
            return Candidates(grid[0], np.repeat(grid[1][:, None], len(self.problem.pools), axis=1))
        kept = []
        for bound in self.bounds:
            pace = bound.per_micro_batch_s / self.problem.options.micro_batch
            pace = np.where(bound.headroom_bytes >= 0, pace, np.inf)
            kept.append(np.argsort(pace, axis=1)[:, :OPTIONS_PER_POOL])
        shape = (num_layouts, *(OPTIONS_PER_POOL,) * len(kept))
        grid = np.indices(shape).reshape(len(shape), -1)
        return Candidates(
            grid[0], np.stack([k[grid[0], g] for k, g in zip(kept, grid[1:], strict=True)], axis=1)
        )

    def _terms(self, candidates: Candidates) -> tuple[Array, Array, Array, Array, Array]:
        """[n, pools] each: least seconds per micro-batch, least fixed seconds, groups, sequences of one micro-batch
        over all groups; and whether every pool in use fits [n]."""
        layout, option = candidates.layout, candidates.option
        slope = np.stack([b.per_micro_batch_s[layout, option[:, i]] for i, b in enumerate(self.bounds)], axis=1)
        fixed = np.stack([b.bubble_s[layout, option[:, i]] for i, b in enumerate(self.bounds)], axis=1)
        room = np.stack([b.headroom_bytes[layout, option[:, i]] for i, b in enumerate(self.bounds)], axis=1)
        groups = self.groups[layout]
        micro_batch = self.problem.options.micro_batch[option]
        if len(self.problem.pools) == 1:  # a batch too small for all groups keeps some of them idle
            shard = self.problem.layouts.shard[layout][:, None]
            groups = np.minimum(groups, np.floor(self.problem.sequences / (shard * micro_batch)))
        served = groups * self.problem.layouts.shard[layout][:, None] * micro_batch
        fits = np.all((room >= 0) | (groups == 0), axis=1) & (groups.sum(axis=1) > 0)
        return slope, fixed, groups, served, fits

    def _bound(self, candidates: Candidates) -> Array:
        """Least objective of each candidate; infinity where it cannot be."""
        result = np.empty(len(candidates))
        for start in range(0, len(candidates), 2**18):
            rows = slice(start, start + 2**18)
            some = candidates.take(rows)
            slope, fixed, groups, served, fits = self._terms(some)
            counts, possible = self._counts(some, slope, fixed, served)
            step = np.max(np.where(groups > 0, fixed + slope * counts, 0.0), axis=1)
            result[rows] = np.where(
                fits & possible, self._objective(some, step, (served * counts).sum(axis=1), groups), np.inf
            )
        return result

    def _counts(self, candidates: Candidates, slope: Array, fixed: Array, served: Array) -> tuple[Array, Array]:
        """Micro-batches per step of each pool [n, pools], so that all finish together and the batch is not exceeded;
        and whether that can be [n]."""
        used = served > 0
        rate = np.where(used, served / slope, 0.0)
        # All pools stop at T: the batch is Σ rate · (T − fixed).
        finish = (self.problem.sequences + (rate * fixed).sum(axis=1)) / np.maximum(rate.sum(axis=1), 1e-30)
        counts = np.floor(np.where(used, (finish[:, None] - fixed) / slope, 0.0) + 1e-9)
        if len(self.problem.pools) == 1 or self.problem.all_alike:
            counts = np.where(used, np.floor(self.problem.sequences / served.sum(axis=1))[:, None], 0.0)
        rows = self.problem.layouts.take(candidates.layout)
        pp, schedule = rows.pp[:, None], rows.schedule[:, None]
        interleaved = (schedule == SCHEDULES.index("interleaved")) & (counts >= 2 * pp)
        counts = np.where(interleaved, np.floor(counts / pp) * pp, counts)
        least = np.where(schedule == SCHEDULES.index("dualpipev"), 2 * pp, 1.0)
        return counts, np.all((counts >= least) | ~used, axis=1)

    def _objective(self, candidates: Candidates, step_s: Array, sequences: Array, groups: Array) -> Array:
        per_token = step_s / (sequences * self.problem.sequence)
        if not any(self.problem.chip_rates):
            return np.asarray(per_token)
        ranks = self.problem.layouts.group_ranks[candidates.layout]
        return np.asarray(per_token * ranks * (groups @ np.array(self.problem.chip_rates)))

    def evaluate(self, candidates: Candidates) -> Evaluated:
        """The full estimate of some candidates."""
        slope, fixed, groups, served, _ = self._terms(candidates)
        guess, _ = self._counts(candidates, slope, fixed, served)
        rows = self.problem.layouts.take(candidates.layout)
        for i, pool in enumerate(self.problem.pools):
            parts = self.parts(pool, rows, candidates.option[:, i], groups.sum(axis=1), np.maximum(guess[:, i], 1.0))
            lag = 1.0 + parts.straggler_s / (parts.total_s - parts.straggler_s)
            growing = np.asarray(sum(getattr(parts, name) for name in PER_MICRO_BATCH)) * lag
            slope[:, i] = growing / np.maximum(guess[:, i], 1.0)
            fixed[:, i] = parts.total_s - growing
        counts, possible = self._counts(candidates, slope, fixed, served)
        busy = np.where(groups > 0, fixed + slope * counts, 0.0)
        step = np.where(possible, busy.max(axis=1), np.inf)
        sequences = (served * counts).sum(axis=1)
        room = np.stack(
            [
                np.where(groups[:, i] > 0, b.headroom_bytes[candidates.layout, candidates.option[:, i]], np.inf)
                for i, b in enumerate(self.bounds)
            ],
            axis=1,
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            return Evaluated(
                candidates=candidates,
                seconds_per_token=np.where(possible, step / (sequences * self.problem.sequence), np.inf),
                objective=np.where(possible, self._objective(candidates, step, sequences, groups), np.inf),
                step_s=step,
                busy_s=busy,
                groups=groups,
                micro_batches=counts,
                headroom_bytes=room.min(axis=1),
            )

    def parts(self, pool: Pool, rows: Layouts, option: Indices, groups: Array, micro_batches: Array) -> StepParts:
        choice = self.problem.options
        hardware, constants = self.problem.hardware(pool, rows.precision)
        x = execution(
            self.problem, rows, choice.micro_batch[option], choice.recompute[option], groups, micro_batches
        )
        found = step_parts(self.problem.shape, x, hardware, constants)
        share = _BUBBLE[rows.schedule.astype(int)]
        return replace(found, bubble_s=found.bubble_s * share)

    def best(self, keep: npt.NDArray[np.bool_] | None = None, slack: float = 1.0, at_once: int = AT_ONCE) -> Evaluated:
        """Evaluates, in the order of the bounds, until none can come within `slack` of the best objective.

        `keep` chooses candidates. The result is everything evaluated, in no order; empty where nothing is left.
        """
        places = np.arange(len(self.bound)) if keep is None else np.flatnonzero(keep)
        found: list[Evaluated] = []
        least, done = np.inf, 0
        while done < len(places) and self.bound[places[done]] <= least * slack:
            some = places[done : done + at_once]
            some = some[self.bound[some] <= least * slack]
            found.append(self.evaluate(self.candidates.take(some)))
            least = min(least, float(found[-1].objective.min()))
            done += at_once
        if not found:
            return self.evaluate(self.candidates.take(places[:0]))
        return Evaluated.joined(found)


def refined_step_s(problem: Problem, search: Search, evaluated: Evaluated, row: int) -> tuple[float, StepParts]:
    """One candidate's step with its pipeline played as a timeline, every stage with its own layers; and its parts.

    The pool that sets the pace counts.
    """
    pace = int(np.argmax(evaluated.busy_s[row]))
    pool = problem.pools[pace]
    layout = problem.layouts.take(evaluated.candidates.layout[[row]])
    option = evaluated.candidates.option[[row], pace]
    count = evaluated.micro_batches[[row], pace]
    groups = evaluated.groups[[row]].sum(axis=1)
    parts = search.parts(pool, layout, option, groups, count)
    p = int(layout.pp[0])
    if p == 1:
        return float(parts.total_s[0]), parts
    v, m = int(layout.chunks[0]), int(count[0])
    schedule = SCHEDULES[int(layout.schedule[0])]
    choice = problem.options
    hardware, constants = problem.hardware(pool, layout.precision)
    x = execution(problem, layout, choice.micro_batch[option], choice.recompute[option], groups, count)
    most, first, last = (float(a[0]) for a in stage_layers(problem.shape.layers, layout.pp, layout.chunks))
    layers = np.array([first, *[most] * (p - 2), last])
    growing = sum(float(getattr(parts, name)[0]) for name in PER_MICRO_BATCH if name not in ("head_s", "pipeline_s"))
    head = float((head_s(problem.shape, x, hardware, constants) * constants.stack)[0])
    ends = np.maximum(layers * 1.0, 1e-9)
    per_layer = growing / m / _paced(parts, layers, head, m)
    whole = np.repeat((ends * per_layer / v)[:, None], v, axis=1)
    last_rank, last_chunk = (0, v - 1) if schedule in ("zbv", "dualpipev") else (p - 1, v - 1)
    again = {0: 0.0, 1: 0.05, 2: 0.5, 3: 1.0}[int(choice.recompute[option][0])]
    share = 1.0 / (3.0 + again)
    forward, weight = whole * share, whole * share
    back = whole * (1.0 + again) * share
    for times in (forward, back, weight):
        times[last_rank, last_chunk] += head / 3.0
    alone = float(np.max((forward + back + weight).sum(axis=1))) * m
    span = makespan_s(schedule, StageTimes(forward, back, weight), m)
    bubble = max(0.0, span - alone)
    parts = replace(parts, bubble_s=np.array([bubble]))
    return float(parts.total_s[0]), parts


def _paced(parts: StepParts, layers: Array, head: float, micro_batches: int) -> float:
    """Layers of the stage that sets the pace: the last one where the head shows in the parts, else the fullest."""
    return float(layers[-1]) if float(parts.head_s[0]) > 0.5 * head * micro_batches else float(layers.max())
