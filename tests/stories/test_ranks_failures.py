"""Runs of two ranks in which something goes wrong: one readable error, nothing left behind, and on from there."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from colossus.checkpoint import list_checkpoints
from colossus.events import CheckpointFailed, Decision, RunFinished, RunStarted
from colossus.observe.run_directory import RunDirectory
from tests.stories.processes import Done, Process, colossus, events, kinds, same_course, steps_done
from tests.stories.rank_runs import Ranks, patience, rank_processes

NUM_STEPS = 30
SETTINGS = (f"budget={NUM_STEPS} steps", "checkpoints.every=5 steps", "evaluation.every=1000 steps")
HOST = os.uname().nodename


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("ranks"), SETTINGS)


@pytest.fixture(scope="module")
def plan(ranks: Ranks) -> str:
    return ranks.plan(shard=2, sharding="weights")


@pytest.fixture(scope="module")
def whole(ranks: Ranks, plan: str) -> RunDirectory:
    """A run that nothing befell."""
    ranks.colossus(*ranks.new("whole", plan))
    return ranks.run("whole")


def checkpoint_steps(run: RunDirectory) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints_path)]


def without_progress(text: str) -> str:
    """What comes after the preparation of a corpus has been told, by whichever run is the first."""
    before, mark, error = text.partition("error: ")
    assert "Traceback" not in before
    return mark + error


def is_one_readable_error(error: str, *words: str) -> None:
    """Of rank 1, in a few lines; what became of its peers is in their logs."""
    error = without_progress(error)
    assert error.startswith(f"error: Rank 1 of 2 on {HOST} ")
    assert error.count("error:") == 1
    assert error.count("\n") < 25
    assert "\nFailed too, after it: rank 0" in error or "Failed too" not in error
    for word in words:
        assert word in error
    assert "Connection" not in error


# --- a rank dies ---

DEATHS = {
    "before ranks have met": "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)",
    "in the middle of a step": """
        if rank == 1:
            from colossus.parallel import rank_model

            forward = rank_model.RankModel._forward
            calls = []

            def dying(*arguments):
                calls.append(1)
                if len(calls) == 25:  # of two micro-batches a step: the first of the thirteenth
                    os.kill(os.getpid(), signal.SIGKILL)
                return forward(*arguments)

            rank_model.RankModel._forward = dying
        """,
    "in the middle of a checkpoint": """
        if rank == 1:
            write = os.write

            def dying(file, data):
                folder, _, rest = os.readlink(f"/proc/self/fd/{file}").partition("/checkpoints/")
                if rest and any(name[0] != "." for name in os.listdir(folder + "/checkpoints")):
                    write(file, data[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return write(file, data)

            os.write = dying
        """,
}
SAVED = {
    "before ranks have met": [],
    "in the middle of a step": [5, 10],
    "in the middle of a checkpoint": [5],
}


@pytest.mark.slow
@pytest.mark.parametrize("when", DEATHS)
def test_a_rank_is_killed_and_the_run_goes_on_as_if_it_had_not_been(
    when: str, ranks: Ranks, plan: str, whole: RunDirectory
) -> None:
    name = "killed-" + when.replace(" ", "-")
    done = ranks.colossus(*ranks.new(name, plan), in_ranks=DEATHS[when], status=1)
    is_one_readable_error(done.err, "was killed by SIGKILL (out of memory?")
    run = ranks.run(name)
    assert run.state() == "crashed"
    assert checkpoint_steps(run) == SAVED[when]
    ranks.colossus("train", "--resume", str(run.path))
    same_course(whole, run)
    assert not list(run.checkpoints_path.glob(".*"))  # no leftovers of the dead


def test_a_rank_is_killed_from_outside(ranks: Ranks, plan: str) -> None:
    with ranks.running(*ranks.new("outside", plan)) as process:
        run = ranks.run("outside")
        process.wait_until(lambda: checkpoint_steps(run) != [])
        others = rank_processes(process)
        others.pop(1).kill()
        patience(process)
        assert process.wait() == 1
        is_one_readable_error(process.err, "was killed by SIGKILL")
    assert not any(psutil.pid_exists(other.pid) for other in others.values())
    ranks.nothing_is_left()
    assert checkpoint_steps(run)
    assert "Connection" in (run.path / "logs" / "rank-00000.log").read_text()  # what rank 0 saw of it


@pytest.mark.slow
def test_whoever_started_the_ranks_is_killed(ranks: Ranks, plan: str, whole: RunDirectory) -> None:
    with ranks.running(*ranks.new("orphans", plan)) as process:
        run = ranks.run("orphans")
        process.wait_until(lambda: steps_done(run) >= 8)
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    ranks.nothing_is_left()
    assert run.state() == "crashed"
    ranks.colossus("train", "--resume", str(run.path))
    same_course(whole, run)


RAISES = """
from colossus.parallel import rank_model

forward = rank_model.RankModel._forward
calls = []

def failing(*arguments):
    calls.append(1)
    if rank == 1 and len(calls) == 7:
        raise ValueError("seven is too many")
    return forward(*arguments)

rank_model.RankModel._forward = failing
"""


def test_an_exception_on_one_rank(ranks: Ranks, plan: str) -> None:
    done = ranks.colossus(*ranks.new("raises", plan), in_ranks=RAISES, status=1)
    is_one_readable_error(
        done.err, "ended with exit code 1.", "ValueError: seven is too many", "sitecustomize.py", "in failing"
    )
    log = ranks.run("raises").path / "logs" / "rank-00001.log"
    assert str(log) in done.err
    assert log.read_text().endswith("ValueError: seven is too many\n")


# --- disks ---

NO_ROOM = """
if rank == 1:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
"""


@pytest.mark.slow
def test_one_rank_cannot_write_its_part_of_checkpoints(ranks: Ranks, plan: str, whole: RunDirectory) -> None:
    done = ranks.colossus(*ranks.new("full", plan), in_ranks=NO_ROOM)
    run = ranks.run("full")
    failed = [event for event in events(run) if isinstance(event, CheckpointFailed)]
    assert {event.step for event in failed} >= {5, NUM_STEPS}
    assert all("File too large" in event.reason for event in failed)
    assert "warning: checkpoint at step 5 not written" in done.out
    assert checkpoint_steps(run) == []
    assert run.state() == "finished"
    ranks.colossus("train", "--resume", str(run.path))  # from the beginning, with room
    same_course(whole, run)


# --- somebody asks for the end ---


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_once_all_ranks_stop_after_one_step_and_save(
    number: signal.Signals, ranks: Ranks, plan: str, whole: RunDirectory
) -> None:
    name = f"asked-{number.name}"
    with ranks.running(*ranks.new(name, plan)) as process:
        run = ranks.run(name)
        process.wait_until(lambda: steps_done(run) >= 7)
        process.signal(number)
        patience(process)
        assert process.wait() == 130
        assert f"go on: colossus train --resume {run.path}" in process.out
        assert "error" not in process.err
    ranks.nothing_is_left()
    finished = events(run)[-1]
    assert isinstance(finished, RunFinished)
    assert (finished.reason, finished.step) == ("interrupted", steps_done(run))
    assert checkpoint_steps(run)[-1] == finished.step
    ranks.colossus("train", "--resume", str(run.path))
    same_course(whole, run)
    assert steps_done(run) == NUM_STEPS  # none of them twice


def test_asked_before_the_ranks_have_started(ranks: Ranks, plan: str) -> None:
    with ranks.running(*ranks.new("early", plan), in_ranks="time.sleep(1000)") as process:
        process.wait_until(lambda: len(rank_processes(process)) == 2)
        process.signal(signal.SIGINT)
        patience(process)
        assert process.wait() == 130
        assert "error" not in process.err
    ranks.nothing_is_left()
    assert steps_done(ranks.run("early")) == 0


@pytest.mark.slow
def test_a_resumed_run_is_asked_before_its_ranks_have_started(
    ranks: Ranks, plan: str, whole: RunDirectory
) -> None:
    """What the summary says is then of the process before."""
    before = len(events(whole))
    with ranks.running("train", "--resume", str(whole.path), in_ranks="time.sleep(1000)") as process:
        process.wait_until(lambda: len(rank_processes(process)) == 2)
        process.signal(signal.SIGINT)
        patience(process)
        assert process.wait() == 130, process.err
        assert "held-out" not in process.out
    ranks.nothing_is_left()
    assert len(events(whole)) == before


SLOW_DISK = """
from colossus.checkpoint import saver

save = saver.Attempt.save
saver.Attempt.save = lambda *arguments: (time.sleep(100), save(*arguments))[1]
"""


@pytest.mark.slow
def test_asked_twice_it_ends_at_once(ranks: Ranks, plan: str) -> None:
    with ranks.running(*ranks.new("twice", plan), in_ranks=SLOW_DISK) as process:
        run = ranks.run("twice")
        process.wait_until(lambda: steps_done(run) >= 3)
        process.signal(signal.SIGINT)
        _wait_until_still(process, run)
        assert process.process.is_alive()
        process.signal(signal.SIGINT)
        patience(process)
        assert process.wait() == 130
        assert "Traceback" not in process.err
    ranks.nothing_is_left()
    assert "RunFinished" not in kinds(run)
    assert run.state() == "crashed"


def _wait_until_still(process: Process, run: RunDirectory) -> None:
    done = [-1] * 50

    def still() -> bool:
        done.append(steps_done(run))
        return done[-50] == done[-1]

    process.wait_until(still)


# --- what cannot be ---


def refused(done: Done, *words: str) -> None:
    error = without_progress(done.err)
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_a_plan_that_was_edited_since(ranks: Ranks, plan: str) -> None:
    edited = ranks.folder / "edited.json"
    edited.write_text(Path(plan).read_text().replace('"sharding": "weights"', '"sharding": "none"'))
    done = colossus(*ranks.new("edited", str(edited)), status=2)
    refused(done, f"{edited} was edited after it was planned")
    assert not ranks.run("edited").path.exists()


def test_more_ranks_than_the_machine_can_run(ranks: Ranks) -> None:
    done = colossus(*ranks.new("many", ranks.plan("many", shard=1000)), status=2)
    refused(done, "the plan has 1,000 ranks, and this machine has")
    assert not ranks.run("many").path.exists()


@dataclass(frozen=True)
class Replace:
    """Between the start and the ranks, somebody puts another plan in place."""

    other: str

    def __call__(self) -> None:
        from colossus.trainer import run_ranks as module

        start = module.run_ranks

        def replaced(processes: object) -> object:
            run = processes[0].log_path.parents[1]  # type: ignore[index]
            (run / "plan.json").write_text(Path(self.other).read_text())
            return start(processes)  # type: ignore[arg-type]

        module.run_ranks = replaced  # type: ignore[assignment]


@pytest.mark.slow
def test_a_plan_that_changed_before_ranks_read_it(ranks: Ranks, plan: str) -> None:
    other = ranks.plan("other", shard=2, sharding="gradients")
    done = ranks.colossus(*ranks.new("changed", plan), before=Replace(other), status=1)
    refused(done, "the run was started with plan ", "it was changed in between; start it again")
    assert steps_done(ranks.run("changed")) == 0


@pytest.mark.slow
def test_another_number_of_ranks_than_the_plan_has(ranks: Ranks, whole: RunDirectory) -> None:
    place = {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "9",
    }
    done = subprocess.run(
        [sys.executable, "-m", "colossus.trainer.run_ranks", str(whole.path)],
        env={**os.environ, **place},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == "error: the plan has 2 ranks, and 3 were started; start as many as it has\n"


@pytest.mark.slow
def test_a_run_that_others_are_training(ranks: Ranks, plan: str) -> None:
    other = ranks.plan("other", shard=2, sharding="gradients")
    with ranks.running(*ranks.new("used", plan), in_ranks=SLOW_DISK) as process:
        run = ranks.run("used")
        process.wait_until(lambda: "StepDone" in kinds(run))
        before = run.plan(), (run.path / "logs" / "rank-00000.log").read_bytes()
        for also in ((), ("--plan", other)):
            done = colossus("train", "--resume", str(run.path), *also, status=1)
            refused(done, "is in use: process ")
        after = run.plan(), (run.path / "logs" / "rank-00000.log").read_bytes()
        assert after[0] == before[0]
        assert after[1].startswith(before[1])
        assert process.process.is_alive()
    ranks.nothing_is_left()


@pytest.mark.slow
def test_a_plan_with_another_batch_for_a_run(ranks: Ranks, whole: RunDirectory) -> None:
    larger = ranks.plan("larger", shard=1, replica=4)
    before = whole.plan()
    done = colossus("train", "--resume", str(whole.path), "--plan", larger, status=2)
    refused(done, "the plan trains on 8 sequences of 32 tokens a step", "on 4 of 32: a run keeps its batch")
    assert whole.plan() == before
    assert [e.first_step for e in events(whole) if isinstance(e, RunStarted)] == [0]


@pytest.mark.slow
def test_a_budget_of_many_digits_is_the_same_to_every_rank(ranks: Ranks, plan: str) -> None:
    """1,234,567 tokens are not 1.23457e+06: that would be another budget, and another schedule."""
    run = ranks.run("digits")
    ranks.colossus(*ranks.new("digits", plan), "--tokens", "1234567", in_ranks=STOPS, status=130)
    ranks.colossus("train", "--resume", str(run.path), in_ranks=STOPS, status=130)
    assert run.config().budget.amount == 1_234_567
    assert [e.what for e in events(run) if isinstance(e, Decision) and e.what == "budget"] == []


STOPS = """
from colossus.trainer import ranks

accumulate = ranks.OneOfMany.accumulate

def stopping(*arguments):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return accumulate(*arguments)

ranks.OneOfMany.accumulate = stopping
"""
