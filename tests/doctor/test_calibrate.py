"""What is measured becomes a fleet's file, and the planner takes its times from it."""

import math
import tomllib
from pathlib import Path

import pytest

from colossus.doctor import calibrate, measure
from colossus.doctor.fleet_file import fleet_toml
from colossus.errors import ColossusError, ConfigError
from colossus.hardware import parse_fleet
from tests.planner import measured as known


@pytest.fixture(scope="module")
def found() -> dict:
    """Two ranks of this machine, on few sizes."""
    return calibrate.measure_ranks(2, 1, quick=True)


def test_every_curve_is_measured_on_two_ranks(found: dict) -> None:
    assert {c["kind"] for c in found["collectives"]} == {
        "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send",
    }  # fmt: skip
    assert {c["num_ranks"] for c in found["collectives"]} == {2}
    assert len(found["matmuls"]) == 2 * 3 * 3
    assert found["memory_bandwidth"] > 1e8
    assert all(s > 0 for c in found["operations"] for s in c["seconds"])


def test_larger_things_take_longer(found: dict) -> None:
    """Sixteen times the FLOPs, a 128 times longer message."""
    by = {(p["dtype"], p["product"], p["tokens"], p["outputs"]): p["seconds"] for p in found["matmuls"]}
    for dtype in ("float32", "bfloat16"):
        assert by[dtype, "forward", 2048, 256] > 4 * by[dtype, "forward", 128, 128]


def test_the_file_is_a_fleet_that_can_be_planned_on(found: dict, tmp_path: Path) -> None:
    text = fleet_toml(
        found,
        name="here",
        source="measured on here",
        num_ranks=2,
        num_threads=1,
        memory_bytes=8 << 30,
        disk=(1e9, 2e9),
    )
    path = tmp_path / "here.toml"
    path.write_text(text)
    fleet = parse_fleet(str(path))
    assert fleet.num_chips == 2
    chip = fleet.pools[0].chip
    assert (chip.source, chip.memory_bytes) == ("measured on here", 4 << 30)
    assert chip.measured is not None
    assert chip.measured.disk_read_bytes_per_s == 2e9
    assert len(chip.measured.matmuls) == len(found["matmuls"])
    for kept, measured in zip(chip.measured.matmuls, found["matmuls"], strict=True):
        assert kept.seconds == pytest.approx(measured["seconds"], rel=1e-3)
    entry = tomllib.loads(text)["chip"]["here-rank"]
    numbers = {name for name, value in entry.items() if isinstance(value, int | float | dict)}
    assert numbers - {"sources", "measured", "peak_flops", "memory_bandwidth"} == set(entry["sources"])


def test_numbers_of_ranks_are_merged_by_their_median() -> None:
    ranks = [{"a": [{"dtype": "float32", "tokens": 4, "seconds": s}], "b": s} for s in (1.0, 5.0, 2.0)]
    assert calibrate.merged(ranks) == {"a": [{"dtype": "float32", "tokens": 4, "seconds": 2.0}], "b": 2.0}


def test_more_ranks_than_cores_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"10000 ranks do not fit this machine"):
        calibrate.checked_ranks(10_000)


def test_a_rank_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate.sys, "executable", "/bin/false")
    with pytest.raises(ColossusError, match=r"rank 0 of 1 \(exit code 1\)"):
        calibrate.measure_ranks(1, 1, quick=True)


def test_a_median_is_robust_and_its_spread_is_kept() -> None:
    records = measure.Records("cpu")
    assert records.median([1.0, 1.0, 1.0, 1.0, 50.0]) == 1.0
    assert records.spreads == [0.0]
    records.median([1.0, 2.0, 3.0, 4.0, 5.0])
    assert records.spreads[-1] == pytest.approx(2 / 3)


def test_the_summary_tells_rates() -> None:
    found = known.made_up().model_dump()
    shown = calibrate.summary({**found, "memory_bandwidth": 3e10})
    shape = (2048, 768, 768)
    fastest = 2 * math.prod(shape) / known.matmul_s("float32", *shape) / 1e9
    assert str(shown["float32 matmuls, GFLOP/s"]).endswith(f" to {fastest:.0f}")
    assert shown["memory, GB/s (triad)"] == 30
