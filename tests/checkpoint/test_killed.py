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


@pytest.mark.parametrize("num_elements", [2000, 400_000], ids=["small", "4MB"])
def test_killed_at_random_instants(tmp_path: Path, num_elements: int) -> None:
    chance = random.Random(num_elements)
    newest = 0
    died_writing = 0
    for _ in range(15):
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
        num_calls += 1
        directory = tmp_path / str(num_calls)
        process, said = start(save_and_die, directory, num_calls)
        messages = received(said)
        process.join()
        finished = bool(messages) and messages[-1] == "done"
        reported = [message for message in messages if message != "done"]
        if not reported and not list_checkpoints(directory):
            continue
        loaded, rejected = load_newest(directory)
        found = (loaded.step, loaded.facts["generation"])
        assert rejected == (), num_calls
        assert not reported or found >= reported[-1], num_calls
        assert_same(loaded.tensors, state(loaded.step + 1000 * loaded.facts["generation"], 40))
        Saver(directory)
        assert leftovers(directory) == []
        assert load_newest(directory)[0].step == loaded.step
    assert num_calls > 50


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
