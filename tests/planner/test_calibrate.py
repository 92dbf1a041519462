"""The fit finds what made the data, says how sure it is, and leaves out what it says it leaves out."""

import math
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colossus.errors import ConfigError
from colossus.planner.estimate.constants import shipped
from colossus.planner.estimate.step import StepParts, step_parts
from colossus.planner.evidence import calibrate, intervals
from colossus.planner.evidence.calibrate import (
    Fit,
    TableFile,
    by_configuration,
    by_source,
    constants_toml,
    fit,
    leave_out,
    predict_s,
    priors,
    read_constants,
    source_of,
    usable,
    write_whole,
)
from colossus.planner.evidence.intervals import (
    Distance,
    LeftOut,
    Seen,
    Spread,
    fit_spread,
    half_width,
    intervals_toml,
    read,
)
from colossus.planner.evidence.published import Run, Table, run_of
from tests.planner.test_validate import row

MODELS = ((16, 2048), (24, 4096), (48, 8192))
LAYOUTS = ((1, 1, 1), (1, 2, 2), (2, 1, 1), (4, 4, 1), (8, 1, 2), (8, 2, 1))
SOUGHT = ("matmul.hopper.bfloat16", "attention.ampere")
BELIEFS = tuple(replace(prior, spread=0.5 if prior.name in SOUGHT else 0.001) for prior in priors())
"""Much is open about two constants, of which Hopper's runs say nothing about the last."""
KNOWN = {prior.name: prior.value for prior in priors()}
"""All constants at their priors."""


def runs(**changes: Any) -> list[Run]:
    found = []
    for layers, hidden in MODELS:
        model = {
            "model_name": f"gpt-{layers}",
            "n_layers": layers,
            "hidden": hidden,
            "n_heads": hidden // 128,
        }
        for i, (tp, pp, micro_batch) in enumerate(LAYOUTS):
            layout = {"n_gpus": 64, "tp": tp, "pp": pp, "micro_batch": micro_batch}
            found.append(run_of(row(id=f"{layers}-{i}", **model, **layout, **changes)))
    return found


def timed_by(found: list[Run], values: dict[str, float]) -> Table:
    """A table in which the measured times are those that these constants predict."""
    table = Table.of(found)
    return Table(found, table.shape, table.execution, table.hardware, predict_s(table, values))


@pytest.fixture(scope="module")
def recovered() -> tuple[dict[str, float], Fit]:
    truth = {**KNOWN, "matmul.hopper.bfloat16": 0.70}
    return truth, fit(timed_by(runs(), truth), BELIEFS)


def test_the_fit_finds_the_constants_that_made_the_data(recovered: tuple[dict[str, float], Fit]) -> None:
    truth, result = recovered
    assert np.max(np.abs(result.log_errors)) < 0.01
    for name in SOUGHT:
        assert result.values[name] == pytest.approx(truth[name], rel=0.02)


def test_what_the_data_say_nothing_of_stays_at_its_prior(recovered: tuple[dict[str, float], Fit]) -> None:
    _, result = recovered
    for prior in BELIEFS:
        left = result.posterior_spread[prior.name] / prior.spread
        assert 0 < left <= 1 + 1e-6
        if "ampere" in prior.name or "blackwell" in prior.name:
            assert result.values[prior.name] == pytest.approx(prior.value, rel=1e-6)
            assert left == pytest.approx(1.0, rel=1e-3)
        elif prior.name in SOUGHT:
            assert left < 0.5


def test_one_row_that_is_not_what_it_says_moves_little() -> None:
    table = timed_by(runs(), KNOWN)
    table.step_s[3] *= 10
    result = fit(table, priors(), rounds=4)
    others = np.delete(result.log_errors, 3)
    assert np.max(np.abs(others)) < 0.02
    assert result.log_errors[3] == pytest.approx(-math.log(10), abs=0.05)


def test_a_source_that_is_left_out_teaches_nothing() -> None:
    """Its own times may be anything: the predictions for it stay the same."""
    ours, theirs = runs()[:6], runs(url_or_path="github:other/lab")[:6]
    groups = by_source([*ours, *theirs])
    assert {name: rows.tolist() for name, rows in groups.items()} == {
        "lab/table": list(range(6)), "other/lab": list(range(6, 12)),
    }  # fmt: skip
    chosen = {"other/lab": groups["other/lab"]}
    table = timed_by([*ours, *theirs], KNOWN)
    (honest,) = leave_out(table, priors(), chosen)
    table.step_s[6:] *= 3
    (wrong,) = leave_out(table, priors(), chosen)
    assert wrong.log_errors == pytest.approx(honest.log_errors - math.log(3))


def test_measurements_of_one_configuration_are_left_out_together() -> None:
    found = [*runs(), *runs()]
    groups = by_configuration(found, 3)
    place = {int(i): name for name, rows in groups.items() for i in rows}
    assert sorted(place) == list(range(len(found)))
    half = len(found) // 2
    assert all(place[i] == place[i + half] for i in range(half))
    assert len(set(place.values())) == 3


@pytest.mark.parametrize(
    ("url", "source"),
    [
        ("github:mlcommons/training_results_v4.1", "mlcommons/training_results"),
        ("github:mlcommons/training_results_v3.0/x", "mlcommons/training_results"),
        ("github:NVIDIA/NeMo@abc docs/source", "NVIDIA/NeMo"),
        ("arXiv:2104.04473", "arXiv"),
    ],
)
def test_rounds_and_revisions_are_one_source(url: str, source: str) -> None:
    assert source_of(run_of(row(url_or_path=url))) == source


def test_only_timed_runs_of_known_layout_are_fitted() -> None:
    assert usable(run_of(row()))
    assert usable(run_of(row(tier="B")))
    for changes in (
        {"tier": "C"},
        {"tier": "OOM"},
        {"metric_step_time_s": ""},
        {"fsdp": "ZeRO-3 + CPU offload"},
    ):
        assert not usable(run_of(row(**changes)))


# --- the file ---


def test_the_file_is_read_as_it_was_written(recovered: tuple[dict[str, float], Fit], tmp_path: Path) -> None:
    _, result = recovered
    tables = [TableFile('odd "name".csv', "ab12", 20, 18)]
    errors = {"other/lab": np.array([0.1, -0.1])}
    text = constants_toml(result, BELIEFS, runs(), tables, date="2026-11-22", left_out=errors)
    path = tmp_path / "constants.toml"
    write_whole(path, text, replace=False)
    assert read_constants(path) == {
        name: pytest.approx(value, rel=1e-4) for name, value in result.values.items()
    }
    assert [(p.name, p.spread, p.kind, p.source) for p in priors(path)] == [
        (p.name, p.spread, p.kind, p.source) for p in BELIEFS
    ]
    told = tomllib.loads(text)
    assert told["fit"]["table"] == [
        {"name": 'odd "name".csv', "sha256": "ab12", "num_rows": 20, "num_used": 18}
    ]
    assert told["residuals"]["lab/table"]["n"] == len(runs())
    assert told["left_out"]["all"]["mape"] == pytest.approx(50 * (math.exp(0.1) - math.exp(-0.1)), rel=1e-3)
    entry = told["constant"]["matmul.hopper.bfloat16"]
    assert entry["moved"] < -0.5
    assert entry["posterior_spread"] < entry["spread"] / 2


def test_a_file_is_written_over_only_when_told(tmp_path: Path) -> None:
    path = tmp_path / "constants.toml"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="--replace"):
        write_whole(path, "new", replace=False)
    assert path.read_text() == "mine"
    write_whole(path, "new", replace=True)
    assert [file.name for file in tmp_path.iterdir()] == ["constants.toml"]
    with pytest.raises(ConfigError, match="cannot write"):
        write_whole(tmp_path / "nowhere" / "constants.toml", "new", replace=False)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "no constants"), ("x = [", "cannot read"), ("constant = 3", "no constants"),
        ("[constant]\na = 1", "table"),
        ('[constant."nic"]\nvalue = "x"', "number"), ('[constant."nic"]\nvalue = nan', "between"),
        ('[constant."nic"]\nvalue = 2\nkind = "share"', "between 0 and 1"), ('[constant."nic"]\nvalue = 0.5', "lacks"),
    ],
)  # fmt: skip
def test_files_that_hold_no_constants(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "constants.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=part):
        read_constants(path)


def test_the_shipped_constants_are_of_this_format() -> None:
    assert read_constants(calibrate.SHIPPED) == shipped()
    assert {prior.name for prior in priors()} == set(shipped())


# --- intervals ---


def parts_of(found: list[Run]) -> StepParts:
    table = Table.of(found)
    return step_parts(table.shape, table.execution, table.hardware, table.constants(KNOWN))


def random_features(random: np.random.Generator, count: int) -> Any:
    shares = random.dirichlet([8, 1, 1, 1, 1], count)[:, 1:]
    far = np.stack(
        [random.random(count) < 0.3, random.exponential(1, count), random.uniform(0, 0.5, count)], axis=1
    )
    return np.concatenate([np.ones((count, 1)), shares, far], axis=1)


def test_intervals_hold_four_times_of_five_on_data_that_they_have_not_seen() -> None:
    random = np.random.default_rng(7)
    truth = Spread(0.05, 0.4, 0.2, 0.6, 0.3, 0.2, 0.05, 0.3)
    matrix = random_features(random, 6000)
    errors = random.normal(size=6000) * half_width(truth, matrix) / 1.2816  # 80 % of a normal distribution
    spread = fit_spread(errors[:3000], matrix[:3000], np.ones(3000))
    width = half_width(spread, matrix[3000:])
    assert np.mean(np.abs(errors[3000:]) <= width) == pytest.approx(0.8, abs=0.025)
    familiar = matrix[3000:, 5] == 0
    for kind in (familiar, ~familiar):  # not only on average
        assert np.mean((np.abs(errors[3000:]) <= width)[kind]) == pytest.approx(0.8, abs=0.04)


def test_the_interval_is_about_the_estimate_and_wider_for_the_unknown() -> None:
    found = runs()[:6]
    parts, seen = parts_of(found), Seen.of(found)
    near = Distance.of_runs(seen, found)
    assert not near.new_stack.any()
    assert not near.doublings.any()
    low, high = intervals.interval(parts, near)
    assert low * high == pytest.approx(parts.total_s**2)
    own = Distance.of(seen, ["hopper"] * 6, ["bfloat16"] * 6, [None] * 6, intervals.sizes_of(found))
    wider_low, wider_high = intervals.interval(parts, own)
    assert (wider_low < low).all()
    assert (wider_high > high).all()


@pytest.mark.parametrize(
    ("changes", "doublings", "new_stack"),
    [({}, 0, 0), ({"n_gpus": 256}, 2, 0), ({"seq_len": 1024}, 2, 0), ({"n_gpus": 128, "seq_len": 8192}, 2, 0),
     ({"framework": "torchtitan"}, 0, 1), ({"gpu": "A100-80"}, 0, 1)],
)  # fmt: skip
def test_distance_counts_doublings_beyond_what_was_seen(
    changes: dict[str, Any], doublings: float, new_stack: float
) -> None:
    seen = Seen.of([run_of(row(n_gpus=16)), run_of(row(n_gpus=64))])
    distance = Distance.of_runs(seen, [run_of(row(**changes))])
    assert (float(distance.doublings[0]), float(distance.new_stack[0])) == (doublings, new_stack)
    assert float(distance.few_sources[0]) == (1.0 if "gpu" in changes else 0.5)


def test_intervals_are_read_as_they_were_written(tmp_path: Path) -> None:
    spread, seen = (
        Spread(0.05, 0.4, 0.2, 0.6, 0.3, 0.2, 0.05, 0.3),
        Seen.of([*runs(), run_of(row(framework="NeMo"))]),
    )
    path = tmp_path / "intervals.toml"
    path.write_text(intervals_toml(spread, seen, date="2026-11-22", coverage={"lab/table": 81.25}))
    assert read(path) == (spread, seen)
    path.write_text(path.read_text().replace("value = 0.4", "value = -1"))
    with pytest.raises(ConfigError, match="no file of intervals"):
        read(path)


def test_a_source_never_widens_its_own_interval() -> None:
    """Coverage is of spreads that were fitted without the source: its own errors may be anything."""
    ours, theirs = runs()[:6], runs(url_or_path="github:other/lab")[:6]
    table = timed_by([*ours, *theirs], KNOWN)
    folds = [
        calibrate.Fold(name, rows, np.full(len(rows), 0.02 if name == "lab/table" else 5.0))
        for name, rows in {**by_source(table.runs), **by_configuration(table.runs, 2)}.items()
    ]
    left = LeftOut.of(table.runs, parts_of([*ours, *theirs]), folds, 2)
    assert left.coverage()["other/lab"] == 0.0
    assert len(left.features[0]) == len(fields(Spread))
