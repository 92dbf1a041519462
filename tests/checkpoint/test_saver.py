"""Saving behind training's back: what was there is written, and nothing that goes wrong reaches training."""

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import colossus.checkpoint.saver as saver_module
from colossus.checkpoint import Saved, SaveFailed, Saver, list_checkpoints, load, load_newest, save, verify
from colossus.errors import CheckpointError
from colossus.spec.run import Checkpoints

from .processes import received, save_and_load_measured, save_with_a_file_limit, start
from .states import assert_is_state, assert_same, leftovers, state


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds every write back until it is set."""
    opened = threading.Event()

    def held(*arguments: object, **keywords: object) -> Saved:
        opened.wait(30)
        return save(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(saver_module, "save", held)
    yield opened
    opened.set()


def test_saves_in_the_background(tmp_path: Path, gate: threading.Event) -> None:
    saver = Saver(tmp_path)
    assert saver.poll() == []
    assert saver.save(1, state(1), {"step": 1}) < 10
    assert saver.busy
    assert saver.poll() == []
    gate.set()
    (result,) = saver.wait()
    assert isinstance(result, Saved)
    assert (result.step, result.path) == (1, tmp_path / "step-00000001")
    assert not saver.busy
    assert saver.wait() == []
    assert_is_state(load(result.path))


def test_what_changes_after_save_returns_is_not_written(tmp_path: Path, gate: threading.Event) -> None:
    tensors, facts = state(1), {"step": 1, "list": [1]}
    tensors["view"] = torch.arange(12).view(3, 4).t()
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    saver = Saver(tmp_path)
    saver.save(1, tensors, facts)
    for tensor in tensors.values():
        tensor.zero_()
    tensors.clear()
    facts["list"].append(2)  # type: ignore[attr-defined]
    gate.set()
    saver.wait()
    loaded = load(tmp_path / "step-00000001")
    assert loaded.facts == {"step": 1, "list": [1]}
    assert_same(loaded.tensors, expected)


def test_the_next_save_waits_for_the_one_in_flight(tmp_path: Path, gate: threading.Event) -> None:
    saver = Saver(tmp_path)
    saver.save(1, state(1), {"step": 1})
    threading.Timer(0.2, gate.set).start()
    assert saver.save(2, state(2), {"step": 2}) >= 0.15
    assert [result.step for result in saver.wait()] == [1, 2]
    for checkpoint in list_checkpoints(tmp_path):
        assert_is_state(load(checkpoint.path))


def test_host_memory_is_used_again(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.prepare(state(1))
    saver.save(1, state(1), {"step": 1})
    block = saver._copy._block
    saver.save(2, state(2), {"step": 2})
    assert saver._copy._block is block
    saver.save(3, state(3, 4000), {"step": 3, "num_elements": 4000})
    assert saver._copy._block is not block
    saver.save(4, state(4), {"step": 4})
    assert [type(result) for result in saver.wait()] == [Saved] * 4
    for checkpoint in list_checkpoints(tmp_path):
        assert_is_state(load(checkpoint.path))


def test_nothing_and_empty_tensors(tmp_path: Path) -> None:
    with Saver(tmp_path) as saver:
        saver.save(1, {}, {})
        saver.save(2, {"model.empty": torch.empty(0, 3)}, {})
    assert load(tmp_path / "step-00000001").tensors == {}
    assert load(tmp_path / "step-00000002").tensors["model.empty"].shape == (0, 3)


def test_retention_after_each_save(tmp_path: Path) -> None:
    with Saver(tmp_path, keep=Checkpoints(keep_last=2, keep_every_steps=4)) as saver:
        for step in range(1, 8):
            saver.save(step, state(step), {"step": step})
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [4, 6, 7]
    assert leftovers(tmp_path) == []


def test_what_cannot_be_saved_is_a_failure_and_not_an_error(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(1, {"odd": torch.zeros(2, dtype=torch.complex128)}, {})
    saver.save(2, state(2), {"when": object()})
    saver.save(3, state(3), {"step": 3})
    odd, when, good = saver.wait()
    assert isinstance(odd, SaveFailed)
    assert "odd has dtype torch.complex128" in odd.reason
    assert isinstance(when, SaveFailed)
    assert "JSON" in when.reason
    assert isinstance(good, Saved)


def test_a_want_of_memory_is_a_failure(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    huge = torch.zeros(1).expand(1 << 45)
    saver.prepare({"huge": huge})
    saver.save(1, {"huge": huge}, {})
    (failed,) = saver.wait()
    assert isinstance(failed, SaveFailed)
    saver.save(2, state(2), {"step": 2})
    assert isinstance(saver.wait()[0], Saved)


@pytest.mark.parametrize("call", ["fsync", "write", "ftruncate"])
def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    saver = Saver(tmp_path)
    saver.save(1, state(1), {"step": 1})
    saver.wait()
    with monkeypatch.context() as patched:

        def fail(*_: object) -> None:
            raise OSError(5, "Input/output error")

        patched.setattr(os, call, fail)
        saver.save(2, state(2), {"step": 2})
        (failed,) = saver.wait()
    assert isinstance(failed, SaveFailed)
    assert "the checkpoint of step 2 could not be written to" in failed.reason
    assert "Input/output error" in failed.reason
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert verify(tmp_path / "step-00000001") == []


def mount(directory: Path, options: str) -> None:
    directory.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own."""
    directory = tmp_path / "disk"
    mount(directory, "size=2m")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=False, capture_output=True)


def test_a_full_disk(small_disk: Path) -> None:
    saver = Saver(small_disk)
    saver.save(1, state(1), {"step": 1})
    saver.save(2, state(2, 400_000), {"step": 2, "num_elements": 400_000})
    saved, failed = saver.wait()
    assert isinstance(saved, Saved)
    assert isinstance(failed, SaveFailed)
    assert "No space left on device" in failed.reason
    assert "MiB are free" in failed.reason
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
    saver.save(3, state(3), {"step": 3})  # and when there is room again, it goes on
    assert isinstance(saver.wait()[0], Saved)
    assert_is_state(load_newest(small_disk)[0])


def test_a_disk_that_fills_up_from_save_to_save(small_disk: Path) -> None:
    saver = Saver(small_disk, keep=Checkpoints(keep_last=100))
    results = []
    for step in range(1, 40):
        saver.save(step, state(step, 20_000), {"step": step, "num_elements": 20_000})
        results += saver.wait()
    good = [result.step for result in results if isinstance(result, Saved)]
    assert 0 < len(good) < 39
    assert [checkpoint.step for checkpoint in list_checkpoints(small_disk)] == good
    for checkpoint in list_checkpoints(small_disk):
        assert_is_state(load(checkpoint.path))
    assert leftovers(small_disk) == []


def test_a_read_only_disk(small_disk: Path) -> None:
    save(small_disk, 1, state(1), {"step": 1})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert_read_only_is_survived(small_disk)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    save(directory, 1, state(1), {"step": 1})
    directory.chmod(0o555)
    try:
        assert_read_only_is_survived(directory)
    finally:
        directory.chmod(0o755)


def assert_read_only_is_survived(directory: Path) -> None:
    saver = Saver(directory)
    saver.save(2, state(2), {"step": 2})
    (failed,) = saver.wait()
    assert isinstance(failed, SaveFailed)
    assert "could not be written" in failed.reason
    assert_is_state(load_newest(directory)[0])


def test_the_place_is_taken_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "checkpoints", 1, state(1), {})
    with pytest.raises(CheckpointError, match="cannot be listed"):
        load_newest(tmp_path / "checkpoints")


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    process, said = start(save_with_a_file_limit, tmp_path, 512 * 1024)
    (first,), (second,), (third,) = received(said)
    process.join()
    assert process.exitcode == 0
    assert isinstance(first, Saved)
    assert isinstance(second, SaveFailed)
    assert "File too large" in second.reason
    assert isinstance(third, Saved)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    assert_is_state(load_newest(tmp_path)[0])


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Saving takes a chunk beside the state, loading takes what is written to: nothing near a second copy."""
    process, said = start(save_and_load_measured, tmp_path)
    ((state_bytes, saving_bytes, loading_bytes),) = received(said)
    process.join()
    assert state_bytes == 128 << 20
    assert saving_bytes < 32 << 20
    assert loading_bytes < 32 << 20
