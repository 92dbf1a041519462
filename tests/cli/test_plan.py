"""`colossus plan`, `explain` and `compare` as people use them, with a planner that returns a plan made by hand."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from colossus.cli import main
from colossus.errors import ConfigError
from colossus.planner.explain.describe import field_names
from colossus.planner.explain.reasons import advice
from colossus.planner.result import Planned
from colossus.spec.goal import Goal
from colossus.spec.plan import Plan
from tests.planner.plans import laptop_plan, mixed_plan, planned

GOAL = ("llama3.1-405b", "--fleet", "colossus-200k")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """The command with its status, output and errors."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["colossus", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return command


class Planner:
    """Stands for the search: remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Goal] = []
        self.sequence_tokens: int | None = None

    def make_plan(self, model: Any, fleet: Any, goal: Goal, *, sequence_tokens: int, today: date) -> Planned:
        self.asked.append(goal)
        self.sequence_tokens = sequence_tokens
        if goal.deadline_days == 1:
            raise ConfigError("no plan keeps the deadline of 1 day; the fastest takes 3.7 days")
        plan = mixed_plan()
        return planned(plan.model_copy(update={"advice": advice(plan, today=date(2026, 6, 1))}))


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> Planner:
    stand_in, module = Planner(), ModuleType("colossus.planner.plan")
    module.make_plan = stand_in.make_plan  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "colossus.planner.plan", module)
    return stand_in


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(mixed_plan().to_json())
    return path


# --- plan: what it prints ---


@pytest.mark.usefixtures("planner")
def test_the_screen_has_all_sections_in_120_columns(run: Run) -> None:
    status, out, err = run("plan", *GOAL, "--tokens", "15T")
    assert (status, err) == (0, "")
    for part in ("The plan", "Who runs it", "Where a step of 8.42 s goes", "Memory of the fullest rank", "The run",
                 "What else could be had", "searched 18,432 candidates, 3,214 fit", "Advice",
                 "4: 6.1 % slower", "36,493 of 411M tokens", "litres", "CO2e", "USD", "MFU 63.0%"):  # fmt: skip
        assert part in out, part
    lines = out.splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) < 100
    assert "\x1b" not in out


@pytest.mark.usefixtures("planner")
def test_the_json_object_has_exactly_these_keys(run: Run) -> None:
    status, out, err = run("plan", *GOAL, "--json")
    assert status == 0
    told = json.loads(out)
    assert set(told) == {"plan", "estimate", "search", "front", "mixture"}
    assert set(told["estimate"]) == {"step_time_s", "tokens_per_s", "mfu", "memory_bytes", "days", "goodput",
                                     "energy_mwh", "water_m3", "co2_t", "cost_usd"}  # fmt: skip
    for figure in told["estimate"].values():
        assert set(figure) == {"low", "likely", "high"}
        assert figure["low"] <= figure["likely"] <= figure["high"]
    assert told["search"] == {"candidates": 18_432, "feasible": 3_214, "cpu_s": 1.7}
    assert set(told["front"][0]) == {"choice", "seconds_per_token", "memory_headroom_bytes", "energy_joules_per_token",
                                     "cost_usd_per_token", "group_ranks"}  # fmt: skip
    assert set(told["mixture"]) == {"all_as_weakest", "without"}
    assert Plan.model_validate_json(json.dumps(told["plan"])).layout == mixed_plan().layout
    assert "20 for each active parameter" in err


def test_what_the_options_ask_for(run: Run, planner: Planner) -> None:
    amounts = ["--tokens", "15T", "--sequence", "4096", "--max-batch", "16M"]
    limits = ["--deadline", "90 days", "--budget", "$50M", "--max-power", "150 MW", "--objective", "cost"]
    options = [*amounts, *limits, "--fix", "tp=8", "--fix", "precision=fp8"]
    assert run("plan", *GOAL, *options)[0] == 0
    assert planner.asked == [
        Goal(
            tokens=15 * 10**12, objective="cost", deadline_days=90.0, budget_usd=50e6, max_power_watts=150e6,
            max_global_batch_sequences=16_000_000 // 4096, fixed={"tp": 8, "precision": "fp8"},
        )
    ]  # fmt: skip
    assert planner.sequence_tokens == 4096


def test_a_batch_can_be_counted_in_sequences(run: Run, planner: Planner) -> None:
    assert run("plan", *GOAL, "--max-batch", "2048 sequences")[0] == 0
    assert planner.asked[0].max_global_batch_sequences == 2048


def test_defaults(run: Run, planner: Planner) -> None:
    out = run("plan", *GOAL)[1]
    assert planner.asked[0].tokens == 20 * mixed_plan().model.num_active_params()
    assert planner.sequence_tokens == 8192
    assert "20 for each active parameter" in out


def test_a_loss_can_be_the_goal(run: Run, planner: Planner) -> None:
    assert run("plan", *GOAL, "--goal", "loss=1.9")[0] == 0
    assert planner.asked == [Goal(loss=1.9)]


def test_as_many_tokens_as_can_be_until_a_day(
    run: Run, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Today(date):
        @classmethod
        def today(cls) -> "Today":
            return cls(2026, 11, 1)

    monkeypatch.setattr("colossus.cli.plan.date", Today)
    status, out, _ = run("plan", *GOAL, "--by", "2026-12-01")
    assert status == 0
    first = mixed_plan()
    reached = first.num_steps * first.step_tokens / first.estimate.days.likely * 30
    tokens = planner.asked[1].tokens
    assert tokens is not None
    assert 0.985 * reached < tokens < reached
    assert planner.asked[1].deadline_days is None  # what the stand-in plans for is not what was reached
    assert "30 days from 2026-11-01 to 2026-12-01" in out
    run("plan", *GOAL, "--by", "2026-12-01", "--budget", "1M")
    affordable = planner.asked[3].tokens
    assert affordable is not None
    assert affordable == pytest.approx(
        first.num_steps * first.step_tokens * 1e6 / first.estimate.cost_usd.likely, rel=0.015
    )
    told = json.loads(run("plan", *GOAL, "--by", "2026-12-01", "--json")[1])
    assert told["plan"]["goal"]["deadline_days"] == 30


# --- plan: what it refuses ---


@pytest.mark.usefixtures("planner")
@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--tokens", "many"], "--tokens 15T"),
        (["--tokens", "0"], "above 0"),
        (["--tokens", "1e400"], "above 0"),
        (["--tokens", "1.5"], "whole number"),
        (["--goal", "loss"], "--goal loss=1.9"),
        (["--goal", "perplexity=4"], "--goal loss=1.9"),
        (["--goal", "loss=low"], "not a number"),
        (["--tokens", "1T", "--goal", "loss=2"], "contradict"),
        (["--by", "2027-13-01"], "--by 2027-03-01"),
        (["--by", "2020-01-01"], "not after today"),
        (["--by", "2099-01-01", "--tokens", "1T"], "contradict"),
        (["--by", "2099-01-01", "--deadline", "9"], "deadline already"),
        (["--by", "2099-01-01", "--objective", "cost"], "--objective cost"),
        (["--objective", "tmie"], "Did you mean 'time'"),
        (["--sequence", "-5"], "--sequence"),
        (["--fix", "tp"], "--fix tp=8"),
        (["--fix", "tq=8"], "Known: cp, ep"),
        (["--fix", "micro_btach=8"], "Did you mean 'micro_batch'"),
        (["--fix", "tp=eight"], "number from 1 up"),
        (["--fix", "tp=0"], "1 or more"),
        (["--fix", "precision=fp9"], "Did you mean 'fp8'"),
        (["--fix", "recompute=ful"], "Did you mean 'full'"),
        (["--fix", "tp=8", "--fix", "tp=4"], "contradict"),
        (["--max-batch", "huge"], "--max-batch 16M"),
        (["--max-batch", "2048"], "'2048 sequences'"),
        (["--max-batch", "x sequences"], "2048 sequences"),
        (["--deadline", "soon"], "--deadline 90"),
        (["--deadline", "1"], "the fastest takes 3.7 days"),
        (["--budget", "lots"], "--budget 50M"),
        (["--max-power", "150"], "150MW"),
        (["--max-power", "muchW"], "150MW"),
        (["--out", "/no/such/directory/plan.json"], "/no/such/directory"),
        (["--plot", "/no/such/directory/plan.png"], "/no/such/directory"),
        (["--out", "."], "is a directory"),
        (["--out", "same", "--plot", "same"], "both name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_sentence(options: list[str], part: str, run: Run) -> None:
    status, out, err = run("plan", *GOAL, *options)
    assert (status, out) == (2, "")
    assert part in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("planner")
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["llama9", "--fleet", "h100:8"], "no model 'llama9'"),
        (["gpt2", "--fleet", "h1000:8"], "Did you mean"),
        (["gpt2", "--fleet", "missing.toml"], "no such file"),
        (["missing.toml", "--fleet", "laptop"], "cannot read model"),
    ],
)
def test_unknown_models_and_fleets(arguments: list[str], part: str, run: Run) -> None:
    status, out, err = run("plan", *arguments)
    assert (status, out) == (2, "")
    assert part in err
    assert "Traceback" not in err


@pytest.mark.usefixtures("planner")
def test_a_fleet_must_be_named(run: Run) -> None:
    status, out, err = run("plan", "gpt2")
    assert (status, out) == (2, "")
    assert "--fleet" in err


# --- files ---


@pytest.mark.usefixtures("planner")
def test_out_is_a_plan_file_and_is_never_lost(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    status, out, _ = run("plan", *GOAL, "--out", str(path))
    assert status == 0
    assert str(path) in out.replace("\n", "")
    assert Plan.load(path).layout == mixed_plan().layout
    before = path.read_bytes()
    status, _, err = run("plan", *GOAL, "--out", str(path))
    assert status == 2
    assert "--force" in err
    assert path.read_bytes() == before
    path.write_text("precious")
    assert run("plan", *GOAL, "--out", str(path), "--force")[0] == 0
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["plan.json"]


def test_a_file_that_came_to_be_during_the_search_is_kept(
    run: Run, tmp_path: Path, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, make_plan = tmp_path / "plan.json", planner.make_plan

    def slow(*arguments: Any, **options: Any) -> Planned:
        path.write_text("another's")
        return make_plan(*arguments, **options)

    monkeypatch.setattr(sys.modules["colossus.planner.plan"], "make_plan", slow)
    status, _, err = run("plan", *GOAL, "--out", str(path))
    assert status == 2
    assert "exists and is kept" in err
    assert path.read_text() == "another's"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("planner")
def test_plot_writes_a_png(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    assert run("plan", *GOAL, "--plot", str(path))[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")


# --- explain ---


@pytest.mark.parametrize("plan", [mixed_plan(), laptop_plan()], ids=["mixed", "laptop"])
def test_explain_of_all_fields(plan: Plan, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    status, everything, _ = run("explain", str(path))
    assert status == 0
    assert max(map(len, everything.splitlines())) <= 120
    for name in field_names(plan):
        status, out, err = run("explain", str(path), name)
        assert (status, err) == (0, "")
        assert out.startswith(name)
        assert max(map(len, out.splitlines())) <= 120
        assert f"\n{name} " in f"\n{everything}"


def test_explain_shows_the_formula_with_numbers(run: Run, plan_file: Path) -> None:
    out = " ".join(run("explain", str(plan_file), "mfu")[1].split())
    assert "model FLOPs per token × tokens/s / (chips × peak)" in out
    assert "148,480 × 989.4 + 49,152 × 989.4 TFLOP/s) = 63.0%" in out
    assert "4: 6.1 % slower" in run("explain", str(plan_file), "tp")[1]


def test_explain_of_an_unknown_field(run: Run, plan_file: Path) -> None:
    status, out, err = run("explain", str(plan_file), "scedule")
    assert (status, out) == (2, "")
    assert "Did you mean 'schedule'" in err


@pytest.mark.parametrize("command", ["explain", "compare"])
def test_files_that_are_no_plans(command: str, run: Run, plan_file: Path, tmp_path: Path) -> None:
    text = plan_file.read_text()
    bad = {
        "missing": None,
        "empty": "",
        "cut-short": text[: len(text) // 2],
        "edited": text.replace('"tp": 8', '"tp": 4'),
        "other": '{"a": 1}',
        "list": "[1]",
        "binary": "\x00\x01",
    }
    for name, content in bad.items():
        path = tmp_path / f"{name}.json"
        if content is not None:
            path.write_text(content)
        status, out, err = run(command, str(path), *([str(plan_file)] if command == "compare" else []))
        assert (status, out) == (2, ""), name
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert f"{name}.json" in err


# --- compare ---


def test_compare_shows_what_differs(run: Run, plan_file: Path, tmp_path: Path) -> None:
    plan = mixed_plan()
    faster = plan.estimate.model_copy(update={"days": plan.estimate.days * 0.5})
    other = tmp_path / "other.json"
    other.write_text(plan.model_copy(update={"precision": "fp8", "estimate": faster}).to_json())
    status, out, _ = run("compare", str(plan_file), str(other))
    assert status == 0
    marked = {line.split()[1] for line in out.splitlines() if line.startswith("≠")}
    assert marked == {"precision", "days"}
    assert "B has 50.0% less wall time" in out
    assert max(map(len, out.splitlines())) <= 120

    told = json.loads(run("compare", str(plan_file), str(other), "--json")[1])
    assert set(told) == {"fields", "better"}
    assert {row["field"] for row in told["fields"] if row["differs"]} == {"precision", "days"}
    assert told["better"]["wall time"] == {
        "plan": "b", "ratio": pytest.approx(0.5), "text": told["better"]["wall time"]["text"],
    }  # fmt: skip
    assert told["better"]["cost"]["plan"] == "same"


def test_compare_says_when_totals_are_not_of_the_same_thing(
    run: Run, plan_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "laptop.json"
    other.write_text(laptop_plan().to_json())
    out = run("compare", str(plan_file), str(other))[1]
    assert "The plans differ in model and tokens and fleet" in out


# --- processes ---


@pytest.mark.parametrize("command", ["plan", "explain", "compare"])
def test_help_imports_nothing_heavy(command: str) -> None:
    script = (
        f"import sys; sys.argv = ['colossus', {command!r}, '--help']\n"
        "from colossus.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'numpy', 'rich', 'pydantic', 'matplotlib') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert f"Examples:\n    colossus {command}" in done.stdout
    assert done.stderr.strip() == "[]"


def test_explaining_imports_no_torch(plan_file: Path) -> None:
    script = (
        f"import sys; sys.argv = ['colossus', 'explain', {str(plan_file)!r}]\n"
        "from colossus.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


# --- what must not be written over ---


@pytest.mark.usefixtures("planner")
@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_a_pipe_or_a_device_is_never_replaced_even_by_force(run: Run, tmp_path: Path, option: str) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    status, out, err = run("plan", *GOAL, option, str(pipe), "--force")
    assert (status, out) == (2, "")
    assert "device or a pipe" in err
    assert pipe.is_fifo()


@pytest.mark.usefixtures("planner")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--out", "a" * 300], "too long"),
        (["--plot", "plan.txt"], "ends in .png"),
        (["--tokens", "-5"], "above 0"),
        (["--goal", "loss=low"], "--goal loss=1.9"),
    ],
)
def test_more_that_cannot_be(run: Run, arguments: list[str], told: str) -> None:
    status, out, err = run("plan", *GOAL, *arguments)
    assert (status, out) == (2, "")
    assert told in err


def test_explain_takes_names_as_people_write_them_and_says_why_there_is_no_bubble(
    run: Run, tmp_path: Path, plan_file: Path
) -> None:
    assert run("explain", str(plan_file), "MFU") == run("explain", str(plan_file), "mfu")
    assert run("explain", str(plan_file), "micro-batch")[0] == 0
    alone = tmp_path / "alone.json"
    alone.write_text(laptop_plan().to_json())
    status, _, err = run("explain", str(alone), "bubble")
    assert status == 2
    assert "pp is 1" in err
