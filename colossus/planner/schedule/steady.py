"""Makespans of many sets of stage times at once, without simulating every micro-batch.

Between filling and emptying, a pipeline repeats itself. Its graph is cut there into three parts: filling, one period,
emptying. The ends of the operations on a cut (those that a later operation waits for) decide all that comes after, so
the period can be run as often as needed. As soon as the ends on a cut are all `d` later than those q periods before,
every further q periods take exactly `d`. If they are between d_min and d_max later, so they are for ever, because a
longest path can neither catch up nor fall behind by more than its inputs did (the map from cut to cut is max-plus
linear and therefore nonexpansive; Baccelli, Cohen, Olsder and Quadrat, "Synchronization and Linearity", 1992). So the
periods are run only until that range is narrow enough, and the error is known.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from colossus.planner.schedule.graph import NEVER, Floats, Graph, Ints, durations, ends_s, graph, part
from colossus.planner.schedule.order import (
    Op,
    Schedule,
    check_shape,
    grouped_order,
    micro_batch_group,
)
from colossus.planner.schedule.times import StageTimes, check_times
from colossus.spec.stages import V_SHAPED

Bools = NDArray[np.bool_]

SETS_AT_ONCE = 128
"""More sets of times than these do not fit the caches, and are slower per set (measured)."""
PERIODS_PER_LOOK = 8
"""How often to look whether a pipeline repeats itself."""
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
    parts = _steady(schedule, p, v, group)
    result = np.empty(num_sets)
    for first in range(0, num_sets, SETS_AT_ONCE):
        some = slice(first, first + SETS_AT_ONCE)
        if parts is None or parts.num_micro_batches > m:
            whole = graph(schedule, p, v, m, group)
            ends = ends_s(whole, table[whole.duration_rows, some], sets.send_s[some])
            result[some] = ends[2:].max(axis=0)
        else:
            more = (m - parts.num_micro_batches) // group
            result[some] = _extrapolated(parts, more, table[:, some], sets.send_s[some], relative_error)
    return result


def _without_waiting_for_gradients(forward_s: Floats, backward_s: Floats, send_s: Floats, m: int) -> Floats:
    """GPipe, exactly: equal jobs through a line of machines, once down and once up."""
    once = (forward_s + backward_s).sum(axis=(1, 2)) + 2 * (forward_s.shape[1] - 1) * send_s
    slowest = forward_s.sum(axis=2).max(axis=1) + backward_s.sum(axis=2).max(axis=1)
    return np.asarray(once + (m - 1) * slowest)


def _extrapolated(
    steady: "Steady", num_periods: int, durations_s: Floats, send_s: Floats, relative_error: float
) -> Floats:
    """The makespans (n,) with the repeating part run `num_periods` times more than in `steady`."""
    state = ends_s(steady.filling, durations_s[steady.filling.duration_rows], send_s)[steady.filling_to_cut]
    if num_periods:
        state = _after_periods(steady, state, num_periods, durations_s, send_s, relative_error)
    ends = ends_s(steady.emptying, durations_s[steady.emptying.duration_rows], send_s, state)
    return np.asarray(ends[2:].max(axis=0))


def _after_periods(
    steady: "Steady",
    state: Floats,
    num_periods: int,
    durations_s: Floats,
    send_s: Floats,
    relative_error: float,
) -> Floats:
    """The ends on the cut (cut, n), `num_periods` later: period by period until the rest of them can be foreseen."""
    result = np.empty_like(state)
    rest = np.arange(state.shape[1])
    times = durations_s[steady.period.duration_rows]
    past = [state]
    for period in range(1, num_periods + 1):
        ends = ends_s(steady.period, times, send_s, past[-1])
        past.append(ends[steady.period_to_cut])
        if period == num_periods:
            result[:, rest] = past[-1]
        elif period in (1, 2, 3) or period % PERIODS_PER_LOOK == 0:
            foreseen, error = _foreseen(past, num_periods - period, steady.most_periods)
            done = error <= max(relative_error, ROUNDING) * foreseen.max(axis=0)
            result[:, rest[done]] = foreseen[:, done]
            rest = rest[~done]
            if not len(rest):
                break
            if done.any():
                # np.compress keeps the rows contiguous, which indexing does not.
                times, send_s = np.compress(~done, times, axis=1), send_s[~done]
            past = [np.compress(~done, earlier, axis=1) for earlier in past[-1 - steady.most_periods :]]
    return result


def _foreseen(past: list[Floats], num_periods: int, most: int) -> tuple[Floats, Floats]:
    """The ends on the cut (cut, n) `num_periods` after the last of `past`, and by how much they may be wrong (n,).

    A pipeline may repeat itself only after several periods, as 1F1B does when it waits for sends: the number of
    periods is tried for which the error is least.
    """
    foreseen = np.empty_like(past[-1])
    least = np.full(foreseen.shape[1], np.inf)
    for lag in range(1, min(most, len(past) - 1) + 1):
        change = past[-1] - past[-1 - lag]
        slow, fast = change.max(axis=0), change.min(axis=0)
        repeats, over = divmod(num_periods, lag)
        error = (repeats + 1) * (slow - fast) / 2
        better = error < least
        if better.any():
            reached = past[-1 - lag + over] + (repeats + 1) * (slow + fast) / 2
            foreseen[:, better] = reached[:, better]
            least[better] = error[better]
    return foreseen, least


@dataclass(frozen=True, eq=False)
class Steady:
    """A pipeline in three parts; the ends on a cut are all that one part hands to the next."""

    filling: Graph
    filling_to_cut: Ints
    """The rows of `filling` that are the cut."""
    period: Graph
    period_to_cut: Ints
    emptying: Graph
    num_micro_batches: int
    """With the repeating part run once."""
    most_periods: int
    """After at most so many periods it repeats itself in all cases that were seen."""


@lru_cache(maxsize=64)
def _steady(schedule: Schedule, p: int, v: int, group: int) -> Steady | None:
    """The parts of a pipeline with as few micro-batches as have a part that repeats; None when none is found."""
    few = 2 * group if schedule == "interleaved" else 2 * p + 1
    step = group if schedule == "interleaved" else max(1, p // 4)
    for num_micro_batches in range(few, 8 * few, step):
        parts = _cut(schedule, p, v, num_micro_batches, group)
        if parts is not None:
            return parts
    return None


def _cut(schedule: Schedule, p: int, v: int, m: int, group: int) -> Steady | None:
    """The graph of `m` micro-batches cut just before a rank runs out of forwards; None when that is too early."""
    whole = graph(schedule, p, v, m, group)
    length = {"zb-h1": 3, "zbv": 6, "dualpipev": 2}.get(schedule, 2 * v * group)
    # In a V the first chunk's forwards run out before the second's, and with them the repeating part ends.
    chunks = {0} if schedule in V_SHAPED else {v - 1}
    last = min(
        rows[
            max(
                i
                for i, op in enumerate(ops)
                if op.kind in ("forward", "forward_backward") and op.chunk in chunks
            )
        ]
        for ops, rows in zip(whole.ops, whole.rows, strict=True)
    )
    row_at_cut = next(first for first, end in whole.levels if end > last)
    cuts = [int(np.searchsorted(rows, row_at_cut)) for rows in whole.rows]
    longer = grouped_order(schedule, p, v, m + group, group)
    for ops, with_one_more, cut in zip(whole.ops, longer, cuts, strict=True):
        repeated = [_later(op, group) for op in ops[max(0, cut - length) :]]
        if cut < length or with_one_more != (*ops[:cut], *repeated):
            return None
    place = np.full(len(whole.before), -1)  # relative to the cut of the rank
    for rows, cut in zip(whole.rows, cuts, strict=True):
        place[rows] = np.arange(len(rows)) - cut
    place[:2] = -len(place)
    waited = _waited_for(whole, place >= 0)
    waited_before = _waited_for(whole, place >= -length)
    earlier = np.empty(len(whole.before), np.intp)
    for rows in whole.rows:
        earlier[rows[length:]] = rows[:-length]
        earlier[rows[:length]] = -1
    if not np.array_equal(np.sort(earlier[waited]), waited_before):
        return None
    filled, repeating, emptied = (
        np.flatnonzero(rows) for rows in ((place < 0), (place < 0) & (place >= -length), place >= 0)
    )
    filled = filled[2:]
    period = part(whole, earlier[waited], repeating)
    return Steady(
        filling=part(whole, np.empty(0, np.intp), filled),
        filling_to_cut=2 + np.searchsorted(filled, waited),
        period=period,
        period_to_cut=_rows_in_period(waited, earlier[waited], repeating),
        emptying=part(whole, waited, emptied),
        num_micro_batches=m,
        most_periods=p,
    )


def _rows_in_period(waited: Ints, given: Ints, repeating: Ints) -> Ints:
    """Where the cut is among the rows of the period: what it ran itself, or was given and hands on."""
    at = {int(row): 2 + index for index, row in enumerate(given)}
    at |= {int(row): 2 + len(given) + index for index, row in enumerate(repeating)}
    return np.array([at[int(row)] for row in waited])


def _waited_for(whole: Graph, is_after: Bools) -> Ints:
    """The rows before a cut for which a row after it waits."""
    waited = np.unique(np.concatenate([waits[is_after] for waits in (whole.before, *whole.inputs)]))
    return np.asarray(waited[(waited > NEVER) & ~is_after[waited]])


def _later(op: Op, num_micro_batches: int) -> Op:
    backward = None if op.backward_micro_batch is None else op.backward_micro_batch + num_micro_batches
    return Op(op.kind, op.chunk, op.micro_batch + num_micro_batches, backward)
