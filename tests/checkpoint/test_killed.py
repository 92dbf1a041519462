"""A process killed at any instant leaves its newest complete checkpoint; the next one cleans up after it."""

import os
import random
import time
from pathlib import Path

import pytest

from colossus.checkpoint import Saved, Saver, clean, list_checkpoints, load_newest
from colossus.checkpoint.directory import begin

from .processes import received, save_and_die, save_in_a_loop, save_twenty, start
from .states import assert_is_state, assert_same, leftovers, state


@pytest.mark.parametrize(("num_elements", "num_kills"), [(2000, 10), (400_000, 10)], ids=["small", "4MB"])
def test_killed_at_random_instants(tmp_path: Path, num_elements: int, num_kills: int) -> None:
    chance = random.Random(num_elements)
    newest = 0
    died_writing = 0
    for _ in range(num_kills):
        process, said = start(save_in_a_loop, tmp_path, newest + 1, num_elements)
        assert said.recv() == "ready"
        assert leftovers(tmp_path) == []  # the one before was cleaned up after
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        process.join()
        results = received(said)
        assert all(isinstance(result, Saved) for result in results)
        died_writing += bool(leftovers(tmp_path))
        reported = max((result.step for result in results), default=newest)
        if not list_checkpoints(tmp_path):
            assert newest == reported == 0
            continue
        loaded, rejected = load_newest(tmp_path)
        assert rejected == ()
        assert loaded.step >= max(reported, newest)  # nothing that was said to be saved is lost
        assert_is_state(loaded)
        newest = loaded.step
    assert newest > 0
    assert died_writing > 0  # some of the kills did hit a checkpoint in the making


def test_killed_at_every_call_to_the_file_system(tmp_path: Path) -> None:
    num_calls, finished = 0, False
    while not finished:
        batch = range(num_calls + 1, num_calls + 5)  # a few at a time: they mostly wait for the disk
        started = [start(save_and_die, tmp_path / str(fatal_call), fatal_call) for fatal_call in batch]
        for fatal_call, (process, said) in zip(batch, started, strict=True):
            messages = received(said)
            process.join()
            finished |= "done" in messages
            reported = [message for message in messages if message != "done"]
            assert_survived(tmp_path / str(fatal_call), reported)
        num_calls = batch[-1]
    assert num_calls > 50


def assert_survived(directory: Path, reported: list[tuple[int, int]]) -> None:
    """The newest checkpoint is good and no older than the last reported; cleaning takes nothing of it."""
    if not reported and not list_checkpoints(directory):
        return
    loaded, rejected = load_newest(directory)
    assert rejected == ()
    assert not reported or (loaded.step, loaded.facts["generation"]) >= reported[-1]
    assert_same(loaded.tensors, state(loaded.step + 1000 * loaded.facts["generation"], 40))
    Saver(directory)
    assert leftovers(directory) == []
    assert load_newest(directory)[0].step == loaded.step


def test_only_what_is_ours_and_dead_is_cleaned(tmp_path: Path) -> None:
    living = begin(tmp_path, 7)
    prefix, host, pid, started, nonce = living.name[1:].split(".")
    assert int(pid) == os.getpid()
    process, said = start(save_twenty, tmp_path / "elsewhere", 1)
    received(said)
    process.join()
    dead = f".{prefix}.{host}.{process.pid}.{started}.{nonce}"
    came_round = f".deleting-step-00000007.{host}.{pid}.{int(started) + 1}.{nonce}"
    of_another_host = f".{prefix}.another-host.{process.pid}.{started}.{nonce}"
    for name in (dead, came_round, of_another_host, ".writing-step-00000007", ".cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    assert sorted(path.name for path in clean(tmp_path)) == sorted([dead, came_round])
    assert sorted(leftovers(tmp_path)) == sorted(
        [living.name, of_another_host, ".writing-step-00000007", ".cache"]
    )
    assert clean(tmp_path / "none") == []


def test_two_savers_in_one_directory(tmp_path: Path) -> None:
    """Not what anyone should do; nothing is damaged by it all the same."""
    savers = [start(save_twenty, tmp_path, 1) for _ in range(2)]
    loads = 0
    while any(process.is_alive() for process, _ in savers):
        if not list_checkpoints(tmp_path):
            continue
        loaded, rejected = load_newest(tmp_path)
        assert rejected == ()
        assert_is_state(loaded)
        loads += 1
    assert loads > 0
    for process, said in savers:
        results = received(said)
        assert [result.step for result in results] == list(range(1, 21))
        assert all(isinstance(result, Saved) for result in results)
        process.join()
        assert process.exitcode == 0
    loaded, rejected = load_newest(tmp_path)
    assert (loaded.step, rejected) == (20, ())
    assert_is_state(loaded)
    assert leftovers(tmp_path) == []
