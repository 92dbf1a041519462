"""Ranks as real processes: they save and load together, and any of them may be killed at any moment."""

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from colossus.checkpoint import Saved, SaveFailed, clean, list_checkpoints, load, load_newest, verify
from colossus.checkpoint.directory import attempt_path, begin_attempt, new_attempt

from .layouts import SPLITS, assert_loads_as, whole_state
from .processes import received
from .rank_processes import (
    hold_an_attempt,
    save_and_load_every_layout,
    save_in_the_background,
    save_two_steps,
    start_ranks,
)
from .states import assert_same, leftovers


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_layout(num_ranks: int, tmp_path: Path) -> None:
    for process, said in start_ranks(save_and_load_every_layout, num_ranks, tmp_path):
        assert received(said) == ["done"]
        process.join()
        assert process.exitcode == 0
    for step, name in enumerate(SPLITS):
        path = tmp_path / name.replace(" ", "-") / f"step-{step:08d}"
        assert_same(load(path).tensors, whole_state(step))
        assert_loads_as(path, whole_state(step), SPLITS["both"], 6 - num_ranks)


def test_in_the_background(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    for process, said in start_ranks(save_in_the_background, 4, directory, tmp_path / "store"):
        results = [result for results in received(said) for result in results]
        assert [result.step for result in results] == [1, 2, 3, 4, 5]
        assert all(isinstance(result, Saved) for result in results)
        assert results[-1].path == directory / "step-00000005"
        process.join()
        assert process.exitcode == 0
    assert [checkpoint.step for checkpoint in list_checkpoints(directory)] == [4, 5]
    assert leftovers(directory) == []
    for step in (4, 5):
        loaded = load(directory / f"step-{step:08d}")
        assert loaded.facts == {"step": step}
        assert_same(loaded.tensors, whole_state(step))


def killed_at(fatal_calls: Iterable[int], victim: int, folder: Path) -> bool:
    """A rank of three is killed at each of these calls; whether one came through all of them alive."""
    started = {
        call: start_ranks(save_two_steps, 3, folder / f"{call}", folder / f"store-{call}", victim, call)
        for call in fatal_calls
    }
    came_through = False
    for call, ranks in started.items():
        said = [received(connection) for _, connection in ranks]
        for process, _ in ranks:
            process.join()
        came_through |= "done" in said[victim]
        assert_survived(folder / f"{call}", said, victim)
    return came_through


def assert_survived(directory: Path, said: list[list[Any]], victim: int) -> None:
    """What any rank was told is saved is there and good; nothing half written bears a checkpoint's name."""
    saved = {result.step for results in said for result in results if isinstance(result, Saved)}
    for checkpoint in list_checkpoints(directory):
        assert verify(checkpoint.path) == []
        assert_same(load(checkpoint.path).tensors, whole_state(checkpoint.step))
    if saved:
        loaded, rejected = load_newest(directory)
        assert loaded.step >= max(saved)
        assert rejected == ()
    if victim != 0 and "done" not in said[victim]:
        failed = [result for result in said[0] if isinstance(result, SaveFailed)]
        assert len(saved) + len(failed) == 2
        for failure in failed:
            assert re.search(rf"of 3 ranks did not write their parts within 2 s: .*{victim}", failure.reason)
    clean(directory)  # all of them are dead by now
    assert not directory.exists() or leftovers(directory) == []


@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_killed_in_mid_save(victim: int, tmp_path: Path) -> None:
    assert not killed_at((2, 8, 14, 20), victim, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_killed_at_every_call_to_the_file_system(victim: int, tmp_path: Path) -> None:
    first = 1
    while not killed_at(range(first, first + 4), victim, tmp_path):
        first += 4
    assert first > 15


def test_what_was_half_written_goes_at_the_next_start(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    ranks = start_ranks(hold_an_attempt, 3, directory, tmp_path / "store")
    ranks[1][0].join()
    for i in (0, 2):
        assert ranks[i][1].recv() == "writing"
    # `glob` finds nothing, and raises nothing, as long as no rank has made the directory.
    (part,) = wait_for(lambda: list(directory.glob("*/part-00002.json")))
    half = part.parent
    for i in (0, 2):
        ranks[i][0].kill()
        ranks[i][0].join()
    assert half.exists()
    assert list_checkpoints(directory) == []
    for process, said in start_ranks(save_in_the_background, 2, directory, tmp_path / "second-store"):
        assert all(isinstance(result, Saved) for results in received(said) for result in results)
        process.join()
    assert leftovers(directory) == []
    assert_same(load_newest(directory)[0].tensors, whole_state(5))


def wait_for(look: Any) -> Any:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        found = look()
        if found:
            return found
        time.sleep(0.01)
    raise TimeoutError


def test_attempts_of_another_machine_go_when_nothing_happens_in_them(tmp_path: Path) -> None:
    ours = attempt_path(tmp_path, 4, new_attempt())
    begin_attempt(ours)
    theirs = tmp_path / ".writing-step-00000004.another-host.12.34.0123456789abcdef"
    begin_attempt(theirs)
    (theirs / "model-00000.safetensors").touch()
    assert clean(tmp_path) == []
    assert clean(tmp_path, abandoned_after_s=60) == []
    time.sleep(0.05)
    assert clean(tmp_path, abandoned_after_s=0.01) == [theirs]
    assert leftovers(tmp_path) == [ours.name]
