"""What a run measured, from logs whose truth is known because they were made up."""

import dataclasses
from collections.abc import Iterator

import pytest

from colossus.events import CheckpointSaved, Decision, Evaluated, Event, RunFinished, RunStarted, StepDone
from colossus.observe.report import SETTLING_STEPS, Report, measured
from colossus.spec.ranged import Ranged
from tests.observe.logs import STEP_TOKENS, whole_run
from tests.observe.test_summary_and_curves import SUMMARY


class Log:
    """A log written on a clock of its own: each thing takes the time that it is said to take."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.events: list[Event] = []
        self.tokens = 0

    def decide(self, plan: str) -> "Log":
        self.events.append(Decision(time_s=self.now_s, what="plan", choice=plan, reason="test"))
        return self

    def start(self, first_step: int = 0) -> "Log":
        self.events.append(
            RunStarted(time_s=self.now_s, first_step=first_step, num_params=1, host="h", process_id=1)
        )
        self.tokens = first_step * STEP_TOKENS
        return self

    def steps(self, *steps: int, took_s: float = 0.1, between_s: float = 0.0) -> "Log":
        for step in steps:
            self.now_s += took_s
            self.tokens += STEP_TOKENS
            self.events.append(
                StepDone(
                    time_s=self.now_s, step=step, tokens=self.tokens, seconds=self.now_s, cpu_seconds=2.0 * self.now_s,
                    step_time_s=took_s, loss=3.0, gradient_norm=1.0, learning_rate=0.1,
                    tokens_per_s=STEP_TOKENS / took_s, mfu=0.3, memory_bytes=1000 + step,
                )
            )  # fmt: skip
            self.now_s += between_s
        return self

    def evaluate(self, step: int, took_s: float) -> "Log":
        self.now_s += took_s
        self.events.append(
            Evaluated(time_s=self.now_s, step=step, tokens=self.tokens, loss=3.0, bits_per_byte=1.0,
                      num_heldout_tokens=1, seconds=took_s)
        )  # fmt: skip
        return self

    def saved(self, step: int, took_s: float) -> "Log":
        """Just now; it was begun `took_s` ago, after `step` steps."""
        self.events.append(
            CheckpointSaved(time_s=self.now_s, step=step, path="c", num_bytes=1, seconds=took_s)
        )
        return self

    def pass_s(self, seconds: float) -> "Log":
        self.now_s += seconds
        return self

    def finish(self, step: int, reason: str = "budget") -> "Log":
        self.events.append(RunFinished(time_s=self.now_s, step=step, reason=reason))
        return self

    def report(self, fingerprint: str | None = None) -> Report:
        return measured(iter(self.events), fingerprint=fingerprint)


def test_a_run_without_incident() -> None:
    report = measured(whole_run(1000))
    assert report.step_time_s == Ranged.exactly(0.1)
    assert report.tokens_per_s == pytest.approx(Ranged.exactly(STEP_TOKENS / 0.1))
    assert (report.num_steps, report.num_tokens) == (1000, 1000 * STEP_TOKENS)
    assert report.wall.kept_s == pytest.approx(100.0)
    assert report.hosts == ("h",)


def test_only_undisturbed_steps_are_timed() -> None:
    """All others take a hundred times as long here: one of them among the steady ones would be seen."""
    log = Log().start()
    log.steps(*range(SETTLING_STEPS), took_s=10.0).steps(3, 4, 5)
    log.evaluate(6, took_s=2.0).steps(6, took_s=10.0).steps(7, 8)
    log.steps(9, 10, took_s=10.0).saved(9, took_s=20.0)  # written during steps 9 and 10
    log.steps(11, 12).finish(13)
    report = log.report()
    assert (report.num_steps, report.num_steady_steps) == (13, 3 + 2 + 2)
    assert report.step_time_s == Ranged.exactly(0.1)
    assert report.step_cpu_s is not None
    assert report.step_cpu_s.low == report.step_cpu_s.high == pytest.approx(0.2, rel=1e-3)


def test_the_spread_holds_four_in_five() -> None:
    log = Log().start().steps(*range(SETTLING_STEPS))
    for i in range(101):
        log.steps(SETTLING_STEPS + i, took_s=1.0 + i / 100)
    spread = log.report().step_time_s
    assert spread is not None
    assert (spread.low, spread.likely, spread.high) == pytest.approx((1.1, 1.5, 1.9))


def test_without_a_steady_step_nothing_is_claimed() -> None:
    for log in (Log(), Log().start(), Log().start().steps(*range(SETTLING_STEPS))):
        report = log.report()
        assert report.step_time_s is report.tokens_per_s is None
    assert Log().report().wall.goodput is None


def test_a_crash_costs_the_steps_it_threw_away_and_the_time_until_training_went_on() -> None:
    log = Log().start().steps(*range(10)).evaluate(10, took_s=0.7).pass_s(20.0)
    log.start(first_step=6).steps(*range(6, 12), between_s=0.05).finish(12)
    report, wall = log.report(), log.report().wall
    assert (report.num_steps, report.num_tokens, report.num_crashes) == (12, 12 * STEP_TOKENS, 1)
    assert wall.kept_s == pytest.approx(1.2)
    assert wall.lost_s == pytest.approx(0.4)
    assert wall.evaluating_s == pytest.approx(0.7)
    assert wall.down_s == pytest.approx(20.0)
    assert wall.other_s == pytest.approx(6 * 0.05)
    assert wall.total_s == pytest.approx(log.events[-1].time_s - log.events[0].time_s)
    assert wall.goodput == pytest.approx(1.2 / (1.0 + 0.7 + 20.0 + 0.6 + 0.3))


def test_a_pause_that_somebody_wanted_is_no_crash() -> None:
    log = Log().start().steps(*range(5)).finish(5, "interrupted").pass_s(1e6)
    log.start(first_step=5).steps(*range(5, 10)).finish(10)
    report = log.report()
    assert report.num_crashes == 0
    assert report.wall.total_s == pytest.approx(1.0)
    assert report.wall.goodput == pytest.approx(1.0)


@pytest.fixture
def two_plans() -> Log:
    """Ten steps under plan a, a crash, and from step 8 on 20 steps under b, half as fast."""
    log = Log().decide("a").start().steps(*range(10)).pass_s(5.0)
    return log.decide("b").start(first_step=8).steps(*range(8, 28), took_s=0.2).finish(28)


def test_only_what_was_done_under_the_plan_counts(two_plans: Log) -> None:
    report = two_plans.report("b")
    assert (report.num_steps, report.num_tokens, report.num_crashes) == (20, 20 * STEP_TOKENS, 0)
    assert report.step_time_s == pytest.approx(Ranged.exactly(0.2))
    assert report.wall.total_s == pytest.approx(4.0)


def test_a_plan_that_was_left_has_nothing_to_show(two_plans: Log) -> None:
    assert two_plans.report("a").num_steps == 0
    two_plans.pass_s(1.0).decide("a").start(first_step=28).steps(28, 29)
    assert two_plans.report("a").num_steps == 2


def test_resuming_under_the_same_plan_goes_on_counting() -> None:
    log = Log().decide("a").start().steps(*range(5)).finish(5, "interrupted")
    log.decide("a").start(first_step=5).steps(*range(5, 9))
    assert log.report("a").num_steps == 9


def test_memory_is_that_of_the_fullest_rank_once_the_run_has_ended() -> None:
    log = Log().start().steps(*range(5))
    by_rank = dataclasses.replace(SUMMARY, peak_memory_bytes_by_rank=(5, 9, 7), device_kind="cuda")
    running = measured(log.events, summary=by_rank)
    assert running.memory_bytes_by_rank == (1004,)  # an older process's summary is not of this one
    assert "has not ended" in running.memory_note
    log.finish(5)
    ended = measured(log.events, summary=by_rank)
    assert (ended.memory_bytes_by_rank, ended.memory_note, ended.device_kind) == ((5, 9, 7), "", "cuda")
    older = measured(log.events, summary=SUMMARY)
    assert older.memory_bytes_by_rank == (SUMMARY.peak_rss_bytes,)
    assert "older version" in older.memory_note


def test_the_last_checkpoint_does_not_come_when_it_is_due() -> None:
    def checkpoints() -> Iterator[Log]:
        log = Log().start()
        for due in (10, 20, 30):
            log.steps(*range(due - 10, due)).saved(due, took_s=0.0)
        yield log
        yield log.steps(30).saved(31, took_s=0.0).finish(31)

    for log in checkpoints():
        assert log.report().checkpoint_interval_s == pytest.approx(1.0)
