"""`colossus compare` with runs: estimates beside what runs measured, of runs made by hand and of a real one."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colossus.cli import main
from colossus.hardware import parse_fleet
from colossus.observe.gap import circumstances
from colossus.observe.run_directory import RunDirectory
from colossus.observe.summary import Summary
from colossus.spec.config import with_plan
from colossus.spec.plan import Estimate, Plan
from colossus.spec.ranged import Ranged
from colossus.spec.run import OPTIMIZERS, AdamW
from tests.helpers import tiny
from tests.observe.test_report import Log
from tests.observe.test_summary_and_curves import SUMMARY
from tests.parallel.plans import plan_of
from tests.planner.measured import made_up
from tests.planner.plans import laptop_plan
from tests.spec.configs import plan_for, small_config

Run = Callable[..., tuple[int, str, str]]
STEP_S = 500.0
"""laptop_plan says 400 s."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Run:
    """The command, among the runs of this test, with its status, output and errors."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["colossus", "compare", "--runs", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return command


def log_of(fingerprint: str | None, *, num_steps: int = 10, step_s: float = STEP_S) -> Log:
    log = Log() if fingerprint is None else Log().decide(fingerprint)
    return log.start().steps(*range(num_steps), took_s=step_s).finish(num_steps)


def new_run(runs: Path, name: str, plan: Plan | None, log: Log, **summary: Any) -> RunDirectory:
    made = RunDirectory.create(runs, name)
    if plan is None:
        config = small_config()
        config = config.model_copy(update={"plan": plan_for(config.batch)})
    else:
        made.write_plan(plan)
        config = with_plan(small_config(optimizer=OPTIMIZERS[plan.optimizer]), plan)
    made.write_description(config)
    made.events_path.write_text("".join(event.to_json() + "\n" for event in log.events))
    told = {"device_kind": "cpu", "peak_memory_bytes_by_rank": (1_400_000_000, 1_450_000_000), **summary}
    dataclasses.replace(SUMMARY, **told).write(made.summary_path)
    return made


def fields(out: str) -> dict[str, Any]:
    return {row["field"]: row for row in json.loads(out)["fields"]}


def test_every_field_of_the_estimate_has_a_row_with_a_figure_or_a_reason(run: Run, tmp_path: Path) -> None:
    plan = laptop_plan()
    new_run(tmp_path, "a", plan, log_of(plan.fingerprint()))
    status, out, err = run("a-001", "--json")
    assert (status, err) == (0, "")
    rows = fields(out)
    assert list(rows) == list(Estimate.model_fields)
    assert all(row["report"] is not None or row["note"] for row in rows.values())
    assert {name for name, row in rows.items() if row["report"]} == {
        "step_time_s", "tokens_per_s", "mfu", "memory_bytes", "goodput",
    }  # fmt: skip


def test_the_gap_is_the_measured_figure_over_the_likely_one(run: Run, tmp_path: Path) -> None:
    plan = laptop_plan()
    new_run(tmp_path, "a", plan, log_of(plan.fingerprint()))
    rows = fields(run("a-001", "--json")[1])
    assert rows["step_time_s"]["difference"] == pytest.approx(500 / 400 - 1)
    assert rows["memory_bytes"]["report"]["likely"] == 1_450_000_000
    assert rows["memory_bytes"]["difference"] == pytest.approx(1.45 / 1.5 - 1)
    # By hand: 256 tokens in each of this log's steps, over the peak of the plan's one chip in float32.
    flops = plan.model.flops_per_token(1024) * 256 / STEP_S
    peak = plan.fleet.pools[0].chip.peak_flops["float32"]
    assert rows["mfu"]["report"]["likely"] == pytest.approx(flops / peak)


@pytest.mark.parametrize(("step_s", "within"), [(359.0, False), (361.0, True), (439.0, True), (441.0, False)])
def test_a_row_says_whether_the_interval_held(step_s: float, within: bool, run: Run, tmp_path: Path) -> None:
    plan = laptop_plan()
    step = Ranged(low=360.0, likely=400.0, high=440.0)
    plan = plan.model_copy(
        update={"estimate": plan.estimate.model_copy(update={"step_time_s": step, "tokens_per_s": Ranged.exactly(1.0)})}
    )  # fmt: skip
    new_run(tmp_path, "a", plan, log_of(plan.fingerprint(), step_s=step_s))
    rows = fields(run("a-001", "--json")[1])
    assert rows["step_time_s"]["within"] is within
    assert rows["tokens_per_s"]["within"] is None  # no interval to lie in


def test_on_a_gpu_what_is_in_tensors_is_compared(run: Run, tmp_path: Path) -> None:
    plan = laptop_plan()
    held = {"weights": 1_000_000_000, "context": 400_000_000, "fragmentation": 100_000_000}
    pool = plan.pools[0].model_copy(update={"memory_bytes": held})
    plan = plan.model_copy(update={"pools": (pool,)})
    new_run(
        tmp_path,
        "a",
        plan,
        log_of(plan.fingerprint()),
        device_kind="cuda",
        peak_memory_bytes_by_rank=(10**9,),
    )
    memory = fields(run("a-001", "--json")[1])["memory_bytes"]
    assert memory["estimate"]["likely"] == pytest.approx(10**9)
    assert memory["difference"] == pytest.approx(0.0)


def test_the_whole_plan_trained_has_its_days_measured(run: Run, tmp_path: Path) -> None:
    plan = laptop_plan()
    short = plan.model_copy(update={"tokens": 5 * plan.step_tokens})
    new_run(tmp_path, "a", short, log_of(short.fingerprint(), num_steps=5))
    days = fields(run("a-001", "--json")[1])["days"]
    assert days["report"]["likely"] == pytest.approx(5 * STEP_S / 86_400)


def test_the_screen(run: Run, tmp_path: Path) -> None:
    plan = laptop_plan()
    new_run(tmp_path, "a", plan, log_of(plan.fingerprint()))
    status, out, _ = run("a-001")
    assert status == 0
    for part in ("low to high", "+25.0%", "not measured", "step_parts_s", "Wall time", "100.0% in steps",
                 "10 of the plan's", "The plan's rates are a catalog's"):  # fmt: skip
        assert part in out
    assert max(map(len, out.splitlines())) <= 140


def test_a_run_of_one_process_is_compared_with_its_own_estimate(run: Run, tmp_path: Path) -> None:
    made = new_run(tmp_path, "one", None, log_of(None))
    estimate = made.config().plan
    assert estimate is not None
    rows = fields(run("one-001", "--json")[1])
    assert set(rows) == set(type(estimate.estimate).model_fields) - {"memory"} | {"memory_bytes"}
    assert rows["step_time_s"]["difference"] == pytest.approx(STEP_S / estimate.estimate.step_time_s - 1)
    assert rows["step_time_s"]["within"] is None
    assert rows["memory_bytes"]["estimate"]["likely"] == estimate.estimate.memory.total_bytes


def test_a_run_beside_another_plan_says_where_they_part(run: Run, tmp_path: Path) -> None:
    plan = laptop_plan()
    new_run(tmp_path, "a", plan, log_of(plan.fingerprint()))
    other = plan.model_copy(update={"precision": "bfloat16"})
    path = tmp_path / "other.json"
    path.write_text(other.to_json())
    for arguments in ((str(path), "a-001"), ("a-001", str(path))):
        told = json.loads(run(*arguments, "--json")[1])
        assert told["notes"][0] == (
            "The run was trained otherwise than the plan says: precision float32 (in the plan bfloat16)."
        )


@pytest.mark.parametrize(
    ("fleet", "device_kind", "source", "said"),
    [
        ("h100:1", "cpu", None, "The plan is for h100"),
        ("h100:1", "cuda", None, None),
        ("laptop", "cpu", None, "The plan's rates are a catalog's"),
        ("laptop", "cpu", "measured on h, today", None),
        ("laptop", "cpu", "measured on elsewhere, today", "measured on elsewhere, today; the run was trained on h."),
    ],
)  # fmt: skip
def test_what_makes_a_comparison_say_less(
    fleet: str, device_kind: str, source: str | None, said: str | None
) -> None:
    """The log's host is `h`."""
    ground = parse_fleet(fleet)
    if source is not None:
        pool, rates = ground.pools[0], made_up().model_copy(update={"source": source})
        chip = pool.node.chip.model_copy(update={"measured": rates})
        node = pool.node.model_copy(update={"chip": chip})
        ground = ground.model_copy(update={"pools": (pool.model_copy(update={"node": node}),)})
    plan = laptop_plan().model_copy(update={"fleet": ground})
    report = dataclasses.replace(log_of(None).report(), device_kind=device_kind)
    notes = circumstances(plan, report)
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]


def test_two_runs_side_by_side(run: Run, tmp_path: Path) -> None:
    plan = laptop_plan()
    new_run(tmp_path, "a", plan, log_of(plan.fingerprint()))
    new_run(tmp_path, "b", plan, log_of(plan.fingerprint(), step_s=2 * STEP_S))
    rows = fields(run("a-001", "b-001", "--json")[1])
    assert rows["step_time_s"]["b_over_a"] == pytest.approx(2.0)
    assert rows["tokens_per_s"]["b_over_a"] == pytest.approx(0.5)
    assert rows["cost_usd"]["b_over_a"] is None
    assert "+100.0%" in run("a-001", "b-001")[1]


def test_a_run_of_many_ranks_beside_one_of_one_process(run: Run, tmp_path: Path) -> None:
    plan = laptop_plan()
    new_run(tmp_path, "a", plan, log_of(plan.fingerprint()))
    new_run(tmp_path, "b", None, log_of(None))
    for pair in (("a-001", "b-001"), ("b-001", "a-001")):
        assert fields(run(*pair, "--json")[1])["step_time_s"]["b_over_a"] == pytest.approx(1.0)
        assert run(*pair)[0] == 0


def test_what_cannot_be_compared_is_a_sentence(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(laptop_plan().to_json())
    new = RunDirectory.create(tmp_path, "new")
    new.write_description(small_config())
    new_run(tmp_path, "a", laptop_plan(), log_of(None))
    for argument, said in (
        (str(path), "name a second plan, or a run"),
        ("new-001", "nothing of it has been trained"),
        ("a-0001", "Did you mean 'a-001'?"),
        ("missing.json", "cannot read the plan missing.json"),
    ):
        status, out, err = run(argument)
        assert (status != 0, out) == (True, "")
        assert err.startswith("error: ")
        assert said in err


@pytest.mark.slow
def test_two_ranks_planned_trained_and_compared(tmp_path: Path, run: Run) -> None:
    plan = plan_of(tiny(vocab_size=300, context_tokens=64), tokens=10**4, shard=2)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    text = Path(json.__file__).parent
    command = ["train", "--plan", str(path), "--data", str(text), "--steps", "8", "--no-sample", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "colossus.cli", *command, "--runs", str(tmp_path), "--threads", "1"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = Summary.from_json(done.stdout)
    # The plan's, as nobody chose the default recipe's.
    assert RunDirectory.open("latest", tmp_path).config().optimizer == AdamW()
    assert len(summary.peak_memory_bytes_by_rank) == 2
    # Each rank is a process that has loaded torch; the first one's peak is in the summary by itself, too.
    assert min(summary.peak_memory_bytes_by_rank) > 50 * 2**20
    assert summary.peak_memory_bytes_by_rank[0] == pytest.approx(summary.peak_rss_bytes, rel=0.05)
    status, out, err = run("latest", "--json")
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert (told["steps"], told["memory_bytes_by_rank"]) == (8, list(summary.peak_memory_bytes_by_rank))
    rate = fields(out)["tokens_per_s"]["report"]["likely"]
    assert rate * fields(out)["step_time_s"]["report"]["likely"] == pytest.approx(plan.step_tokens, rel=0.2)
    assert 0 < told["wall"]["goodput"] <= 1
