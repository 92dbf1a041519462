"""`colossus plan --prove`: tables, JSON, and how it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from colossus.planner.estimate.collectives import Exchange, collectives
from colossus.spec.job import Job
from tests.parallel.layouts import SPARSE, mixture
from tests.parallel.plans import plan_of, write_plan


def colossus(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "colossus.cli", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings: dict[str, Any] = {"replica": 32, "pp": 2, "shard": 4, "ep": 4, "sharding": "gradients"}
    return write_plan(tmp_path_factory.mktemp("plans") / "plan.json", mixture(), **settings)


def test_a_table_for_each_kind_of_rank(path: Path) -> None:
    done = colossus("plan", "--prove", str(path))
    assert done.returncode == 0, done.stderr
    assert "on 256 ranks of h100:256" in done.stdout
    assert "Stage 0 of 2, 2 layers + embedding" in done.stdout
    assert "Stage 1 of 2, 2 layers + head" in done.stdout
    assert done.stdout.count("are those that were priced, byte for byte") == 2
    assert "tokens to their experts and back" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110


@pytest.mark.slow
def test_json_has_all_that_was_seen(path: Path) -> None:
    done = colossus("plan", "--prove", str(path), "--json")
    told = json.loads(done.stdout)
    assert told["num_ranks"] == 256
    plan = plan_of(mixture(), replica=32, pp=2, shard=4, ep=4, sharding="gradients")
    for role in told["roles"]:
        wanted = collectives(
            plan.model, Job.of(plan), role["rank"], dtype="float32", chunk_tokens=32, router_losses=True,
            num_micro_batches=role["num_micro_batches"],
        )  # fmt: skip
        seen = [
            Exchange(e["kind"], e["group"], e["num_bytes"], e["times"]) for e in role["exchanges"]["seen"]
        ]
        assert tuple(seen) == wanted
        assert role["memory_bytes"]["seen"]["weights"] > 0
        assert role["num_differences"] == 0
    assert sum(role["num_ranks"] for role in told["roles"]) == 256


def test_what_cannot_be_proven_is_a_sentence_and_status_1(tmp_path: Path) -> None:
    done = colossus("plan", "--prove", str(write_plan(tmp_path / "sparse.json", SPARSE)))
    assert done.returncode == 1
    assert done.stderr.startswith("error: sparse has tables of which a step touches few rows")
    assert "Traceback" not in done.stderr


def test_a_plan_that_is_not_there_is_a_wrong_option() -> None:
    done = colossus("plan", "--prove", "nowhere.json")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read the plan nowhere.json")


def test_planning_still_wants_a_model_and_a_fleet() -> None:
    assert "Missing argument 'MODEL'" in colossus("plan").stderr
    assert "Missing option '--fleet'" in colossus("plan", "gpt2").stderr
