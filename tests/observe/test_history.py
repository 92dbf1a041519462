"""An event log, read back as the history of a run."""

from pathlib import Path

from colossus.events import CheckpointRejected, EventLog, StepSkipped, read_events
from colossus.observe.history import describe_problem, history
from tests.observe.logs import evaluated, saved, started, step_done, whole_run


def test_a_whole_run() -> None:
    told = history(whole_run())
    assert (told.num_steps, told.num_tokens) == (1000, 256_000)
    assert len(told.evaluations) == 10
    assert told.bits_per_byte == told.evaluations[-1].bits_per_byte
    assert len(told.problems) == 2
    assert told.finished is not None


def test_what_a_crash_threw_away_is_told_once_as_it_was_redone() -> None:
    before = [started(), *(step_done(i) for i in range(10)), evaluated(5, 3.0), saved(6), evaluated(10, 2.5)]
    redone = [step_done(i, step_s=0.2) for i in range(6, 12)]
    told = history([*before, started(first_step=6), *redone])
    assert [step.step for step in told.steps] == list(range(12))
    assert told.steps[7].step_time_s == 0.2
    assert [e.step for e in told.evaluations] == [5]
    assert [c.step for c in told.checkpoints] == [6]
    assert told.finished is None


def test_torn_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write(started())
        log.write(step_done(0))
    with path.open("a") as file:
        file.write('{"event":"Sunrise","time_s":1}\n{"event":"StepDone","step":1,"tok')
    with EventLog(path) as log:
        log.write(step_done(1))
    assert history(read_events(path)).num_steps == 2


def test_nothing_has_happened_yet() -> None:
    told = history([])
    assert (told.num_steps, told.num_tokens, told.bits_per_byte) == (0, 0, None)


def test_problems_are_sentences() -> None:
    skipped = StepSkipped(step=3, loss=2.0, gradient_norm=None, first_sample=12, num_samples=4, in_a_row=2)
    assert describe_problem(skipped) == (
        "step 3 skipped: its gradient was not finite (samples 12 to 15; 2 in a row)"
    )
    assert "an older one is used" in describe_problem(CheckpointRejected(path="p", reason="bad hash"))
