"""The GPU benchmark works: its toy cases run on a CPU, and what it would run on GPUs fits them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from colossus.hardware import chip

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def test_a_toy_is_trained_and_reported(tmp_path: Path) -> None:
    done = run(tmp_path, "--only", "attention", "grok-small-bfloat16-eager")
    assert done.returncode == 0, done.stderr
    attention, eager = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert attention["status"] == eager["status"] == "done"
    assert attention["attention_s"]["torch, causal"] > 0
    assert eager["tokens_per_s"] == pytest.approx(eager["tokens"] / eager["step_s"])
    assert eager["loss"] < 2 * 5.55  # the logarithm of 256, with some way up: nothing has diverged
    assert f"| {eager['name']} | 2 × 2 × 64 |" in (tmp_path / "gpu.md").read_text()
    assert [*tmp_path.glob(".*")] == []


def test_what_there_is_no_time_for_is_skipped_and_said(tmp_path: Path) -> None:
    done = run(tmp_path, "--minutes", "0.1")
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert len(cases) > 10
    assert {case["status"] for case in cases} == {"skipped"}


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "no GPU" in done.stderr


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_chips_have_the_names_of_the_catalog(gpu: ModuleType, device: str, name: str) -> None:
    assert gpu.catalog_name(device) == name
    assert chip(name).name == name
    assert gpu.catalog_name("NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize("name", ["h100-sxm", "h200"])
def test_cases_fit_or_are_skipped_and_none_is_predicted_faster_than_its_chip(
    gpu: ModuleType, name: str
) -> None:
    there = chip(name)
    for case in gpu.CASES:
        if case.model == "attention":
            continue
        model = gpu.model_of(case.model, tiny=False)
        size, needed = gpu.first_that_fits(
            model, case, gpu.sizes_of(case.model, tiny=False), 0.95 * there.memory_bytes, "cuda"
        )
        state = 12 if size is None or size.optimizer_state == "bfloat16" else 16
        assert needed > state * model.num_params()  # weights and gradients in float32, and two averages
        if size is None:
            assert (case.model, name) == ("llama-8b", "h100-sxm")
            continue
        tokens = size.micro_batch_sequences * size.num_micro_batches * size.sequence_tokens
        flops = model.flops_per_token(size.sequence_tokens) * tokens
        parts = gpu.predicted_step_s(model, case.precision, size, name, case.compiled)
        assert sum(parts.values()) > flops / there.peak_flops[case.precision]
