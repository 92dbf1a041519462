"""`colossus doctor` as it is called: what it prints, how it ends, what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from colossus.cli import app
from colossus.doctor import facts
from colossus.errors import ConfigError
from tests.doctor.test_checks import GOOD

runner = CliRunner()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Makes the command find these facts."""

    def found(**changes: Any) -> None:
        from dataclasses import replace

        monkeypatch.setattr(facts, "gather", lambda directory: replace(GOOD, **changes))

    return found


def test_a_machine_without_problems_ends_with_0(machine) -> None:
    machine(load=7.0)
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert any(line.startswith("warning CPU load") for line in lines)
    assert "Ranks wait for the slowest" in done.output
    assert lines[-1].endswith("checks: 0 problems, 1 warnings")


def test_a_problem_ends_with_1_and_says_what_to_do(machine) -> None:
    machine(disk_error="Read-only file system")
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "problem disk" in done.output
    assert "Read-only file system" in done.output
    assert "--directory" in done.output


def test_json_is_the_same_as_data(machine) -> None:
    machine(torch=None, torch_error="not installed", gloo_s=None, not_gathered={"two ranks": "needs torch"})
    done = runner.invoke(app, ["doctor", "--json"])
    found = json.loads(done.stdout)
    assert done.exit_code == 1
    assert found["fit"] is False
    by_name = {check["name"]: check for check in found["checks"]}
    assert by_name["torch"]["status"] == "problem"
    assert by_name["two ranks"] == {
        "name": "two ranks",
        "status": "skipped",
        "found": "needs torch",
        "advice": "",
    }


def test_this_machine_for_real(tmp_path: Path) -> None:
    done = runner.invoke(app, ["doctor", "--directory", str(tmp_path), "--json"])
    found = json.loads(done.stdout)
    assert done.exit_code == (0 if found["fit"] else 1)
    assert {"Python", "CPU cores", "memory", "disk", "two ranks"} <= {
        check["name"] for check in found["checks"]
    }
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_is_told_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object, **__: object) -> None:
        raise AssertionError("minutes were spent on it")

    monkeypatch.setattr("colossus.doctor.calibrate.measure_ranks", measured)
    for out, said in (
        (tmp_path / "none" / "here.toml", "there is no directory"),
        (tmp_path, "is a directory"),
    ):
        done = runner.invoke(app, ["doctor", "--calibrate", "--replace", "--out", str(out)])
        assert isinstance(done.exception, ConfigError)
        assert said in str(done.exception)


def test_options_of_calibrating_alone_are_refused(tmp_path: Path) -> None:
    done = runner.invoke(app, ["doctor", "--out", str(tmp_path / "x.toml")])
    assert isinstance(done.exception, ConfigError)
    assert "--calibrate" in str(done.exception)


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    path.write_text("mine")
    done = runner.invoke(app, ["doctor", "--calibrate", "--out", str(path)])
    assert isinstance(done.exception, ConfigError)
    assert "--replace" in str(done.exception)
    assert path.read_text() == "mine"


@pytest.mark.slow
def test_what_calibrating_writes_is_planned_on(tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    made = runner.invoke(
        app,
        [
            "doctor",
            "--calibrate",
            "--quick",
            "--ranks",
            "1",
            "--out",
            str(path),
            "--directory",
            str(tmp_path),
        ],
    )
    assert made.exit_code == 0, made.output
    planned = runner.invoke(
        app, ["plan", "gpt2", "--fleet", str(path), "--tokens", "10M", "--max-batch", "4k", "--json"]
    )
    assert planned.exit_code == 0, planned.output or planned.exception
    plan = json.loads(planned.stdout)["plan"]
    assert plan["fleet"]["pools"][0]["node"]["chip"]["measured"]["num_ranks"] == 1
    assert "colossus doctor --calibrate" in path.read_text()
