"""Every operation of a pipeline with its start and end; and how many activations a rank holds."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from colossus.planner.schedule.graph import Floats, durations, ends_s, graph
from colossus.planner.schedule.order import Op, Schedule, check_shape, micro_batch_group
from colossus.planner.schedule.times import StageTimes, check_times


@dataclass(frozen=True, eq=False)
class Timeline:
    """One step's pipeline, every operation as early as it can start in its order."""

    ops: tuple[tuple[Op, ...], ...]
    """Of every rank, as it runs them."""
    start_s: tuple[Floats, ...]
    end_s: tuple[Floats, ...]
    makespan_s: float
    busy_s: Floats
    """(p,): what the operations of a rank take together."""
    bubble_share: float
    """The share of all ranks' time, from the first forward to the last backward, in which a rank has nothing to do."""
    peak_activations: Floats
    """(p,): the most activations a rank holds at once; 1 is one micro-batch through all chunks of the rank."""
    peak_activations_per_chunk: Floats
    """(p, v): of which chunk they are when they are first that many; 1 is one micro-batch through the chunk."""


def timeline(schedule: Schedule, times: StageTimes, num_micro_batches: int) -> Timeline:
    """The simulated step. Raises ConfigError for a combination that the schedule cannot run."""
    p, v = times.forward_s.shape
    check_shape(schedule, p, v, num_micro_batches)
    group = micro_batch_group(p, num_micro_batches) if schedule == "interleaved" else 1
    whole = graph(schedule, p, v, num_micro_batches, group)
    sets = check_times(*times.arrays()[:3], times.send_s, times.overlapped_s)
    table = durations(sets.forward_s, sets.backward_input_s, sets.backward_weight_s, sets.overlapped_s)
    taken = table[whole.duration_rows]
    ends = ends_s(whole, taken, sets.send_s)[:, 0]
    makespan = float(ends[2:].max())
    busy = np.array([taken[rows, 0].sum() for rows in whole.rows])
    per_chunk = np.array([peak_activations(ops, v) for ops in whole.ops])
    return Timeline(
        ops=whole.ops,
        start_s=tuple(ends[rows] - taken[rows, 0] for rows in whole.rows),
        end_s=tuple(ends[rows] for rows in whole.rows),
        makespan_s=makespan,
        busy_s=busy,
        bubble_share=1 - float(busy.sum()) / (p * makespan) if makespan else 0.0,
        peak_activations=per_chunk.sum(axis=1) / v,
        peak_activations_per_chunk=per_chunk,
    )


def peak_activations(ops: Iterable[Op], num_chunks: int) -> Floats:
    """The activations (v,) of each chunk that a rank holds at the first moment when it holds most, running `ops`.

    A forward's activations are held until the last part of its backward has run: `backward` or `backward_weight`.
    What the weight gradient needs is less than all of them, so this is a little too much where a backward is split.
    """
    held = np.zeros(num_chunks)
    peak = held.copy()
    for op in ops:
        if op.kind in ("forward", "forward_backward"):
            held[op.chunk] += 1
            if held.sum() > peak.sum():
                peak = held.copy()
        if op.kind in ("backward", "backward_weight"):
            held[op.chunk] -= 1
        elif op.kind == "forward_backward":
            held[1 - op.chunk] -= 1
    return peak
