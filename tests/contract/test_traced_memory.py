"""Peak memory counted from the specification, and that of the real step on tensors without data, rank by rank."""

import statistics
import warnings

import pytest

from benchmarks.traced_memory import cases, compare

QUICK = (
    "Llama 8B, none", "Llama 8B, optimizer", "Llama 8B, gradients", "Llama 8B, weights", "OLMo 7B, alternate",
    "Llama 8B, 1f1b, stage 0", "Llama 8B, zb-h1, stage 3", "Mixtral 8x7B, ep", "GPT-3 13B, tp",
)  # fmt: skip


def _error(name: str) -> float:
    (one,) = [case for case in cases() if case.name == name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced, counted = compare(one)
    return sum(counted.values()) / sum(traced.values()) - 1


@pytest.mark.parametrize("name", QUICK)
def test_peak_memory_is_counted(name: str) -> None:
    assert abs(_error(name)) < 0.05


@pytest.mark.slow
def test_peak_memory_of_all_layouts() -> None:
    errors = {case.name: _error(case.name) for case in cases()}
    assert len(errors) >= 40
    assert statistics.median(abs(error) for error in errors.values()) < 0.05
    assert max(abs(error) for error in errors.values()) < 0.10, errors
