"""Disks that flip bits, fill up, and refuse."""

import resource
import shutil
from pathlib import Path

import pytest

from colossus.checkpoint import list_checkpoints
from colossus.events import CheckpointFailed, CheckpointRejected, RunStarted
from colossus.observe.run_directory import RunDirectory
from tests.stories.processes import colossus, events, kinds, recipe, running, same_course


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """12 steps, with checkpoints after 8 and 12."""
    directory = tmp_path_factory.mktemp("trained")
    colossus("train", recipe(directory), "--runs", str(directory / "runs"))
    return RunDirectory(directory / "runs" / "story-001")


@pytest.fixture
def run(trained: RunDirectory) -> RunDirectory:
    """The same, to spoil."""
    path = trained.path.with_name("spoilt-001")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(trained.path, path)
    return RunDirectory(path)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_a_damaged_checkpoint_is_named_and_an_older_one_used(
    damage: object, run: RunDirectory, trained: RunDirectory
) -> None:
    newest = list_checkpoints(run.checkpoints_path)[-1].path
    damage(newest / "model-00000.safetensors")  # type: ignore[operator]
    done = colossus("train", "--resume", str(run.path))
    rejected = [event for event in events(run) if isinstance(event, CheckpointRejected)]
    assert [event.path for event in rejected] == [str(newest)]
    assert f"warning: checkpoint {newest} is damaged" in done.out
    assert "an older one is used" in done.out
    assert [event.first_step for event in events(run) if isinstance(event, RunStarted)] == [0, 8]
    same_course(run, trained)


def test_all_damaged(run: RunDirectory) -> None:
    for checkpoint in list_checkpoints(run.checkpoints_path):
        flip_a_bit(checkpoint.path / "optimizer-00000.safetensors")
    before = kinds(run)
    done = colossus("train", "--resume", str(run.path), status=1)
    assert "error: none of the 2 checkpoints in" in done.err
    assert "Traceback" not in done.err
    assert kinds(run) == before


def no_room() -> None:
    """No file may grow beyond 100 kB: all of a run's fit but its checkpoints' and its curves."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_checkpoints_that_cannot_be_written_do_not_end_training(
    tmp_path: Path, trained: RunDirectory
) -> None:
    path = recipe(tmp_path, "model.hidden_size=64")
    done = colossus("train", path, "--runs", str(tmp_path / "runs"), before=no_room)
    run = RunDirectory(tmp_path / "runs" / "story-001")
    failed = [event for event in events(run) if isinstance(event, CheckpointFailed)]
    assert [event.step for event in failed] == [4, 8, 12, 12]  # the last one is tried again
    assert all("File too large" in event.reason for event in failed)
    assert "warning: checkpoint at step 4 not written" in done.out
    assert kinds(run).count("StepDone") == 12
    assert run.state() == "finished"
    assert not any(run.checkpoints_path.iterdir())


def full_for_a_while() -> None:
    """The first checkpoint finds no room, later ones do."""
    from colossus.checkpoint import saver
    from colossus.errors import CheckpointError

    save, calls = saver.save, []

    def failing(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise CheckpointError("the disk is full")
        return save(*arguments, **named)  # type: ignore[arg-type]

    saver.save = failing  # type: ignore[assignment]


def test_a_disk_that_was_full_for_a_while(tmp_path: Path, trained: RunDirectory) -> None:
    colossus("train", recipe(tmp_path), "--runs", str(tmp_path / "runs"), before=full_for_a_while)
    run = RunDirectory(tmp_path / "runs" / "story-001")
    assert [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints_path)] == [8, 12]
    assert kinds(run).count("CheckpointFailed") == 1
    same_course(run, trained)


def test_a_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    done = colossus("train", recipe(tmp_path), "--runs", "/proc/runs", status=1)
    assert done.err.splitlines()[-1].startswith("error: ")
    assert "/proc/runs" in done.err
    assert "Traceback" not in done.err


def test_a_run_that_cannot_be_written_to(run: RunDirectory) -> None:
    run.events_path.unlink()
    run.events_path.mkdir()
    done = colossus("train", "--resume", str(run.path), status=1)
    assert done.err.splitlines()[-1] == f"error: cannot write to {run.path}: Is a directory"


def test_of_two_that_resume_a_run_one_is_refused(tmp_path: Path) -> None:
    path = recipe(tmp_path, "budget=100000 steps", "checkpoints.every=5 steps")
    run = RunDirectory(tmp_path / "runs" / "story-001")
    with running("train", path, "--runs", str(tmp_path / "runs")) as first:
        first.wait_until(lambda: "CheckpointSaved" in kinds(run))
        done = colossus("train", "--resume", str(run.path), status=1)
        assert done.err.startswith(f"error: {run.path} is in use: process {first.process.pid} on ")
        assert done.err.count("\n") == 1
        assert first.process.is_alive()
