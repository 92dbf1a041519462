"""What needs no simulation: a lower bound of the makespan, and the activations that a rank holds. Vectorised."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from colossus.errors import ConfigError, did_you_mean
from colossus.planner.schedule.order import SCHEDULES, Schedule

Floats = NDArray[np.float64]


def lower_bound_s(
    schedule: Schedule,
    num_stages: ArrayLike,
    num_chunks: ArrayLike,
    num_micro_batches: ArrayLike,
    forward_s: ArrayLike,
    backward_input_s: ArrayLike,
    backward_weight_s: ArrayLike,
    send_s: ArrayLike = 0.0,
    slowest_rank_s: ArrayLike = 0.0,
    overlap_saves_s: ArrayLike = 0.0,
) -> Floats:
    """A time that no order of this schedule can undercut. All arguments broadcast.

    `forward_s`, `backward_input_s` and `backward_weight_s` are what one micro-batch takes in one chunk: of all chunks
    the least, if they differ. `slowest_rank_s` is what it takes in all chunks of the busiest rank, forward and
    backward. `overlap_saves_s` is the most that dualpipev saves when it runs a forward and a backward together. Every
    bound counts the work of one rank, what must run before its first operation, and after its last.

    Where all chunks take the same time and sends none, it is exact for none, gpipe, 1f1b and interleaved (m a multiple
    of p), (m + (p − 1) / v) times one micro-batch on one rank; and for zb-h1 with m ≥ p and weight gradients no longer
    than forwards and input gradients, m · (f + b + w) + (p − 1)(f + b − w) (arXiv:2401.10241). For zbv it is
    exact when f = b = w, 2m(f + b + w) + (p − 1)f, and for dualpipev a bubble of only (p − 1)f is counted.
    """
    _check(schedule)
    p, v, m = (np.asarray(number, np.float64) for number in (num_stages, num_chunks, num_micro_batches))
    f, b, w, send = (
        np.asarray(times, np.float64) for times in (forward_s, backward_input_s, backward_weight_s, send_s)
    )
    hops = p - 1
    pairs = 2 * m - 2 * p - 1 if schedule == "dualpipev" else 0.0
    saved = pairs * np.asarray(overlap_saves_s, np.float64)
    work = m * v * (f + b + w) - saved
    busy = m * np.asarray(slowest_rank_s, np.float64) - saved
    alone = p * v * (f + b) + w + 2 * hops * send
    if schedule in ("none", "gpipe", "1f1b", "interleaved"):
        through = work + hops * (f + b + w + 2 * send)
    elif schedule == "zb-h1":
        # The last rank begins after p − 1 forwards; or rank 0, which waits for its first gradient with at most p
        # forwards to run meanwhile; or the last gradient leaves the last rank, which holds p − 1 weight gradients
        # back, and goes up to rank 0.
        last = work + hops * (f + send)
        first = work + p * f + hops * (b + 2 * send) - np.minimum(m, p) * f
        both = hops * (f + b + 2 * send) + m * (f + b) + np.maximum(0, m - p) * w + w
        through = np.maximum(np.maximum(last, first), both)
    else:
        through = work + hops * (f + send)
    return np.asarray(np.maximum(np.maximum(busy, alone), through))


def activations_in_flight(
    schedule: Schedule,
    num_stages: ArrayLike,
    num_chunks: ArrayLike,
    num_micro_batches: ArrayLike,
    rank: ArrayLike,
) -> Floats:
    """The most activations that `rank` holds at once. All arguments broadcast.

    1 is one micro-batch through all chunks of the rank. Activations are held until the weight gradient is there, so in
    zb-h1 every rank holds as many as rank 0 of 1F1B.
    """
    _check(schedule)
    p, v, m, r = (
        np.asarray(number, np.float64) for number in (num_stages, num_chunks, num_micro_batches, rank)
    )
    match schedule:
        case "none":
            return np.asarray(np.minimum(m, 1) + 0 * (p + r))
        case "gpipe":
            return np.asarray(m + 0 * (p + r))
        case "1f1b":
            return np.asarray(np.minimum(m, p - r))
        case "interleaved":
            group = np.floor(m / np.maximum(1, np.floor(m / p)))
            return np.asarray(np.minimum(m * v, 2 * (p - 1 - r) + (v - 1) * group + 1) / v)
        case "zb-h1":
            return np.asarray(np.minimum(m, p) + 0 * r)
        case "zbv":
            return np.asarray((np.minimum(m, 2 * p - 1 - r) + np.minimum(m, r + 1)) / 2)
        case "dualpipev":
            # A chunk more than zbv: while a forward overlaps a backward, both hold their activations.
            return np.asarray(p + 0.5 + 0 * (m + r))


def _check(schedule: Schedule) -> None:
    if schedule not in SCHEDULES:
        raise ConfigError(f"There is no pipeline schedule {schedule!r}.{did_you_mean(schedule, SCHEDULES)}")
