"""Makespans of many sets of stage times at once, without simulating every micro-batch.

Between filling and emptying, a pipeline repeats itself. Its graph is simulated with few micro-batches and cut in the
repeating part; the ends of the operations on the cut (those that a later operation waits for) decide all that comes
after. If they are all `d` later than the same operations one period before, every further period takes exactly `d`.
If they are between d_min and d_max later, so they are in every period to come, because a longest path can neither
catch up nor fall behind by more than its inputs did (the map from cut to cut is max-plus linear; Baccelli et al.,
"Synchronization and Linearity", 1992). So the number of micro-batches grows until that range is narrow enough.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from colossus.planner.schedule.graph import Floats, Graph, Ints, durations, ends_s, graph
from colossus.planner.schedule.order import Op, Schedule, check_shape, micro_batch_group
from colossus.planner.schedule.times import StageTimes, check_times

SETS_AT_ONCE = 128
"""More sets of times than these do not fit the caches, and are slower per set (measured)."""
ROUNDING = 1e-12
"""What adding up thousands of floating-point times may differ by, as a share of the sum."""


def makespan_s(
    schedule: Schedule, times: StageTimes, num_micro_batches: int, *, relative_error: float = 1e-6
) -> float:
    """The time of one step's pipeline, from the first forward to the last backward, to within `relative_error`."""
    forward_s, backward_input_s, backward_weight_s, overlapped_s = times.arrays()
    return float(
        makespans_s(
            schedule,
            num_micro_batches,
            forward_s,
            backward_input_s,
            backward_weight_s,
            times.send_s,
            overlapped_s,
            relative_error=relative_error,
        )[0]
    )


def makespans_s(
    schedule: Schedule,
    num_micro_batches: int,
    forward_s: ArrayLike,
    backward_input_s: ArrayLike,
    backward_weight_s: ArrayLike,
    send_s: ArrayLike = 0.0,
    overlapped_s: ArrayLike | None = None,
    *,
    relative_error: float = 1e-6,
) -> Floats:
    """The makespans (n,) of n sets of stage times on one shape of pipeline.

    The times are arrays (n, p, v), or (p, v) for one set, as in `StageTimes`; `send_s` is (n,) or one number. Each
    result is within `relative_error` of the simulation of all micro-batches (0: up to rounding).
    Raises ConfigError for a combination that the schedule cannot run or for times that are not times.
    """
    sets = check_times(forward_s, backward_input_s, backward_weight_s, send_s, overlapped_s)
    num_sets, p, v = sets.forward_s.shape
    m = num_micro_batches
    check_shape(schedule, p, v, m)
    if schedule in ("none", "gpipe"):
        return _without_waiting_for_gradients(sets.forward_s, sets.backward_s, sets.send_s, m)
    group = micro_batch_group(p, m) if schedule == "interleaved" else 1
    table = durations(sets.forward_s, sets.backward_input_s, sets.backward_weight_s, sets.overlapped_s)
    result = np.empty(num_sets)
    for first in range(0, num_sets, SETS_AT_ONCE):
        some = slice(first, first + SETS_AT_ONCE)
        result[some] = _extrapolated(schedule, p, v, m, group, table[:, some], sets.send_s[some], relative_error)
    return result


def _without_waiting_for_gradients(forward_s: Floats, backward_s: Floats, send_s: Floats, m: int) -> Floats:
    """GPipe, exactly: equal jobs through a line of machines, once down and once up."""
    once = (forward_s + backward_s).sum(axis=(1, 2)) + 2 * (forward_s.shape[1] - 1) * send_s
    slowest = forward_s.sum(axis=2).max(axis=1) + backward_s.sum(axis=2).max(axis=1)
    return np.asarray(once + (m - 1) * slowest)


def _extrapolated(
    schedule: Schedule,
    p: int,
    v: int,
    m: int,
    group: int,
    durations_s: Floats,
    send_s: Floats,
    relative_error: float,
) -> Floats:
    result = np.empty(len(send_s))
    rest = np.arange(len(send_s))
    few = reduced_micro_batches(schedule, p, v, m, group)
    while len(rest):
        small = steady(schedule, p, v, few, group)
        ends = ends_s(small.graph, durations_s[:, rest], send_s[rest])
        makespan = ends[2:].max(axis=0)
        num_skipped = (m - few) // group
        if num_skipped == 0:
            result[rest] = makespan
            break
        per_period = ends[small.cut] - ends[small.cut_before]
        slow, fast = per_period.max(axis=0), per_period.min(axis=0)
        result[rest] = makespan + num_skipped * (slow + fast) / 2
        allowed = np.maximum(relative_error, ROUNDING) * result[rest]
        rest = rest[num_skipped * (slow - fast) / 2 > allowed]
        few = min(m, 2 * few)
    return result


@dataclass(frozen=True, eq=False)
class Steady:
    """A graph with few micro-batches, and where more of them would be put in."""

    graph: Graph
    cut: Ints
    """Rows of the operations before the cut for which an operation after it waits."""
    cut_before: Ints
    """The same operations one period earlier; no rows when the graph is too small to repeat."""


@lru_cache(maxsize=64)
def reduced_micro_batches(schedule: Schedule, p: int, v: int, m: int, group: int) -> int:
    """How few micro-batches to begin with: the fewest with a repeating part, and a pipeline's depth more."""
    few = 2 * p + 1 if schedule != "interleaved" else 2 * group
    while few < m and not len(steady(schedule, p, v, few, group).cut):
        few += max(1, p // 4) if schedule != "interleaved" else group
    return min(m, few + (p if schedule != "interleaved" else 0))


@lru_cache(maxsize=64)
def steady(schedule: Schedule, p: int, v: int, m: int, group: int) -> Steady:
    """The graph of `m` micro-batches, cut just before the first rank runs out of forwards."""
    whole = graph(schedule, p, v, m, group)
    nothing = Steady(whole, np.empty(0, np.intp), np.empty(0, np.intp))
    last_forwards = [
        rows[max(i for i, op in enumerate(ops) if op.kind in ("forward", "forward_backward"))]
        for ops, rows in zip(whole.ops, whole.rows, strict=True)
    ]
    cut = next(first for first, end in whole.levels if end > min(last_forwards))
    lengths = np.array([np.searchsorted(rows, cut) for rows in whole.rows])
    period = _operations_per_period(schedule, v, group)
    if (lengths < period).any():
        return nothing
    rank = np.zeros(len(whole.before), np.intp)
    place = np.zeros(len(whole.before), np.intp)
    for index, rows in enumerate(whole.rows):
        rank[rows], place[rows] = index, np.arange(len(rows))
    now = _waited_for(whole, place < lengths[rank])
    earlier = _waited_for(whole, place < (lengths - period)[rank])
    if (place[now] < period).any():
        return nothing
    shifted = np.array([whole.rows[rank[row]][place[row] - period] for row in now])
    if set(shifted) != set(earlier):
        return nothing
    if any(
        whole.ops[rank[row]][place[row]] != _later(whole.ops[rank[row]][place[row] - period], group) for row in now
    ):
        return nothing
    return Steady(whole, now, shifted)


def _operations_per_period(schedule: Schedule, v: int, group: int) -> int:
    """How many operations a rank runs for `group` micro-batches in the repeating part."""
    return {"zb-h1": 3, "zbv": 6, "dualpipev": 2}.get(schedule, 2 * v * group)


def _waited_for(whole: Graph, is_before: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Ints:
    is_before[:2] = False
    after = np.flatnonzero(~is_before)[2:]
    waited = np.unique(np.concatenate([waits[after] for waits in (whole.before, *whole.inputs)]))
    return waited[is_before[waited]]


def _later(op: Op, num_micro_batches: int) -> Op:
    backward = None if op.backward_micro_batch is None else op.backward_micro_batch + num_micro_batches
    return Op(op.kind, op.chunk, op.micro_batch + num_micro_batches, backward)
