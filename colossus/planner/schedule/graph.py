"""The operations of a pipeline with what each has to wait for, as arrays; and the longest path through them.

An operation starts when the one before it on its rank has ended and its input has arrived: a forward's from the
virtual stage before, a backward's from the one after. Both facts are the same for every set of times, so the graph is
built once per shape and kept; only the longest path is run again.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from colossus.planner.schedule.order import KINDS, Op, Schedule, grouped_order
from colossus.spec.stages import V_SHAPED

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

START, NEVER = 0, 1
"""The first two rows of the array of ends: time 0, for the first operation of a rank, and minus infinity, for an
operation that waits for no other rank."""
FEW = 3
"""Up to so many sets of times a plain loop is faster than numpy, level by level (measured)."""


@dataclass(frozen=True, eq=False)
class Graph:
    """Operations sorted by level: the number of operations on the longest chain that leads to one.

    All arrays hold one row per operation, and two rows before them (START and NEVER).
    """

    ops: tuple[tuple[Op, ...], ...]
    rows: tuple[Ints, ...]
    """For every rank, the rows of its operations in its order."""
    duration_rows: Ints
    """Which row of `durations` is an operation's time."""
    before: Ints
    """The operation before it on the same rank."""
    inputs: tuple[Ints, ...]
    """The operations on other ranks that it waits for: one array, or two where a forward and a backward run as one."""
    levels: tuple[tuple[int, int], ...]
    """First row and end of every level."""


def durations(
    forward_s: Floats, backward_input_s: Floats, backward_weight_s: Floats, overlapped_s: Floats
) -> Floats:
    """The times of all kinds of operations as rows (kinds · p · v, n), from four arrays of (n, p, v)."""
    whole = backward_input_s + backward_weight_s
    table = np.stack([forward_s, whole, backward_input_s, backward_weight_s, overlapped_s])
    return np.ascontiguousarray(table.reshape(len(KINDS), len(forward_s), -1).transpose(0, 2, 1)).reshape(
        -1, len(forward_s)
    )


@lru_cache(maxsize=32)
def graph(schedule: Schedule, num_stages: int, num_chunks: int, num_micro_batches: int, group: int) -> Graph:
    """The graph of one shape. Raises RuntimeError if the order of operations would wait for itself."""
    ops = grouped_order(schedule, num_stages, num_chunks, num_micro_batches, group)
    p, v = num_stages, num_chunks
    rank_ops = [(rank, op) for rank, of_rank in enumerate(ops) for op in of_rank]
    of_rank = np.array([rank for rank, _ in rank_ops])
    offsets = np.concatenate([[0], np.cumsum([len(ops_of_rank) for ops_of_rank in ops])])
    inputs = _inputs(schedule, p, v, num_micro_batches, rank_ops)
    level = _levels(offsets, inputs)
    # Within a level the order is free; by rank, it is the same in every period.
    by_level = np.lexsort((of_rank, level))
    row = np.empty(len(rank_ops) + 2, np.intp)
    row[by_level] = np.arange(2, len(rank_ops) + 2)
    row[-2:] = START, NEVER  # so that -2 and -1 stand for them in the arrays below
    before = np.arange(-1, len(rank_ops) - 1)
    before[offsets[:-1]] = -2
    kind = np.array([KINDS.index(op.kind) for _, op in rank_ops])
    chunk = np.array([op.chunk for _, op in rank_ops])
    ends = np.flatnonzero(np.diff(level[by_level], append=-1)) + 3
    return Graph(
        ops=ops,
        rows=tuple(row[first:end] for first, end in pairwise(offsets)),
        duration_rows=np.concatenate([[0, 0], ((kind * p + of_rank) * v + chunk)[by_level]]),
        before=np.concatenate([[START, START], row[before[by_level]]]),
        inputs=tuple(np.concatenate([[NEVER, NEVER], row[waits[by_level]]]) for waits in inputs),
        levels=tuple(zip((2, *ends.tolist()), ends.tolist(), strict=False)),
    )


def rank_of_stage(schedule: Schedule, num_stages: int, stage: int) -> tuple[int, int]:
    """The rank that holds a virtual stage, and as which chunk."""
    chunk, rank = divmod(stage, num_stages)
    return (num_stages - 1 - rank if schedule in V_SHAPED and chunk == 1 else rank), chunk


def stage_of(schedule: Schedule, num_stages: int, rank: int, chunk: int) -> int:
    """The virtual stage that is `chunk` on `rank`; the inverse of `rank_of_stage`."""
    return chunk * num_stages + (num_stages - 1 - rank if schedule in V_SHAPED and chunk == 1 else rank)


def _inputs(schedule: Schedule, p: int, v: int, m: int, rank_ops: list[tuple[int, Op]]) -> tuple[Ints, ...]:
    """For every operation, the one on another rank that makes its input, or -1; twice if any needs two."""
    forward_made = np.full((p * v, m), -1)
    gradient_made = np.full((p * v, m), -1)
    stages = [(stage_of(schedule, p, rank, op.chunk), rank) for rank, op in rank_ops]
    for index, ((_, op), (stage, rank)) in enumerate(zip(rank_ops, stages, strict=True)):
        if op.kind in ("forward", "forward_backward"):
            forward_made[stage, op.micro_batch] = index
        if op.kind in ("backward", "backward_input"):
            gradient_made[stage, op.micro_batch] = index
        if op.kind == "forward_backward":
            gradient_made[stage_of(schedule, p, rank, 1 - op.chunk), op.backward_micro_batch] = index
    waits = np.full((2, len(rank_ops)), -1)
    for index, ((rank, op), (stage, _)) in enumerate(zip(rank_ops, stages, strict=True)):
        if op.kind == "forward_backward":
            waits[0, index] = _sent(schedule, p, rank, stage - 1, forward_made, op.micro_batch)
            other = stage_of(schedule, p, rank, 1 - op.chunk)
            waits[1, index] = _sent(schedule, p, rank, other + 1, gradient_made, op.backward_micro_batch)
        elif op.kind == "forward":
            waits[0, index] = _sent(schedule, p, rank, stage - 1, forward_made, op.micro_batch)
        elif op.kind != "backward_weight":
            waits[0, index] = _sent(schedule, p, rank, stage + 1, gradient_made, op.micro_batch)
    return tuple(waits) if (waits[1] >= 0).any() else (waits[0],)


def _sent(schedule: Schedule, p: int, rank: int, stage: int, made: Ints, micro_batch: int | None) -> int:
    """The operation that makes what `stage` sends to `rank`, or -1 if there is no such stage or nothing to send.

    What a rank hands to itself, as at the bottom of a V, comes earlier in its own order.
    """
    if not 0 <= stage < len(made) or rank_of_stage(schedule, p, stage)[0] == rank:
        return -1
    return int(made[stage, micro_batch])


def _levels(offsets: Ints, inputs: tuple[Ints, ...]) -> Ints:
    """The level of every operation: every rank runs on until it meets an input that is not there yet."""
    level = np.full(offsets[-1], -1).tolist()
    waits = list(zip(*(of_op.tolist() for of_op in inputs), strict=True))
    at = offsets[:-1].tolist()
    blocked: dict[int, list[int]] = {}
    ready = list(range(len(at)))
    num_done = 0
    while ready:
        rank = ready.pop()
        index, end = at[rank], int(offsets[rank + 1])
        now = level[index - 1] if index > offsets[rank] else -1
        while index < end:
            missing = next((wait for wait in waits[index] if wait >= 0 and level[wait] < 0), None)
            if missing is not None:
                blocked.setdefault(missing, []).append(rank)
                break
            now = 1 + max(now, *(level[wait] if wait >= 0 else -1 for wait in waits[index]))
            level[index] = now
            num_done += 1
            ready += blocked.pop(index, ())
            index += 1
        at[rank] = index
    if num_done < len(level):
        raise RuntimeError(
            f"the order of operations waits for itself: {len(level) - num_done} can never start"
        )
    return np.array(level)


def ends_s(graph: Graph, times: Floats, send_s: Floats, arrived_s: Floats | None = None) -> Floats:
    """When every operation ends (rows, n): the longest path for each of n sets of times.

    `times` (rows, n) is `durations(…)[graph.duration_rows]`; `send_s` (n,) is what an input takes from rank to rank;
    `arrived_s` (num_given, n) are the ends that are known beforehand.
    """
    num_sets = times.shape[1]
    given = np.concatenate([np.zeros((1, num_sets)), np.full((1, num_sets), -np.inf)])
    if arrived_s is not None:
        given = np.concatenate([given, arrived_s])
    if num_sets <= FEW:
        sets = [
            _ends_one(graph, given[:, i].tolist(), times[len(given) :, i].tolist(), float(send_s[i]))
            for i in range(num_sets)
        ]
        return np.array(sets).T
    ends = np.empty_like(times)
    ends[: len(given)] = given
    widest = max(end - first for first, end in graph.levels)
    starts, arrived = np.empty((widest, num_sets)), np.empty((widest, num_sets))
    for first, end in graph.levels:
        start, arrives = starts[: end - first], arrived[: end - first]
        # mode="clip" lets numpy write straight into `out`; no index is out of range.
        np.take(ends, graph.before[first:end], axis=0, out=start, mode="clip")
        for waits in graph.inputs:
            np.take(ends, waits[first:end], axis=0, out=arrives, mode="clip")
            np.add(arrives, send_s, out=arrives)
            np.maximum(start, arrives, out=start)
        np.add(start, times[first:end], out=ends[first:end])
    return ends


def _ends_one(graph: Graph, ends: list[float], times: list[float], send_s: float) -> list[float]:
    first = len(ends)
    before = graph.before[first:].tolist()
    append = ends.append
    if len(graph.inputs) == 1:
        for i, j, time in zip(before, graph.inputs[0][first:].tolist(), times, strict=True):
            start, arrives = ends[i], ends[j] + send_s
            append((start if start >= arrives else arrives) + time)
    else:
        forwards, gradients = (waits[first:].tolist() for waits in graph.inputs)
        for i, j, k, time in zip(before, forwards, gradients, times, strict=True):
            append(max(ends[i], ends[j] + send_s, ends[k] + send_s) + time)
    return ends


def part(whole: Graph, given: Ints, rows: Ints) -> Graph:
    """The operations `rows` (ascending) alone, when those of `given` have ended already."""
    new_row = np.full(len(whole.before), -1)
    new_row[[START, NEVER]] = START, NEVER
    new_row[given] = 2 + np.arange(len(given))
    first_row = 2 + len(given)
    new_row[rows] = first_row + np.arange(len(rows))
    pad = np.full(first_row, NEVER)
    bounds = [first_row + np.searchsorted(rows, edge) for edge in (2, *(end for _, end in whole.levels))]
    return Graph(
        ops=whole.ops,
        rows=(),
        duration_rows=np.concatenate([np.zeros(first_row, np.intp), whole.duration_rows[rows]]),
        before=np.concatenate([pad, new_row[whole.before[rows]]]),
        inputs=tuple(np.concatenate([pad, new_row[waits[rows]]]) for waits in whole.inputs),
        levels=tuple((int(a), int(b)) for a, b in pairwise(bounds) if a < b),
    )
