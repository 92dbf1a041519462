"""Failures, goodput and spares against published figures and against Monte Carlo."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from colossus.errors import ConfigError
from colossus.planner.run.rates import table
from colossus.planner.run.reliability import (
    Checkpoints,
    Failures,
    best_interval_s,
    expected_missing_groups,
    failures,
    nodes_in_repair,
    num_spares,
    published,
    replica_goodput,
    straggler_slowdown,
    together,
    whole_job_goodput,
)
from colossus.spec.ranged import Ranged

MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0


def every(mtbf_s: float) -> Failures:
    return Failures(per_day=Ranged.exactly(DAY / mtbf_s), by_cause={"any": 1.0})


def exactly(value: float) -> Ranged:
    return Ranged.exactly(value)


# --- rates ---


def test_llama3s_interruptions() -> None:
    """419 in 54 days on 16,384 H100, every 3.09 hours; GPUs 64 % of the counts, 78 % hardware or suspected."""
    of_llama3 = failures("hopper", 16_384)
    assert of_llama3.interruptions(54).likely == pytest.approx(419, rel=0.002)
    assert of_llama3.mtbf_s.likely / HOUR == pytest.approx(3.09, rel=0.005)
    gpu = [
        "faulty GPU", "GPU HBM3 memory", "GPU SRAM memory", "GPU system processor", "silent data corruption",
        "GPU thermal interface or sensor",
    ]  # fmt: skip
    assert of_llama3.share(gpu) == pytest.approx(0.640, abs=0.001)
    assert 1 - of_llama3.share(of_llama3.no_part_breaks) == pytest.approx(0.78, abs=0.03)


def test_the_tables_of_causes_are_whole() -> None:
    studies = table("failures")["causes"]
    assert sum(studies["llama3"]["counts"].values()) == 419
    assert sum(studies["ft_hsdp"]["counts"].values()) == 678
    for study in studies.values():
        assert set(study["stop_every_group"]) | set(study["no_part_breaks"]) <= set(study["counts"])


@pytest.mark.parametrize(
    ("generation", "num_chips", "mtbf_s"),
    [
        ("hopper", 100_000, 18 * MINUTE),  # FT-HSDP
        ("hopper", 1000, 3.5 * DAY),  # SemiAnalysis: 3,500 GPU-days
        ("ampere", 16_384, 1.8 * HOUR),  # RSC's projection
        ("ampere", 384, 7 * DAY),  # BLOOM: "every week or so"
        ("blackwell", 504, 55 / 21 * DAY),  # 504 B200
        ("blackwell", 72, 2000 / 72 * DAY),  # GB200 NVL72 in the field
    ],
)
def test_published_times_between_failures_are_in_the_range(
    generation: str, num_chips: int, mtbf_s: float
) -> None:
    between = failures(generation, num_chips).mtbf_s  # type: ignore[arg-type]
    assert between.low * 0.99 <= mtbf_s <= between.high * 1.01


def test_pools_add_up() -> None:
    h100, b200 = failures("hopper", 150_000), failures("blackwell", 50_000, causes="ft_hsdp")
    both = together([h100, b200])
    assert both.per_day == h100.per_day + b200.per_day
    assert sum(both.by_cause.values()) == pytest.approx(1)
    assert together([h100, h100]).by_cause == pytest.approx(h100.by_cause)
    assert both.share(["PCIe device"]) == pytest.approx(122 / 678 * b200.per_day.likely / both.per_day.likely)


# --- the whole job restarts ---


def simulated_whole_job(mtbf_s: float, restart_s: float, checkpoints: Checkpoints, seed: int) -> float:
    """Goodput on one line of time: failures fall on it first, then the job is walked along it."""
    random = np.random.default_rng(seed)
    fails = np.cumsum(random.exponential(mtbf_s, size=40_000))
    period = checkpoints.interval_s + checkpoints.stall_s
    kept, ready = 0.0, 0.0
    for fail in fails:
        if fail >= ready:  # else it only interrupts the restart
            durable = math.floor((fail - ready - checkpoints.write_s) / period)
            kept += max(0, durable) * checkpoints.interval_s
        ready = fail + restart_s
    return float(kept / fails[-1])


@pytest.mark.parametrize(
    ("mtbf_s", "restart_s", "interval_s", "stall_s", "write_s"),
    [
        (3 * HOUR, 10 * MINUTE, 20 * MINUTE, 5.0, 60.0),
        (18 * MINUTE, 10 * MINUTE, 5 * MINUTE, 10.0, 0.0),
        (18 * MINUTE, 30 * MINUTE, 20 * MINUTE, 60.0, 10 * MINUTE),  # loses most of its time
        (18 * MINUTE, 0.0, 10.0, 0.0, 0.0),
    ],
)
def test_goodput_of_a_restarted_job_is_what_chance_gives(
    mtbf_s: float, restart_s: float, interval_s: float, stall_s: float, write_s: float
) -> None:
    checkpoints = Checkpoints(interval_s=interval_s, stall_s=stall_s, write_s=write_s)
    expected = whole_job_goodput(every(mtbf_s), exactly(restart_s), checkpoints).share.likely
    assert simulated_whole_job(mtbf_s, restart_s, checkpoints, seed=1) == pytest.approx(expected, abs=0.01)


@given(
    st.floats(1.0, 1e8), st.floats(0.0, 1e6), st.floats(0.1, 1e6), st.floats(0.0, 1e5), st.floats(0.0, 1.0)
)
def test_goodput_is_a_share_and_the_time_is_accounted_for(
    mtbf_s: float, restart_s: float, interval_s: float, stall_s: float, write: float
) -> None:
    checkpoints = Checkpoints(interval_s=interval_s, stall_s=stall_s, write_s=write * interval_s)
    for goodput in (
        whole_job_goodput(every(mtbf_s), exactly(restart_s), checkpoints),
        replica_goodput(
            every(mtbf_s), 8, 10.0, exactly(restart_s), exactly(restart_s), exactly(restart_s), checkpoints
        ),
    ):
        assert 0 <= goodput.share.likely <= 1
        assert min(goodput.lost.values()) >= 0
        assert goodput.share.likely + sum(goodput.lost.values()) == pytest.approx(1)


def rsc_formula(per_day: float, restart_s: float, checkpoints: Checkpoints) -> float:
    """arXiv:2410.21680, without queueing: an approximation for small losses."""
    lost_days = (restart_s + checkpoints.interval_s / 2) / DAY
    return (1 - per_day * lost_days) / (1 + checkpoints.stall_s / checkpoints.interval_s)


def test_the_published_approximation_is_its_limit() -> None:
    """RSC-1's rate, 5 minutes of restart and of writing (arXiv:2410.21680, which claims 5 % for its formula)."""
    for num_chips in (1024, 4096, 16_384):
        job = every(1000 / 6.5 * DAY / (num_chips / 8))
        interval = best_interval_s(job.mtbf_s.likely, 5 * MINUTE, 1.0)
        checkpoints = Checkpoints(interval_s=interval, stall_s=5 * MINUTE)
        exact = whole_job_goodput(job, exactly(5 * MINUTE), checkpoints).share.likely
        assert exact == pytest.approx(rsc_formula(job.per_day.likely, 5 * MINUTE, checkpoints), rel=0.05)
    lossy = Checkpoints(interval_s=30 * MINUTE, stall_s=0.0)
    assert rsc_formula(DAY / (18 * MINUTE), 10 * MINUTE, lossy) < 0
    assert 0.2 < whole_job_goodput(every(18 * MINUTE), exactly(10 * MINUTE), lossy).share.likely < 0.3


def test_llama3_trained_more_than_nine_tenths_of_the_time() -> None:
    job = failures("hopper", 16_384)
    checkpoints = Checkpoints(
        interval_s=best_interval_s(job.mtbf_s.likely, 2.0, 60.0), stall_s=2.0, write_s=60.0
    )
    goodput = whole_job_goodput(job, published("restart_s"), checkpoints)
    assert 0.90 < goodput.share.likely < 0.95
    assert goodput.share.low < 0.90


@pytest.mark.parametrize("interval_min", [6, 9])
def test_a_hundred_thousand_chips_that_restart_together(interval_min: int) -> None:
    """FT-HSDP: 44 % with 18 minutes between failures and 10 to recover. How often it saved was not said."""
    checkpoints = Checkpoints(interval_s=interval_min * MINUTE, stall_s=5.0)
    goodput = whole_job_goodput(every(18 * MINUTE), exactly(10 * MINUTE), checkpoints)
    assert goodput.share.likely == pytest.approx(0.44, abs=0.04)


def test_byterobusts_dense_run() -> None:
    """97 % of three months on 9,600 GPUs, saving every step for 0.9 % of the time (arXiv:2509.16293)."""
    checkpoints = Checkpoints(interval_s=10.0, stall_s=0.09)
    goodput = whole_job_goodput(failures("hopper", 9600), Ranged(low=105, likely=300, high=600), checkpoints)
    assert goodput.share.likely == pytest.approx(0.97, abs=0.01)


# --- the best interval ---


@pytest.mark.parametrize("mtbf_s", [18 * MINUTE, 3 * HOUR, 30 * DAY])
@pytest.mark.parametrize("stall_s", [0.5, 10.0, 300.0, 3000.0])
def test_no_other_interval_is_better(mtbf_s: float, stall_s: float) -> None:
    best = best_interval_s(mtbf_s, stall_s, shortest_s=1e-3)

    def share(interval_s: float) -> float:
        checkpoints = Checkpoints(interval_s=interval_s, stall_s=stall_s)
        return whole_job_goodput(every(mtbf_s), exactly(600.0), checkpoints).share.likely

    grid = np.geomspace(best / 30, best * 30, 601)
    assert grid[np.argmax([share(interval) for interval in grid])] == pytest.approx(best, rel=0.02)


def test_young_and_daly_are_its_limits() -> None:
    mtbf_s = 3 * HOUR
    assert best_interval_s(mtbf_s, 0.1, 1.0) == pytest.approx(math.sqrt(2 * 0.1 * mtbf_s), rel=0.005)
    # Daly's second order (2006, equation 37), from stall to stall, for stalls of a few percent.
    stall = 300.0
    root = math.sqrt(stall / (2 * mtbf_s))
    daly = math.sqrt(2 * stall * mtbf_s) * (1 + root / 3 + stall / (9 * 2 * mtbf_s)) - stall
    assert best_interval_s(mtbf_s, stall, 1.0) == pytest.approx(daly, rel=0.001)
    assert best_interval_s(mtbf_s, 0.0, 12.0) == 12.0


# --- replica groups ---


def simulated_replicas(
    mtbf_s: float, num_groups: int, step_s: float, stall_s: float, absence_s: float, seed: int
) -> float:
    """Goodput of groups that fail one by one, each by its own dice, step by step."""
    random = np.random.default_rng(seed)
    group_mtbf = mtbf_s * num_groups
    fails = random.exponential(group_mtbf, num_groups)
    returns = np.zeros(num_groups)
    now, kept = 0.0, 0.0

    def strike(until: float) -> tuple[float, bool]:
        """The first failure of a present group before `until`, if there is one; absent ones fail unnoticed."""
        while fails.min() < until:
            group, when = int(fails.argmin()), float(fails.min())
            present = returns[group] <= when
            fails[group] = when + random.exponential(group_mtbf)
            returns[group] = when + stall_s + absence_s
            if present:
                return when, True
        return until, False

    for _ in range(60_000):
        moment, struck = strike(now + step_s)
        while struck:
            moment, struck = strike(moment + stall_s)
            if not struck:
                break
        else:
            kept += step_s * float((returns <= now).mean())
        now = moment
    return kept / now


@pytest.mark.parametrize(
    ("mtbf_s", "num_groups", "step_s", "stall_s", "absence_s"),
    [
        (18 * MINUTE, 48, 20.0, 3 * MINUTE, 10 * MINUTE),
        (18 * MINUTE, 6, 20.0, MINUTE, 20 * MINUTE),
        (5 * MINUTE, 200, 30.0, 30.0, 60 * MINUTE),
    ],
)
def test_goodput_of_replica_groups_is_what_chance_gives(
    mtbf_s: float, num_groups: int, step_s: float, stall_s: float, absence_s: float
) -> None:
    checkpoints = Checkpoints(interval_s=HOUR, stall_s=0.0)
    expected = replica_goodput(
        every(mtbf_s), num_groups, step_s, exactly(stall_s), exactly(absence_s), exactly(0.0), checkpoints
    ).share.likely
    simulated = simulated_replicas(mtbf_s, num_groups, step_s, stall_s, absence_s, seed=2)
    assert simulated == pytest.approx(expected, abs=0.015)


def test_a_hundred_thousand_chips_in_replica_groups() -> None:
    """FT-HSDP: from 44 % to 80 %, the stall from 10 minutes to 3, with 18 minutes between failures."""
    checkpoints = Checkpoints(interval_s=9 * MINUTE, stall_s=5.0)
    none_shared = replica_goodput(
        every(18 * MINUTE), 48, 20.0, exactly(3 * MINUTE), exactly(10 * MINUTE), exactly(10 * MINUTE),
        checkpoints,
    ).share.likely  # fmt: skip
    of_llama3 = failures("hopper", 16_384).model_copy(update={"per_day": exactly(DAY / (18 * MINUTE))})
    some_shared = replica_goodput(
        of_llama3, 48, 20.0, exactly(3 * MINUTE), exactly(10 * MINUTE), exactly(10 * MINUTE), checkpoints
    ).share.likely
    assert some_shared < 0.80 < none_shared
    assert none_shared - some_shared < 0.15


def test_ends_are_in_order_and_replicas_pay_at_scale() -> None:
    job = failures("hopper", 100_000)
    checkpoints = Checkpoints(interval_s=best_interval_s(job.mtbf_s.likely, 2.0, 60.0), stall_s=2.0)
    whole = whole_job_goodput(job, published("restart_s"), checkpoints)
    replicas = replica_goodput(
        job, 195, 20.0, published("replica_stall_s"), published("replica_absence_s"), published("restart_s"),
        checkpoints,
    )  # fmt: skip
    assert whole.share.low < whole.share.likely < whole.share.high
    assert replicas.share.low > whole.share.low
    assert replicas.share.likely > whole.share.likely + 0.1


def test_missing_groups_cost_their_share() -> None:
    def share(missing: float) -> float:
        return replica_goodput(
            every(1e12), 10, 20.0, exactly(60.0), exactly(600.0), exactly(600.0),
            Checkpoints(interval_s=600.0, stall_s=0.0), missing,
        ).share.likely  # fmt: skip

    assert share(2.5) == pytest.approx(0.75, rel=1e-6)


# --- spares and stragglers ---


def test_byterobusts_spares() -> None:
    """Four per 1,024 instances are its 99th percentile; that takes repairs of some seven hours."""
    rate = failures("hopper", 8 * 1024).per_day.likely
    assert num_spares(rate * published("repair_days").low, 0.99) == 4


@pytest.mark.parametrize("mean", [0.0, 0.3, 5.0, 60.0])
def test_spares_by_counting(mean: float) -> None:
    in_repair = np.random.default_rng(3).poisson(mean, 200_000)
    for confidence in (0.5, 0.9, 0.99):
        spares = num_spares(mean, confidence)
        assert (in_repair <= spares).mean() >= confidence - 0.003
        assert spares == 0 or (in_repair <= spares - 1).mean() < confidence + 0.003
    missing = np.ceil(np.maximum(0, in_repair - 4) / 8).mean()
    assert expected_missing_groups(mean, 4, 8) == pytest.approx(missing, abs=0.02)


def test_spares_of_a_very_large_fleet() -> None:
    """For large means a Poisson is a normal; e^-mean alone would be 0."""
    assert num_spares(5000.0, 0.99) == pytest.approx(5000 + 2.326 * math.sqrt(5000), abs=3)


def test_nodes_in_repair() -> None:
    """Little's law, for those failures that break a part: of Llama 3's, all but 95 of 419."""
    job = failures("hopper", 100_000)
    out = nodes_in_repair(job, published("repair_days"))
    assert out.likely == pytest.approx(12.5 * 3.79 * (419 - 95) / 419 * 1.0)
    assert out.low < out.likely < out.high


def test_stragglers() -> None:
    slow = table("failures")["stragglers"]
    assert straggler_slowdown(1, slow["slow_share"], slow["slowdown"]) == pytest.approx(0.0005)
    assert straggler_slowdown(2048, slow["slow_share"], slow["slowdown"]) == pytest.approx(0.1, rel=1e-3)
    random = np.random.default_rng(4).random((20_000, 48)) < 0.005
    assert straggler_slowdown(48, 0.005, 0.1) == pytest.approx(0.1 * random.any(1).mean(), abs=0.002)


# --- bad input ---


def test_bad_input_is_a_sentence() -> None:
    checkpoints = Checkpoints(interval_s=60.0, stall_s=0.0)
    second = exactly(1.0)
    with pytest.raises(ConfigError, match="Did you mean 'llama3'"):
        failures("hopper", 8, causes="lama3")
    with pytest.raises(ConfigError, match="a job has at least one"):
        failures("hopper", 0)
    with pytest.raises(ConfigError, match="Did you mean 'restart_s'"):
        published("restart")
    with pytest.raises(ConfigError, match="leaves no survivors"):
        replica_goodput(every(1e4), 1, 1.0, second, second, second, checkpoints)
    with pytest.raises(ConfigError, match="at least one group must be there"):
        replica_goodput(every(1e4), 2, 1.0, second, second, second, checkpoints, missing_groups=2)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        num_spares(1.0, 1.0)
    with pytest.raises(ConfigError, match="0 or more, and finite"):
        num_spares(math.nan, 0.9)
    with pytest.raises(ConfigError, match="a group at least 1"):
        expected_missing_groups(1.0, 0, 0)
    with pytest.raises(ConfigError, match="at least one pool"):
        together([])
    with pytest.raises(ConfigError, match="must be positive"):
        best_interval_s(0.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match="share from 0 to 1"):
        straggler_slowdown(8, 2.0, 0.1)
    with pytest.raises(ValidationError, match="checkpoint at most every 90 s"):
        Checkpoints(interval_s=60.0, stall_s=0.0, write_s=90.0)
    with pytest.raises(ValidationError, match=r"sum to 0\.5"):
        Failures(per_day=second, by_cause={"any": 0.5})
    with pytest.raises(ConfigError, match="no mean time between"):
        _ = Failures(per_day=exactly(0.0), by_cause={"any": 1.0}).mtbf_s
