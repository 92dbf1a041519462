"""The search: the best candidate of a space, exactly, by evaluating few of them.

A candidate is a layout and, for each pool, a micro-batch and recompute. Its time has a closed-form lower bound: a
micro-batch's compute on the fullest stage, times their number, and the pipeline's least bubble. Candidates are
evaluated in the order of their bounds, thousands at a time as arrays, until the bounds exceed the best time found;
the others cannot be better. What differs only in the number of micro-batches is one candidate: a step's time is
affine in it, so the largest that the batch allows is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from colossus.planner.estimate.columns import Array
from colossus.planner.estimate.step import StepParts, step_parts
from colossus.planner.schedule.order import SCHEDULES
from colossus.planner.search.bounds import (
    AT_ONCE,
    BUBBLE_OF_SCHEDULE,
    LAYOUT_NAMES,
    PER_MICRO_BATCH,
    Bounds,
    Indices,
    Peaks,
    Problem,
    execution,
    limit_bytes,
)
from colossus.planner.search.space import Layouts
from colossus.spec.fleet import Pool

OPTIONS_PER_POOL = 3
"""Of a mixed fleet: choices of micro-batch and recompute kept per layout and pool, the fastest per sequence."""
SMALL_SPACE = 50_000
"""Layouts up to which all are followed, in every option."""
PROMISING = 3.0
"""Of larger spaces: followed are layouts whose least time is within three times the least of all,"""
PROMISING_PER_CHOICE = 200
"""and of every value of every choice so many of the best."""
FRONT_SLACK = 1.25
"""The Pareto front is exact among candidates up to this much slower than the best."""


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
        for name in LAYOUT_NAMES:
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
        """Seconds per token, or what the nodes cost meanwhile, stretched by what failures take away."""
        problem = self.problem
        ranks = self.ranks[candidates.layout]
        value = step_s / np.maximum(sequences * problem.sequence, 1e-9) * self._stretch(ranks, groups)
        if any(problem.chip_rates):
            per_node = np.array([float(pool.node.num_chips) for pool in problem.pools])
            held = np.ceil(ranks[:, None] * groups / per_node) * per_node
            value = value * (held @ np.array(problem.chip_rates))
        return np.asarray(value)

    def _stretch(self, ranks: Array, groups: Array) -> Array:
        """Each failure takes one group of all groups away, for as long as it is absent."""
        if not self.problem.failures_per_chip_s:
            return np.ones_like(ranks)
        rate = ranks * (groups @ np.array(self.problem.failures_per_chip_s))
        return np.asarray(1.0 + rate * self.problem.absence_s / np.maximum(groups.sum(axis=1), 1.0))

    def stretch(self, evaluated: Evaluated) -> Array:
        """How much longer failures make a run."""
        return self._stretch(self.ranks[evaluated.candidates.layout], evaluated.groups)

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
        share = BUBBLE_OF_SCHEDULE[rows.schedule.astype(int)]
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
