"""A run that is killed, again and again, and goes on as if it had never stopped."""

import random
import signal
from pathlib import Path

import pytest

from colossus.events import RunFinished
from colossus.observe.run_directory import RunDirectory
from colossus.spec.model import Dtype
from tests.stories.processes import colossus, events, kinds, recipe, running, same_course, steps_done

LENGTH = 24


def kill_writes(die_at: int) -> None:
    """The process kills itself at its `die_at`-th write to a checkpoint's files."""
    import os

    from colossus.checkpoint import payload

    write, count = payload.os.write, 0

    def counted(file: int, data: bytes) -> int:
        nonlocal count
        if "checkpoints" in str(Path(f"/proc/self/fd/{file}").readlink()):
            count += 1
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return write(file, data)

    payload.os.write = counted  # type: ignore[assignment]


def kill_after(steps: int) -> None:
    """The process kills itself when so many steps of it are in the log, wherever its saving thread is."""
    import os
    import time

    from colossus.trainer import session

    train = session.train

    def counted(*arguments: object) -> object:
        for i, report in enumerate(train(*arguments)):  # type: ignore[arg-type]
            yield report
            if i + 1 == steps:
                time.sleep(random.random() * 0.02)
                os.kill(os.getpid(), signal.SIGKILL)

    session.train = counted  # type: ignore[assignment]


class Disaster:
    """A call to make in the process: `Disaster(kill_after, 3)`."""

    def __init__(self, what: object, when: int) -> None:
        self.what, self.when = what, when

    def __call__(self) -> None:
        self.what(self.when)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("model", "optimizer", "dtype"),
    [
        ("plain", "adamw", "float32"),
        ("sparse", "muon", "bfloat16"),
        pytest.param("plain", "adamw", "bfloat16", marks=pytest.mark.slow),
        pytest.param("sparse", "muon", "float32", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_instant_it_ends_as_one_that_never_was(
    model: str, optimizer: str, dtype: Dtype, tmp_path: Path
) -> None:
    settings = [f"budget={LENGTH} steps", "checkpoints.every=3 steps"]
    path = recipe(tmp_path, *settings, model=model, optimizer=optimizer, dtype=dtype)
    runs = str(tmp_path / "runs")
    colossus("train", path, "--runs", runs, "--name", "whole")
    whole = RunDirectory.open("whole-001", runs)
    assert steps_done(whole) == LENGTH

    disasters = [
        Disaster(kill_after, 2),
        Disaster(kill_after, 8),
        Disaster(kill_writes, 2),
        Disaster(kill_writes, 7),
    ]
    colossus("train", path, "--runs", runs, "--name", "killed", before=disasters[0], status=-signal.SIGKILL)
    run = RunDirectory.open("killed-001", runs)
    for disaster in disasters[1:]:
        colossus("train", "--resume", str(run.path), before=disaster, status=-signal.SIGKILL)
        assert run.state() == "crashed"
    colossus("train", "--resume", str(run.path))
    same_course(whole, run)
    assert steps_done(run) > LENGTH  # some were done again
    assert run.state() == "finished"
    assert not list(run.checkpoints_path.glob(".*"))  # no leftovers of the dead


@pytest.mark.slow
def test_killed_from_outside(tmp_path: Path) -> None:
    """The same with a clock for an assassin, on a run long enough to be met anywhere."""
    settings = ["budget=150 steps", "checkpoints.every=2 steps", "evaluation.every=50 steps"]
    path = recipe(tmp_path, *settings, model="sparse", optimizer="muon")
    runs = str(tmp_path / "runs")
    colossus("train", path, "--runs", runs, "--name", "whole")
    chance = random.Random(1)
    resume = ("train", path, "--runs", runs, "--name", "killed")
    for _ in range(3):
        with running(*resume) as process:
            found = tmp_path / "runs" / "killed-001"
            run = RunDirectory(found)
            before = steps_done(run)
            goal = before + chance.randrange(5, 40)
            process.wait_until(lambda goal=goal, run=run: steps_done(run) >= goal)
            process.signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        resume = ("train", "--resume", str(found))
    colossus(*resume)
    same_course(RunDirectory.open("whole-001", runs), run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_goes_on_later(number: signal.Signals, tmp_path: Path) -> None:
    settings = ["budget=60 steps", "checkpoints.every=1000 steps", "evaluation.every=1000 steps"]
    path = recipe(tmp_path, *settings)
    runs = str(tmp_path / "runs")
    colossus("train", path, "--runs", runs, "--name", "whole")
    with running("train", path, "--runs", runs, "--name", "stopped") as process:
        run = RunDirectory(tmp_path / "runs" / "stopped-001")
        process.wait_until(lambda: steps_done(run) >= 20)
        process.signal(number)
        assert process.wait() == 130
        assert f"go on: colossus train --resume {run.path}" in process.out
    assert kinds(run)[-2:] == ["CheckpointSaved", "RunFinished"]
    finished = events(run)[-1]
    assert isinstance(finished, RunFinished)
    assert (finished.reason, finished.step) == ("interrupted", steps_done(run))
    assert run.state() == "interrupted"
    colossus("train", "--resume", str(run.path))
    same_course(RunDirectory.open("whole-001", runs), run)
    assert steps_done(run) == 60  # and none of them twice


def slow_disk() -> None:
    """Checkpoints take their time."""
    import time

    from colossus.checkpoint import saver

    save = saver.save
    saver.save = lambda *a, **k: (time.sleep(30), save(*a, **k))[1]  # type: ignore[assignment]


def test_asked_twice_it_ends_at_once(tmp_path: Path) -> None:
    path = recipe(tmp_path, "budget=100000 steps", "checkpoints.every=10000 steps")
    with running("train", path, "--runs", str(tmp_path / "runs"), before=slow_disk) as process:
        run = RunDirectory(tmp_path / "runs" / "story-001")
        process.wait_until(lambda: steps_done(run) >= 3)
        process.signal(signal.SIGINT)
        done = 0

        def still() -> bool:
            nonlocal done
            before, done = done, steps_done(run)
            return done == before

        process.wait_until(still)
        process.signal(signal.SIGINT)
        assert process.wait() == 130
    assert "RunFinished" not in kinds(run)
    assert run.state() == "crashed"
