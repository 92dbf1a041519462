"""Pipeline schedules against published formulas, a simulation written another way, and torch's own orders."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.errors import ConfigError
from colossus.planner.schedule import (
    StageTimes,
    activations_in_flight,
    lower_bound_s,
    makespan_s,
    makespans_s,
    order,
    timeline,
)
from colossus.planner.schedule.graph import graph

SHAPES = [
    ("none", 1, 1, 5),
    *[
        (schedule, p, 1, m)
        for schedule in ("gpipe", "1f1b", "zb-h1")
        for p, m in ((1, 3), (2, 1), (4, 3), (4, 9), (5, 16))
    ],
    *[
        ("interleaved", p, v, m)
        for p, v, m in ((2, 2, 2), (3, 3, 6), (4, 2, 12), (4, 3, 10), (4, 2, 3), (2, 4, 1))
    ],
    *[("zbv", p, 2, m) for p, m in ((1, 2), (2, 2), (3, 4), (4, 12))],
    *[("dualpipev", p, 2, m) for p, m in ((1, 2), (2, 5), (3, 6), (4, 13))],
]


def stage_of(schedule, p, rank, chunk):
    return 2 * p - 1 - rank if chunk == 1 and schedule in ("zbv", "dualpipev") else chunk * p + rank


def parts(op):
    """An operation as (forward or gradient or weights, chunk, micro-batch): several where it does several things."""
    if op.kind == "forward_backward":
        other = (1 - op.chunk, op.backward_micro_batch)
        return [("F", op.chunk, op.micro_batch), ("B", *other), ("W", *other)]
    kinds = {"forward": "F", "backward": "BW", "backward_input": "B", "backward_weight": "W"}[op.kind]
    return [(kind, op.chunk, op.micro_batch) for kind in kinds]


def simulate(schedule, times, m):
    """Ends of everything by relaxation: start all at 0 and push each back until nothing moves."""
    p, v = times.forward_s.shape
    ops = order(schedule, p, v, m)
    ends = [[0.0] * len(of_rank) for of_rank in ops]
    where = {
        (kind, stage_of(schedule, p, rank, chunk), i): (rank, at)
        for rank, of_rank in enumerate(ops)
        for at, op in enumerate(of_rank)
        for kind, chunk, i in parts(op)
    }
    for _ in range(2 * sum(map(len, ops))):
        moved = False
        for rank, of_rank in enumerate(ops):
            for at, op in enumerate(of_rank):
                start = ends[rank][at - 1] if at else 0.0
                takes = 0.0
                for kind, chunk, i in parts(op):
                    stage = stage_of(schedule, p, rank, chunk)
                    source = ("F", stage - 1, i) if kind == "F" else ("B", stage + 1, i)
                    if kind != "W" and source in where and where[source] != (rank, at):
                        from_rank, from_at = where[source]
                        start = max(start, ends[from_rank][from_at] + times.send_s * (from_rank != rank))
                    takes += {
                        "F": times.forward_s,
                        "B": times.backward_input_s,
                        "W": times.backward_weight_s,
                    }[kind][rank, chunk]
                moved |= abs(start + takes - ends[rank][at]) > 1e-9
                ends[rank][at] = start + takes
        if not moved:
            return ends
    raise AssertionError("operations wait for each other")


def random_times(seed, p, v, send_s=0.2):
    random = np.random.default_rng(seed)
    return StageTimes(*(random.uniform(0.3, 2.0, (p, v)) for _ in range(3)), send_s=send_s)


def equal_times(p, v, forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0, send_s=0.0):
    return StageTimes(
        *(np.full((p, v), time) for time in (forward_s, backward_input_s, backward_weight_s)), send_s=send_s
    )


@pytest.mark.parametrize(("schedule", "p", "v", "m"), SHAPES)
def test_an_order_does_everything_once_and_forwards_before_gradients_before_weights(schedule, p, v, m):
    for of_rank in order(schedule, p, v, m):
        done = [part for op in of_rank for part in parts(op)]
        assert sorted(done) == sorted(
            (kind, chunk, i) for kind in "FBW" for chunk in range(v) for i in range(m)
        )
        at = {part: index for index, part in enumerate(done)}
        for chunk in range(v):
            for i in range(m):
                assert at["F", chunk, i] < at["B", chunk, i] < at["W", chunk, i]


@pytest.mark.parametrize(("schedule", "p", "v", "m"), SHAPES)
def test_a_timeline_is_what_relaxation_finds(schedule, p, v, m):
    times = random_times(m, p, v)
    simulated = simulate(schedule, times, m)
    ours = timeline(schedule, times, m)
    for rank in range(p):
        np.testing.assert_allclose(ours.end_s[rank], simulated[rank])
    assert ours.makespan_s == pytest.approx(max(map(max, simulated)))
    work = m * (times.forward_s + times.backward_input_s + times.backward_weight_s).sum(axis=1)
    np.testing.assert_allclose(ours.busy_s, work)
    assert ours.bubble_share == pytest.approx(1 - work.sum() / (p * ours.makespan_s))


@pytest.mark.parametrize(("schedule", "p", "v", "m"), SHAPES)
def test_activations_in_flight_are_those_of_the_timeline(schedule, p, v, m):
    held = activations_in_flight(schedule, p, v, m, np.arange(p))
    run = timeline(schedule, equal_times(p, v), m)
    np.testing.assert_allclose(held, run.peak_activations)
    np.testing.assert_allclose(held, run.peak_activations_per_chunk.sum(axis=1) / v)


def test_activations_of_the_papers():
    # 1F1B: p − rank (2104.04473); ZB-H1: as 1F1B's first rank (2401.10241); ZB-V: that of 1F1B's first rank on all
    # (2405.15362); DualPipeV: PP + 1 chunks of PP = 2p (DeepSeek).
    assert activations_in_flight("1f1b", 8, 1, 64, np.arange(8)).tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
    assert activations_in_flight("zb-h1", 8, 1, 64, np.arange(8)).tolist() == [8] * 8
    assert activations_in_flight("zbv", 8, 2, 64, np.arange(8)).tolist() == [8] * 8
    assert activations_in_flight("dualpipev", 8, 2, 64, np.arange(8)).tolist() == [17 / 2] * 8
    # Interleaved: (1 + (p − 1) / (p v)) times 1F1B's p on the first rank (2205.05198, section 4.2.3).
    assert activations_in_flight("interleaved", 8, 4, 64, 0) == pytest.approx(8 * (1 + 7 / 32))


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("rounds", [2, 5])
def test_published_makespans_of_equal_stages(p, rounds):
    m = rounds * p
    f, b, w = 1.0, 1.25, 0.75
    once = f + b + w
    equal = equal_times(p, 1, f, b, w)
    assert timeline("gpipe", equal, m).makespan_s == pytest.approx((m + p - 1) * once)
    assert timeline("1f1b", equal, m).makespan_s == pytest.approx((m + p - 1) * once)
    for v in (2, 3):
        chunks = equal_times(p, v, f / v, b / v, w / v)
        assert timeline("interleaved", chunks, m).makespan_s == pytest.approx(m * once + (p - 1) * once / v)
    # ZB-H1, table 2 of 2401.10241: bubble (p − 1)(F + B − W).
    assert timeline("zb-h1", equal, m).makespan_s == pytest.approx(m * once + (p - 1) * (f + b - w))
    # ZB-V with F = B = W: each rank works without a pause; the last begins p − 1 forwards late.
    assert timeline("zbv", equal_times(p, 2), m).makespan_s == pytest.approx(6 * m + p - 1)
    # DualPipe(V), DeepSeek: bubble (PP / 2 − 1)(F&B + B − 3W), PP = 2p, B the whole backward, F&B = F + B here.
    assert timeline("dualpipev", equal_times(p, 2), m).makespan_s == pytest.approx(
        6 * m + (p - 1) * (3 + 2 - 3)
    )


def test_a_rank_of_zbv_never_pauses_when_all_parts_take_the_same_time():
    run = timeline("zbv", equal_times(6, 2), 20)
    for start, end in zip(run.start_s, run.end_s, strict=True):
        np.testing.assert_allclose(start[1:], end[:-1])


@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 10**6),
    send_s=st.floats(0, 2),
    slower=st.floats(0, 3),
    saves=st.floats(0, 0.3),
)
@settings(max_examples=150, deadline=None)
def test_bounded_scaled_and_monotone(shape, seed, send_s, slower, saves):
    schedule, p, v, m = shape
    times = random_times(seed, p, v, send_s)
    three = times.arrays()[:3]
    overlapped = three[0] + (three[1] + three[2])[:, ::-1] - saves
    took = makespans_s(schedule, m, *three, send_s, overlapped)[0]
    least = [array.min() for array in three]
    busiest = sum(three).sum(axis=1).max()
    bound = lower_bound_s(schedule, p, v, m, *least, send_s, busiest, overlap_saves_s=saves)
    assert bound <= took * (1 + 1e-12)
    doubled = makespans_s(schedule, m, *(2 * array for array in three), 2 * send_s, 2 * overlapped)[0]
    assert doubled == pytest.approx(2 * took)
    random = np.random.default_rng(seed)
    three[random.integers(3)][random.integers(p), random.integers(v)] += slower
    overlapped = np.maximum(overlapped, three[0] + (three[1] + three[2])[:, ::-1] - saves)
    assert makespans_s(schedule, m, *three, send_s, overlapped)[0] >= took * (1 - 1e-12)


@given(
    p=st.integers(1, 6),
    v=st.integers(1, 3),
    rounds=st.integers(1, 4),
    f=st.floats(0.2, 2),
    b=st.floats(0.2, 2),
    w=st.floats(0.1, 2),
)
@settings(max_examples=60, deadline=None)
def test_the_lower_bound_is_reached_by_equal_stages(p, v, rounds, f, b, w):
    for schedule, chunks, m in (("gpipe", 1, rounds), ("1f1b", 1, rounds), ("interleaved", v, rounds * p)):
        took = makespan_s(schedule, equal_times(p, chunks, f, b, w), m)
        assert lower_bound_s(schedule, p, chunks, m, f, b, w) == pytest.approx(took)
    short = min(f, b, w)
    took = makespan_s("zb-h1", equal_times(p, 1, f, b, short), rounds * p)
    assert lower_bound_s("zb-h1", p, 1, rounds * p, f, b, short) == pytest.approx(took)
    took = makespan_s("zbv", equal_times(p, 2, f, f, f), 2 * p + rounds)
    assert lower_bound_s("zbv", p, 2, 2 * p + rounds, f, f, f) == pytest.approx(took)


def test_bounds_and_activations_take_arrays():
    p, m = np.array([[2], [4]]), np.array([8, 16, 32])
    assert lower_bound_s("1f1b", p, 1, m, 1.0, 1.0, 1.0).tolist() == (3 * (m + p - 1)).tolist()
    assert activations_in_flight("1f1b", p, 1, m, 0).tolist() == [[2, 2, 2], [4, 4, 4]]


LONG = [
    ("1f1b", 4, 1, 150),
    ("1f1b", 7, 1, 64),
    ("zb-h1", 4, 1, 90),
    ("interleaved", 4, 3, 80),
    ("interleaved", 2, 2, 31 * 2),
    ("interleaved", 5, 2, 18),
    ("zbv", 3, 2, 100),
    ("dualpipev", 4, 2, 101),
]


@pytest.mark.parametrize(("schedule", "p", "v", "m"), LONG)
@pytest.mark.parametrize("send_s", [0.0, 0.15])
@pytest.mark.parametrize("unevenness", [0.0, 0.01, 0.5])
def test_leaving_periods_out_changes_nothing(schedule, p, v, m, send_s, unevenness):
    random = np.random.default_rng(m)
    times = [random.uniform(1 - unevenness, 1 + unevenness, (6, p, v)) for _ in range(3)]
    whole = [
        timeline(schedule, StageTimes(*one, send_s=send_s), m).makespan_s for one in zip(*times, strict=True)
    ]
    np.testing.assert_allclose(makespans_s(schedule, m, *times, send_s, relative_error=0), whole, rtol=1e-11)
    np.testing.assert_allclose(makespans_s(schedule, m, *times, send_s), whole, rtol=1.1e-6)
    np.testing.assert_allclose(
        makespans_s(schedule, m, *times, send_s, relative_error=0.01), whole, rtol=0.011
    )
    # One set of times at a time goes another way than several (a loop, not numpy).
    one = StageTimes(*(array[0] for array in times), send_s=send_s)
    assert makespan_s(schedule, one, m, relative_error=0) == pytest.approx(whole[0], rel=1e-11)


def test_many_micro_batches_are_not_simulated():
    graph.cache_clear()
    equal = equal_times(4, 1, send_s=0.1)
    few, many = makespan_s("1f1b", equal, 10**3), makespan_s("1f1b", equal, 10**6)
    per_micro_batch = (many - few) / (10**6 - 10**3)
    # With sends in the way, 1F1B repeats every p micro-batches, p forwards and sends down and the same up.
    rounds = makespan_s("1f1b", equal, 10**3 + 4) - few
    assert per_micro_batch == pytest.approx(rounds / 4)


def test_uneven_stages_of_llama3_405b():
    # 126 layers over 16 ranks with 8 chunks each: 126 of 128 places, the first and last chunk one layer short and with
    # embedding and head. The busiest rank sets the pace.
    layers = np.ones((16, 8))
    layers[0, 0] = layers[-1, -1] = 0.0
    forward = layers + 0.0
    forward[-1, -1] += 1.5
    took = makespan_s("interleaved", StageTimes(forward, forward, forward, send_s=0.02), 64)
    busiest = 64 * 3 * 8.5
    assert busiest < took < busiest + 15 * 3 * 1.5 + 15


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("schedule", "torch_class", "chunks"),
    [
        ("interleaved", "ScheduleInterleaved1F1B", (2, 3)),
        ("zb-h1", "ScheduleInterleavedZeroBubble", (1,)),
        ("zbv", "ScheduleZBVZeroBubble", (2,)),
        ("dualpipev", "ScheduleDualPipeV", (2,)),
    ],
)
def test_orders_are_those_of_torch(schedule, torch_class, chunks, p):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    names = {"FORWARD": "forward", "FULL_BACKWARD": "backward"}
    names |= {kind: kind.lower() for kind in ("BACKWARD_INPUT", "BACKWARD_WEIGHT")}
    torch_order = getattr(schedules, torch_class)._calculate_single_rank_operations
    in_v = schedule in ("zbv", "dualpipev")
    for v in chunks:
        for m in (2 * p, 3 * p, 5 * p) if schedule != "zbv" else (1, p, 2 * p, 3 * p):
            ours = order(schedule, p, v, m)
            theirs = SimpleNamespace(
                pp_group_size=p,
                n_local_stages=v,
                _n_microbatches=m,
                _num_stages=p * v,
                num_stages=p * v,
                microbatches_per_round=m // max(1, m // p),
            )
            for rank in range(p):
                theirs.rank = rank
                actions = []
                for action in filter(None, torch_order(theirs, rank)):
                    first, *second = action.sub_actions or (action,)
                    kind = "forward_backward" if second else names[first.computation_type.name]
                    stage = first.stage_index
                    chunk = int(stage >= p) if in_v else stage // p
                    other = second[0].microbatch_index if second else None
                    actions.append((kind, chunk, first.microbatch_index, other))
                assert [tuple(op) for op in ours[rank]] == actions


@pytest.mark.parametrize(
    ("schedule", "p", "v", "m", "says"),
    [
        ("1f1d", 2, 1, 4, "Did you mean '1f1b'"),
        ("none", 2, 1, 4, "one rank"),
        ("1f1b", 2, 2, 4, "one chunk per rank"),
        ("zbv", 2, 3, 4, "2 chunks"),
        ("dualpipev", 4, 2, 7, "8 for 4 ranks"),
        ("interleaved", 4, 2, 9, "8 or 12"),
        ("1f1b", 2, 1, 0, "at least one"),
    ],
)
def test_what_cannot_run_is_said(schedule, p, v, m, says):
    for ask in (order, lambda *shape: timeline(shape[0], equal_times(p, v), m)):
        with pytest.raises(ConfigError, match=says):
            ask(schedule, p, v, m)


def test_times_that_are_none_are_refused():
    ones = np.ones((2, 1))
    with pytest.raises(ConfigError, match="not negative"):
        StageTimes(ones, -ones, ones)
    with pytest.raises(ConfigError, match="one shape"):
        StageTimes(ones, np.ones((3, 1)), ones)
    with pytest.raises(ConfigError, match="overlapped_s"):
        StageTimes(np.ones((2, 2)), np.ones((2, 2)), np.ones((2, 2)), overlapped_s=np.ones((2, 2)))
    with pytest.raises(ConfigError, match="send_s"):
        makespans_s("1f1b", 4, ones, ones, ones, np.ones(3))


def test_overlapping_saves_its_time_on_every_pair():
    p, m = 4, 40
    apart = equal_times(p, 2)
    together = StageTimes(*apart.arrays()[:3], overlapped_s=np.full((p, 2), 2.5))
    pairs = [sum(op.kind == "forward_backward" for op in ops) for ops in order("dualpipev", p, 2, m)]
    saved = timeline("dualpipev", apart, m).busy_s - timeline("dualpipev", together, m).busy_s
    np.testing.assert_allclose(saved, 0.5 * np.array(pairs))
    assert max(pairs) == 2 * m - 2 * p - 1
