"""The search: the best candidate of a space, exactly, by evaluating few of them.

A candidate is a layout and, for each pool, a micro-batch and recompute. Its time has a closed-form lower bound: a
micro-batch's compute on the fullest stage, times their number, and the pipeline's least bubble. Candidates are
evaluated in the order of their bounds, thousands at a time as arrays, until the bounds exceed the best time found;
the others cannot be better. What differs only in the number of micro-batches is one candidate: a step's time is
affine in it, so the largest that the batch allows is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from colossus.planner.estimate.columns import Array
from colossus.planner.estimate.constants import Constants, shipped
from colossus.planner.estimate.execution import Execution, Hardware
from colossus.planner.estimate.memory import memory_constants, memory_parts
from colossus.planner.estimate.shape import ModelShape
from colossus.planner.estimate.step import StepParts, head_s, stage_layers, step_parts
from colossus.planner.schedule import activations_in_flight, makespan_s
from colossus.planner.schedule.order import SCHEDULES
from colossus.planner.schedule.times import StageTimes
from colossus.planner.search.space import PRECISIONS, Layouts, Options
from colossus.spec.fleet import Fabric, Pool

Indices = npt.NDArray[np.intp]

SOFTWARE = "megatron-core"
"""The stack whose efficiency plans assume: the best that is published."""
ATTENTION = "cudnn"
USUAL_FABRIC_EFFICIENCY = 0.9
"""Of the InfiniBand fabrics that the constants were fitted on; a fabric that loses more to congestion is slower. An
oversubscribed tier costs rings nothing: a ring enters and leaves each block of nodes once."""
AT_ONCE = 8192
"""Candidates evaluated together: their arrays stay in the cache."""
OPTIONS_PER_POOL = 3
"""Of a mixed fleet: choices of micro-batch and recompute kept per layout and pool, the fastest per sequence."""
SMALL_SPACE = 50_000
"""Layouts up to which all are followed, in every option."""
PROMISING = 3.0
"""Of larger spaces: followed are layouts whose least time is within three times the least of all,"""
PROMISING_PER_CHOICE = 200
"""and of every value of every choice so many of the best."""
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
    fabric: Fabric
    chip_rates: Sequence[float]
    """By pool: what an hour of a chip counts for in the objective; all 0: only time counts."""
    failures_per_chip_s: Sequence[float] = ()
    """By pool: failures of one chip per second; none: they do not count."""
    absence_s: float = 0.0
    """How long a replica group is away after one of its chips has failed."""
    all_alike: bool = False
    """Pools do not differ in micro-batch, count and recompute (the weakest decides)."""
    values: dict[str, float] = field(default_factory=shipped)

    def hardware(self, pool: Pool, precision: Array) -> tuple[Hardware, Constants]:
        """Of each row, by its precision."""
        places = np.unique(precision).astype(int)
        rows = np.searchsorted(places, precision.astype(int))
        names = [PRECISIONS[i] for i in places]
        nic = pool.node.nic_bandwidth * min(1.0, self.fabric.efficiency / USUAL_FABRIC_EFFICIENCY)
        hardware = Hardware.stack([Hardware.of(pool.node, name, nic_bandwidth=nic) for name in names]).take(
            rows
        )
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
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "candidates"}
        return Evaluated(candidates=self.candidates.take(rows), **arrays)

    @staticmethod
    def none(num_pools: int) -> "Evaluated":
        line, table = np.empty(0), np.empty((0, num_pools))
        return Evaluated(
            Candidates(np.empty(0, int), np.empty((0, num_pools), int)),
            line,
            line,
            line,
            table,
            table,
            table,
            line,
        )

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
        distinct, place = _distinct(rows, [name for name in _NAMES if name not in ("precision", "part")])
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
        distinct, place = _distinct(rows, ["tp", "pp", "chunks", "cp", "ep", "expert_tp", "precision"])
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
        return cls(place, slowest, others / some.chunks[:, None], _BUBBLE[rows.schedule.astype(int)])


_NAMES = [f.name for f in fields(Layouts)]


def _distinct(rows: Layouts, names: Sequence[str]) -> tuple[Indices, Indices]:
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


class Search:
    """The bounds of a problem, and what has been evaluated of it."""

    def __init__(
        self, problem: Problem, peaks: Peaks | None = None, bounds: "Sequence[Bounds] | None" = None
    ) -> None:
        """`peaks` and `bounds` are another search's, over the same layouts and options: what it computed need not be
        computed again."""
        self.problem = problem
        self.peaks = Peaks.compute(problem) if peaks is None else peaks
        self.bounds = (
            [Bounds.compute(problem, pool) for pool in problem.pools] if bounds is None else list(bounds)
        )
        self.limits = [limit_bytes(pool) for pool in problem.pools]
        rows = problem.layouts
        self.ranks = rows.group_ranks
        self.groups = np.stack(
            [np.floor(pool.num_chips * rows.part / self.ranks) for pool in problem.pools], axis=1
        )
        self.num_candidates = len(rows) * len(problem.options.micro_batch) ** len(problem.pools)
        candidates = self._candidates()
        bound = self._bound(candidates)
        possible = np.flatnonzero(np.isfinite(bound))
        possible = possible[np.argsort(bound[possible], kind="stable")]
        self.candidates, self.bound = candidates.take(possible), bound[possible]

    def _candidates(self) -> Candidates:
        """Layouts × options; of a mixed fleet the same option in all pools, and pools that differ, each with one of its
        fastest options per sequence."""
        problem = self.problem
        paces = []
        for bound, limit in zip(self.bounds, self.limits, strict=True):
            pace = bound.per_micro_batch[bound.place] / problem.options.micro_batch
            pace[self.peaks.rows[self.peaks.place] > limit] = np.inf
            paces.append(pace)
        followed = np.flatnonzero(self._promising(paces))
        layout, option = (
            a.reshape(-1) for a in np.meshgrid(followed, np.arange(paces[0].shape[1]), indexing="ij")
        )
        alike = Candidates(layout, np.repeat(option[:, None], len(paces), axis=1))
        if len(paces) == 1 or problem.all_alike:
            return alike
        fast = [np.argsort(pace[followed], axis=1)[:, :OPTIONS_PER_POOL] for pace in paces]
        shape = (len(followed), *(options_.shape[1] for options_ in fast))
        grid = np.indices(shape).reshape(len(shape), -1)
        differing = np.stack(
            [options_[grid[0], g] for options_, g in zip(fast, grid[1:], strict=True)], axis=1
        )
        return Candidates(
            np.concatenate([layout, followed[grid[0]]]), np.concatenate([alike.option, differing])
        )

    def _promising(self, paces: Sequence[Array]) -> npt.NDArray[np.bool_]:
        """Which layouts to follow: of a small space all; of a large one those whose least time, each pool at its
        fastest, is near the least of all, and of every value of every choice the best ones."""
        rows = self.problem.layouts
        fastest = Candidates(np.arange(len(rows)), np.stack([pace.argmin(axis=1) for pace in paces], axis=1))
        possible = np.any([np.isfinite(pace.min(axis=1)) for pace in paces], axis=0)
        if len(rows) <= SMALL_SPACE:
            return np.asarray(possible)
        least = self._bound(fastest)
        least = np.where(np.isfinite(least), least, np.where(possible, np.inf, np.nan))
        keep = least <= np.nanmin(least) * PROMISING
        for name in _NAMES:
            column = getattr(rows, name)
            for value in np.unique(column):
                here = np.flatnonzero((column == value) & possible)
                keep[here[np.argsort(least[here])[:PROMISING_PER_CHOICE]]] = True
        return np.asarray(keep)

    def _terms(self, candidates: Candidates) -> tuple[Array, Array, Array, Array, npt.NDArray[np.bool_]]:
        """[n, pools] each: least seconds per micro-batch, least fixed seconds, groups, sequences of one micro-batch
        over all groups; and whether every pool in use fits [n]."""
        layout, option = candidates.layout, candidates.option
        each = [(bound, option[:, i]) for i, bound in enumerate(self.bounds)]
        slope = np.stack([bound.per_micro_batch_s(layout, own) for bound, own in each], axis=1)
        fixed = np.stack([bound.bubble_s(layout, own) for bound, own in each], axis=1)
        room = self.headroom_bytes(candidates)
        groups = self.groups[layout]
        micro_batch = self.problem.options.micro_batch[option]
        if len(self.problem.pools) == 1:  # a batch too small for all groups keeps some of them idle
            shard = self.problem.layouts.shard[layout][:, None]
            groups = np.minimum(groups, np.floor(self.problem.sequences / (shard * micro_batch)))
        served = groups * self.problem.layouts.shard[layout][:, None] * micro_batch
        fits = np.all((room >= 0) | (groups == 0), axis=1) & (groups.sum(axis=1) > 0)
        return slope, fixed, groups, served, fits

    def headroom_bytes(self, candidates: Candidates) -> Array:
        """Bytes that the fullest rank leaves of what a plan may fill [n, pools]; negative: it does not fit."""
        peaks = [self.peaks.of(candidates.layout, candidates.option[:, i]) for i in range(len(self.limits))]
        return np.stack([limit - peak for limit, peak in zip(self.limits, peaks, strict=True)], axis=1)

    def _bound(self, candidates: Candidates) -> Array:
        """Least objective of each candidate; infinity where it cannot be."""
        result = np.empty(len(candidates))
        for start in range(0, len(candidates), 2**18):
            rows = slice(start, start + 2**18)
            some = candidates.take(rows)
            slope, fixed, groups, served, fits = self._terms(some)
            counts, possible = self._counts(some, slope, fixed, served)
            if self._equal_counts:
                step = np.max(np.where(groups > 0, fixed + slope * counts, 0.0), axis=1)
                sequences = (served * counts).sum(axis=1)
            else:  # whatever the rounding: T / (batch at T) is least where the batch is full
                step, sequences = (
                    self._finish_s(slope, fixed, served),
                    0.0 * served[:, 0] + self.problem.sequences,
                )
                possible = self._counts(some, slope, fixed, served, more=1.0)[1]
            value = self._objective(some, step, sequences, groups)
            result[rows] = np.where(fits & possible, value, np.inf)
        return result

    @property
    def _equal_counts(self) -> bool:
        return len(self.problem.pools) == 1 or self.problem.all_alike

    def _finish_s(self, slope: Array, fixed: Array, served: Array) -> Array:
        """When all pools stop together after the largest batch: Σ served / slope · (T − fixed) = batch."""
        rate = served / slope
        return np.asarray(
            (self.problem.sequences + (rate * fixed).sum(axis=1)) / np.maximum(rate.sum(axis=1), 1e-30)
        )

    def _counts(
        self, candidates: Candidates, slope: Array, fixed: Array, served: Array, *, more: float = 0.0
    ) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Micro-batches per step of each pool [n, pools], so that all finish together and the batch is not exceeded;
        and whether the schedule can run so many (with `more`) [n]."""
        used = served > 0
        if self._equal_counts:
            whole = np.maximum(served.sum(axis=1), 1e-9)
            counts = np.where(used, np.floor(self.problem.sequences / whole)[:, None], 0.0)
        else:
            finish = self._finish_s(slope, fixed, served)[:, None]
            counts = np.floor(np.where(used, (finish - fixed) / slope, 0.0) + 1e-9 + more)
        rows = self.problem.layouts.take(candidates.layout)
        pp, schedule = rows.pp[:, None], rows.schedule[:, None]
        interleaved = schedule == SCHEDULES.index("interleaved")
        counts = np.where(interleaved, np.floor(counts / pp) * pp, counts)
        # With fewer, the V-shaped schedules have nothing to fill their warm-up with.
        v_shaped = (schedule == SCHEDULES.index("dualpipev")) | (schedule == SCHEDULES.index("zbv"))
        least = np.where(v_shaped, 2 * pp, np.where(interleaved, pp, 1.0))
        return counts, np.all((counts >= least) | ~used, axis=1)

    def _objective(self, candidates: Candidates, step_s: Array, sequences: Array, groups: Array) -> Array:
        """Seconds per token (or what the chips cost meanwhile), stretched by what failures take away: each one a
        group of all groups, for as long as it is absent."""
        problem = self.problem
        ranks = self.ranks[candidates.layout]
        value = step_s / np.maximum(sequences * problem.sequence, 1e-9)
        if problem.failures_per_chip_s:
            rate = ranks * (groups @ np.array(problem.failures_per_chip_s))
            value = value * (1.0 + rate * problem.absence_s / np.maximum(groups.sum(axis=1), 1.0))
        if any(problem.chip_rates):
            value = value * ranks * (groups @ np.array(problem.chip_rates))
        return np.asarray(value)

    def evaluate(self, candidates: Candidates) -> Evaluated:
        """The full estimate of some candidates."""
        slope, fixed, groups, served, _ = self._terms(candidates)
        guess, _ = self._counts(candidates, slope, fixed, served)
        rows = self.problem.layouts.take(candidates.layout)
        for i, pool in enumerate(self.problem.pools):
            parts = self.parts(
                pool, rows, candidates.option[:, i], groups.sum(axis=1), np.maximum(guess[:, i], 1.0)
            )
            lag = 1.0 + parts.straggler_s / (parts.total_s - parts.straggler_s)
            growing = np.asarray(sum(getattr(parts, name) for name in PER_MICRO_BATCH)) * lag
            slope[:, i] = growing / np.maximum(guess[:, i], 1.0)
            fixed[:, i] = parts.total_s - growing
        counts, possible = self._counts(candidates, slope, fixed, served)
        busy = np.where(groups > 0, fixed + slope * counts, 0.0)
        step = np.where(possible, busy.max(axis=1), np.inf)
        sequences = (served * counts).sum(axis=1)
        room = np.where(groups > 0, self.headroom_bytes(candidates), np.inf)
        tokens = np.maximum(sequences * self.problem.sequence, 1e-9)
        return Evaluated(
            candidates=candidates,
            seconds_per_token=np.where(possible, step / tokens, np.inf),
            objective=np.where(possible, self._objective(candidates, step, sequences, groups), np.inf),
            step_s=step,
            busy_s=busy,
            groups=groups,
            micro_batches=counts,
            headroom_bytes=room.min(axis=1),
        )

    def parts(
        self, pool: Pool, rows: Layouts, option: Indices, groups: Array, micro_batches: Array
    ) -> StepParts:
        choice = self.problem.options
        hardware, constants = self.problem.hardware(pool, rows.precision)
        x = execution(
            self.problem, rows, choice.micro_batch[option], choice.recompute[option], groups, micro_batches
        )
        found = step_parts(self.problem.shape, x, hardware, constants)
        share = _BUBBLE[rows.schedule.astype(int)]
        return replace(found, bubble_s=found.bubble_s * share)

    def best(
        self, keep: npt.NDArray[np.bool_] | None = None, slack: float = 1.0, at_once: int = AT_ONCE
    ) -> Evaluated:
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
            return Evaluated.none(len(self.problem.pools))
        return Evaluated.joined(found)


MOST_REFINED = 400
"""Timelines played for one choice; ties beyond are decided by the closed form."""


class Picked(NamedTuple):
    """The chosen row of what was evaluated, its pipeline played as a timeline."""

    row: int
    objective: float
    step_s: float
    parts: StepParts


def choose(
    problem: Problem, search: Search, evaluated: Evaluated, *, most: int = MOST_REFINED
) -> Picked | None:
    """The best row with its objective, step seconds and parts, pipelines played as timelines.

    With uneven stages the closed form may exceed the timeline by up to 3 %, so that rows beyond that need not be
    played. Of rows within 0.2 %, the smallest replica group wins (a failure takes the
    least away), then the most memory left.
    """
    order = np.argsort(evaluated.objective, kind="stable")
    played: list[Picked] = []
    least = np.inf
    for row in order[:most]:
        if not np.isfinite(evaluated.objective[row]) or evaluated.objective[row] > least * CLOSED_FORM_EXCESS:
            break
        step_s, parts = refined_step_s(problem, search, evaluated, int(row))
        objective = float(evaluated.objective[row]) * step_s / float(evaluated.step_s[row])
        least = min(least, objective)
        played.append(Picked(int(row), objective, step_s, parts))
    if not played:
        return None
    ranks = search.ranks[evaluated.candidates.layout]
    close = [entry for entry in played if entry.objective <= least * TIE]
    return min(close, key=lambda entry: (ranks[entry.row], -evaluated.headroom_bytes[entry.row]))


TIE = 1.002
CLOSED_FORM_EXCESS = 1.03


def refined_step_s(
    problem: Problem, search: Search, evaluated: Evaluated, row: int
) -> tuple[float, StepParts]:
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
    growing = sum(
        float(getattr(parts, name)[0]) for name in PER_MICRO_BATCH if name not in ("head_s", "pipeline_s")
    )
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
