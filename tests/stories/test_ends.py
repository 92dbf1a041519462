"""Where a run ends: its budget, whatever that is counted in; another budget; numbers that are none."""

import math
from pathlib import Path

import pytest

from colossus.checkpoint import list_checkpoints, verify
from colossus.events import Decision, RunFinished, StepDone, StepSkipped
from colossus.observe.run_directory import RunDirectory
from tests.stories.processes import colossus, events, kinds, losses, recipe, same_course


def steps(run: RunDirectory) -> list[StepDone]:
    return [event for event in events(run) if isinstance(event, StepDone)]


@pytest.mark.parametrize(
    ("option", "num_steps"), [(("--steps", "7"), 7), (("--tokens", "1k"), 8), (("--tokens", "1025"), 9)]
)
def test_steps_and_tokens_end_exactly(option: tuple[str, str], num_steps: int, tmp_path: Path) -> None:
    path = recipe(tmp_path, "schedule.decay_fraction=0.5")
    colossus("train", path, "--runs", str(tmp_path / "runs"), *option)
    done = steps(RunDirectory(tmp_path / "runs" / "story-001"))
    assert [step.step for step in done] == list(range(num_steps))
    assert done[-1].tokens == num_steps * 4 * 32
    peak = max(step.learning_rate for step in done)
    assert done[-1].learning_rate == pytest.approx(peak * 2 / num_steps, rel=0.3)  # one step from nothing


@pytest.mark.parametrize(
    ("option", "unit", "length_s"),
    [(("--minutes", "0.025"), "seconds", 1.5), (("--cpu-seconds", "4"), "cpu_seconds", 4.0)],
)
def test_time_ends_when_it_is_up(option: tuple[str, str], unit: str, length_s: float, tmp_path: Path) -> None:
    path = recipe(tmp_path, "checkpoints.every=1 hours", "evaluation.every=1 hours")
    colossus("train", path, "--runs", str(tmp_path / "runs"), *option)
    done = steps(RunDirectory(tmp_path / "runs" / "story-001"))
    used = [getattr(step, unit) for step in done]
    assert used[-2] < length_s <= used[-1] < length_s + 0.5
    assert done[-1].learning_rate < 0.2 * max(step.learning_rate for step in done)


def test_two_budgets_are_refused(tmp_path: Path) -> None:
    done = colossus(
        "train",
        recipe(tmp_path),
        "--runs",
        str(tmp_path / "runs"),
        "--steps",
        "3",
        "--tokens",
        "1k",
        status=2,
    )
    said = (
        "error: --steps 3 and --tokens 1k contradict each other: a run has one budget, so give one of them\n"
    )
    assert done.err == said
    assert not (tmp_path / "runs").exists()


# --- another budget ---


def test_a_finished_run_is_made_longer(tmp_path: Path) -> None:
    path = recipe(tmp_path, "schedule.decay_fraction=0.5")
    runs = tmp_path / "runs"
    colossus("train", path, "--runs", str(runs))
    run = RunDirectory(runs / "story-001")
    before = losses(run)
    done = colossus("train", "--resume", str(run.path), "--steps", "20")
    said = "budget: 20 steps. asked for on resuming, in place of 12 steps; the schedule now ends with it"
    assert said in done.out
    assert run.config().budget.describe() == "20 steps"
    assert "trained for 20 steps" in (run.path / "README.md").read_text()
    assert losses(run)[:12] == before
    taken = steps(run)
    assert [step.step for step in taken] == list(range(20))
    rates = [step.learning_rate for step in taken]
    assert rates[12] > rates[11]  # 12 of 20 is earlier in the schedule than 11 of 12
    assert rates[-1] == pytest.approx(rates[12] / 8, rel=0.01)  # and it falls to nothing from there
    decisions = [event for event in events(run) if isinstance(event, Decision) and event.what == "budget"]
    assert len(decisions) == 1
    assert run.state() == "finished"


def test_a_budget_that_is_what_it_was_changes_nothing(tmp_path: Path) -> None:
    path, runs = recipe(tmp_path), tmp_path / "runs"
    colossus("train", path, "--runs", str(runs))
    run = RunDirectory(runs / "story-001")
    config = run.config_path.read_text()
    colossus("train", "--resume", str(run.path), "--steps", "12")
    assert run.config_path.read_text() == config
    assert not any(isinstance(event, Decision) and event.what == "budget" for event in events(run))
    done = colossus("train", "--resume", str(run.path), "--tokens", "1k", status=2)
    assert done.err.splitlines()[-1].startswith("error: the run has trained 12 steps (1,536 tokens, ")
    assert done.err.splitlines()[-1].endswith("so nothing is left of 1k tokens in all")
    assert run.config_path.read_text() == config
    assert run.state() == "finished"
    done = colossus("train", "--resume", str(run.path), "--steps", "20", "--seed", "3", status=2)
    assert "takes no seed=3, only another budget" in done.err


# --- numbers that are none ---


def poison() -> None:
    """From the seventh step on the gradient is not a number."""
    from colossus.trainer import execute

    accumulate, calls = execute.accumulate_gradients, []

    def poisoned(model: object, *arguments: object, **named: object) -> object:
        sums = accumulate(model, *arguments, **named)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) >= 7:
            model.embedding.weight.grad.fill_(math.nan)  # type: ignore[attr-defined]
        return sums

    execute.accumulate_gradients = poisoned  # type: ignore[assignment]


def test_a_run_that_diverges_says_so_and_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    path, runs = recipe(tmp_path, "max_skipped_steps=3"), tmp_path / "runs"
    done = colossus("train", path, "--runs", str(runs), before=poison, status=1)
    assert done.err.splitlines()[-1].startswith(
        "error: the loss or its gradient was not finite in 3 steps in a row, up to step 8; none of them was applied."
    )
    assert "Traceback" not in done.err
    assert "warning: step 6 skipped: its gradient was not finite" in done.out
    run = RunDirectory(runs / "story-001")
    skipped = [event for event in events(run) if isinstance(event, StepSkipped)]
    assert [(event.step, event.in_a_row, event.first_sample) for event in skipped] == [
        (6, 1, 24),
        (7, 2, 28),
        (8, 3, 32),
    ]
    finished = events(run)[-1]
    assert isinstance(finished, RunFinished)
    assert finished.reason == "diverged"
    assert run.state() == "diverged"
    newest = list_checkpoints(run.checkpoints_path)[-1]
    assert not verify(newest.path)
    # What was poison is gone: the run goes on from there, to where it would have come.
    colossus("train", path, "--runs", str(runs), "--name", "whole")
    if newest.step == 4:
        colossus("train", "--resume", str(run.path))
        same_course(run, RunDirectory(runs / "whole-001"))


def test_an_absurd_learning_rate(tmp_path: Path) -> None:
    path = recipe(tmp_path, "budget=60 steps", "optimizer.learning_rate=1e30", "gradient_clip=false")
    done = colossus("train", path, "--runs", str(tmp_path / "runs"), status=1)
    assert "error: the loss or its gradient was not finite in 5 steps in a row" in done.err
    assert kinds(RunDirectory(tmp_path / "runs" / "story-001"))[-1] == "RunFinished"
