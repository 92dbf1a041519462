"""`colossus validate` and `colossus calibrate` as people use them."""

import csv
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from colossus import cli
from colossus.cli import calibrate, validate
from colossus.planner.evidence.validate import compare
from tests.planner.test_validate import row, rows

COMMANDS = {
    "validate": (validate.validate, validate.EPILOG),
    "calibrate": (calibrate.calibrate, calibrate.EPILOG),
}
for name, (command, epilog) in COMMANDS.items():
    if name not in {known.name for known in cli.app.registered_commands}:
        cli.app.command(name, epilog=epilog)(command)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["colossus", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def write(path: Path, table: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Seven layouts, measured a tenth below the prediction; one row out of memory, one that is none."""
    entries = rows()
    for entry, total_s in zip(entries, compare(entries).parts.total_s, strict=True):
        entry["metric_step_time_s"] = repr(float(total_s) / 1.1)
    bad = [row(id="oom", tier="OOM", metric_step_time_s=""), row(id="bad", n_gpus="some")]
    return write(tmp_path / "runs.csv", entries + bad)


def test_one_json_object(run: Any, table: Path) -> None:
    code, out, _ = run("validate", table, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["n"], found["skipped"], found["rows"]) == (7, 1, 9)
    assert found["mape"] == pytest.approx(10.0)
    assert found["skipped_reasons"]["n_gpus is 'some', not a number"] == {"count": 1, "ids": ["bad"]}
    assert {"mape", "median", "p90", "bias", "interval_coverage", "memory", "oom", "ranking", "by"} <= set(
        found
    )
    assert set(found["by"]) >= {"source", "gpu", "precision", "family"}
    assert found["ranking"] == {
        "groups": 1, "layouts": 7, "spearman": pytest.approx(1.0), "regret_mean": 0.0, "regret_max": 0.0,
    }  # fmt: skip


def test_as_text(run: Any, table: Path) -> None:
    code, out, _ = run("validate", table)
    assert code == 0
    assert "9 rows: 7 step times compared, 1 out of memory as published, 1 skipped" in out
    assert "H100-SXM" in out
    assert "+10.0" in out
    assert "n_gpus is 'some', not a number (bad)" in out


def test_tables_add_up_and_rows_are_selected(run: Any, table: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "more.csv", [row(id="one", gpu="H200")])
    assert json.loads(run("validate", table, other, "--json")[1])["n"] == 8
    assert json.loads(run("validate", table, other, "--where", "gpu=H200,tier=A", "--json")[1])["n"] == 1
    code, _, err = run("validate", table, "--where", "gpus=H200")
    assert code == 2
    assert "Did you mean 'gpu'" in err


def test_rows_and_picture_are_written(run: Any, table: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows_file, picture = tmp_path / "rows.csv", tmp_path / "scatter.png"
    code, out, _ = run("validate", table, "--out", rows_file, "--plot", picture, "--json")
    assert code == 0
    json.loads(out)
    with rows_file.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [entry["id"] for entry in written] == [*(f"layout-{i}" for i in range(7)), "oom", "bad"]
    assert float(written[0]["error_percent"]) == pytest.approx(10.0, rel=1e-4)
    assert float(written[0]["predicted_s"]) == pytest.approx(1.1 * float(written[0]["measured_s"]), rel=1e-4)
    assert "not a number" in written[-1]["skipped"]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere.csv"], "nowhere.csv"), (["{}", "--out", "{}"], "one of the tables"),
        (["{}", "--plot", "x.txt"], ".png"), (["{}", "--constants", "nowhere.toml"], "nowhere.toml"),
        (["{}", "--intervals", "{}"], "intervals"), (["{}", "--out", "no/where.csv"], "cannot write"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(run: Any, table: Path, arguments: list[str], part: str) -> None:
    before = table.read_bytes()
    code, out, err = run("validate", *(argument.format(table) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert part in err
    assert "Traceback" not in err
    assert table.read_bytes() == before


def test_calibrate_then_validate(run: Any, table: Path, tmp_path: Path) -> None:
    constants = tmp_path / "constants.toml"
    code, out, _ = run("calibrate", table, "--out", constants)
    assert code == 0
    assert "lab/table" in out
    assert str(constants) in out
    told = tomllib.loads(constants.read_text())
    assert told["fit"]["num_runs"] == 7
    assert told["fit"]["table"][0]["name"] == "runs.csv"
    fitted = json.loads(run("validate", table, "--constants", constants, "--json")[1])
    assert fitted["mape"] == pytest.approx(told["fit"]["mape"], abs=0.01)
    code, _, err = run("calibrate", table, "--out", constants)
    assert code == 2
    assert "--replace" in err


def test_calibrate_needs_something_to_fit(run: Any, tmp_path: Path) -> None:
    untimed = write(tmp_path / "untimed.csv", [row(metric_step_time_s="")])
    out = tmp_path / "constants.toml"
    code, _, err = run("calibrate", untimed, "--out", out)
    assert code == 2
    assert "nothing to fit" in err
    one = write(tmp_path / "one.csv", rows())
    code, _, err = run("calibrate", one, "--out", out, "--cross-validate")
    assert code == 2
    assert "only one" in err
    code, _, err = run("calibrate", one, "--out", one, "--replace")
    assert code == 2
    assert "one of the tables" in err
    assert not out.exists()


@pytest.mark.parametrize("module", ["validate", "calibrate"])
def test_the_module_imports_nothing_heavy(module: str) -> None:
    script = (
        f"import sys, colossus.cli.{module}\n"
        "print([n for n in ('torch', 'numpy', 'rich', 'pydantic', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
