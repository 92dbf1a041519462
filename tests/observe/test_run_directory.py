"""Run directories: made, found, described, and kept from two processes at once, by real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from colossus.errors import ConfigError, RunError
from colossus.events import EventLog, RunFinished
from colossus.observe.environment import git_state
from colossus.observe.overview import overview
from colossus.observe.run_directory import RunDirectory
from tests.observe.logs import step_done
from tests.spec.configs import plan_for, small_config

TRAINER = """
import os, sys, time
from pathlib import Path
from colossus.events import EventLog, RunStarted
from colossus.observe.run_directory import RunDirectory
run = RunDirectory(Path(sys.argv[1]))
with run.lock(), EventLog(run.events_path) as log:
    if sys.argv[2] == "started":
        log.write(RunStarted(first_step=0, num_params=1, host=os.uname().nodename, process_id=os.getpid()))
    print("locked", flush=True)
    time.sleep(60)
"""


def new_run(runs: Path, name: str = "a") -> RunDirectory:
    run = RunDirectory.create(runs, name)
    run.write_description(small_config())
    return run


def trainer(run: RunDirectory, how: str = "started") -> subprocess.Popen[str]:
    """A process that trains in the run, for all that the directory can tell."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(run.path), how], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def finish(run: RunDirectory, reason: str) -> None:
    with EventLog(run.events_path) as log:
        log.write(step_done(0))
        log.write(RunFinished(step=1, reason=reason))


# --- made and found ---


def test_numbers_go_up_and_are_never_used_again(tmp_path: Path) -> None:
    assert [RunDirectory.create(tmp_path / "runs", "a").name for _ in range(3)] == ["a-001", "a-002", "a-003"]
    assert RunDirectory.create(tmp_path / "runs", "a-b").name == "a-b-001"
    for leftover in (tmp_path / "runs" / "a-002").iterdir():
        leftover.rmdir()
    (tmp_path / "runs" / "a-002").rmdir()
    assert RunDirectory.create(tmp_path / "runs", "a").name == "a-004"


def test_many_at_once_get_one_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: RunDirectory.create(tmp_path, "a").name, range(24)))
    assert len(set(runs)) == 24


@pytest.mark.parametrize("name", ["a b", "../a", "", ".a", "a/b"])
def test_a_name_must_be_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot name a run"):
        RunDirectory.create(tmp_path, name)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="cannot make a run directory"):
        RunDirectory.create(tmp_path / "runs", "a")


def test_a_run_is_found_by_path_by_name_and_as_the_latest(tmp_path: Path) -> None:
    first, second = new_run(tmp_path), new_run(tmp_path, "b")
    os.utime(second.config_path, (1, 1))
    assert RunDirectory.open(first.path, tmp_path) == first
    assert RunDirectory.open("b-001", tmp_path) == second
    assert RunDirectory.open("latest", tmp_path) == first
    assert RunDirectory.all(tmp_path) == [first, second]


def test_what_is_not_a_run_is_said_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run 'a-001' in .* There are none yet"):
        RunDirectory.open("a-001", tmp_path / "runs")
    new_run(tmp_path)
    with pytest.raises(RunError, match=r"no run 'a-01'.*Did you mean 'a-001'"):
        RunDirectory.open("a-01", tmp_path)
    with pytest.raises(RunError, match=r"is not a run: there is no config\.toml"):
        RunDirectory.open(tmp_path, tmp_path)


# --- described ---


def test_it_explains_itself(tmp_path: Path) -> None:
    config = small_config()
    config = small_config(plan=plan_for(config.batch))
    run = RunDirectory.create(tmp_path, "a")
    run.write_description(config, command=["colossus", "train"])
    assert run.config() == config
    readme = (run.path / "README.md").read_text()
    for said in ("`tiny`", "1000 steps", "`stdlib`", "--resume", "colossus generate", "events.jsonl"):
        assert said in readme
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["command"] == ["colossus", "train"]
    assert environment["memory_bytes"] > 0
    assert "pydantic" in environment["packages"]
    assert run.checkpoints_path.is_dir()


def test_git_is_told_where_there_is_a_repository(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_state(tmp_path / "nowhere") is None
    (tmp_path / "file").write_text("a\n")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    clean = git_state(tmp_path)
    assert clean is not None
    assert not clean["dirty"]
    assert len(clean["commit"]) == 40
    (tmp_path / "file").write_text("b\n")
    dirty = git_state(tmp_path)
    assert dirty is not None
    assert dirty["dirty"]
    assert dirty["changed_files"] == ["file"]
    assert "1 file changed" in dirty["diff_stat"]


def test_a_damaged_configuration_still_has_a_row(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.config_path.write_text("name = ")
    row = overview(run)
    assert row.model is None
    assert row.problem is not None
    with pytest.raises(RunError, match="cannot read"):
        run.config()


# --- alive or not ---


def test_a_lock_is_one_processs_and_names_it(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    process = trainer(run)
    try:
        with pytest.raises(RunError, match=f"is in use: process {process.pid} on "), run.lock():
            pass
    finally:
        process.kill()
        process.wait()
    with run.lock():  # the system has let go of it
        assert run.holder() == (os.getpid(), os.uname().nodename)
    assert run.holder() is None


def test_states_of_a_process_that_lives_and_is_killed(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    process = trainer(run, "not yet started")
    assert run.state() == "starting"
    process.kill()
    process.wait()
    assert run.state() == "crashed"
    process = trainer(run)
    assert run.state() == "running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run.state() == "crashed"


@pytest.mark.parametrize(
    ("reason", "state"), [("budget", "finished"), ("interrupted", "interrupted"), ("diverged", "diverged")]
)
def test_states_of_a_process_that_ended_in_good_order(reason: str, state: str, tmp_path: Path) -> None:
    run = new_run(tmp_path)
    finish(run, reason)
    assert run.state() == state


def test_a_finished_run_that_is_resumed_is_starting_then_running(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    finish(run, "interrupted")
    process = trainer(run, "not yet started")
    assert run.state() == "starting"
    process.kill()
    process.wait()
    process = trainer(run)
    assert run.state() == "running"
    process.kill()
    process.wait()


def test_looking_does_not_stand_in_a_trainers_way(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with run.lock():
        pass
    with ThreadPoolExecutor(2) as pool:
        looking = pool.submit(lambda: [run.is_locked() for _ in range(2000)])
        while not looking.done():
            with run.lock():
                time.sleep(0.001)


def test_a_run_on_another_host_is_judged_by_its_log(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (run.path / ".lock").write_text(json.dumps({"process_id": 1, "host": "elsewhere", "since_s": 0}))
    assert run.is_locked()
    os.utime(run.config_path, (1, 1))
    assert not run.is_locked()


def test_an_overview_counts_what_was_done(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    finish(run, "budget")
    row = overview(run)
    assert (row.name, row.model, row.steps, row.state) == ("a-001", "tiny", 1, "finished")
    assert row.num_bytes > 1000
