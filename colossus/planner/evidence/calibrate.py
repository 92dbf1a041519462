"""Fitting the physical constants to published measurements, and the file they are kept in.

Each constant has a prior: a value with a source, and a spread that says how far measurements may move it. The
fit is the most probable set: least squares over the logarithms of predicted over measured step times, with the
priors as further terms, and large errors counted less (Cauchy's loss), because some rows are not what they
say. Shares move on the logit scale, positive constants on the log scale, so that every set is physical.
"""

import hashlib
import json
import math
import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from colossus.errors import ConfigError
from colossus.planner.estimate.constants import shipped
from colossus.planner.estimate.step import step_parts
from colossus.planner.evidence.published import Run, Table

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Prior:
    """What is believed of a constant before the measurements."""

    name: str
    value: float
    spread: float
    """Standard deviation on the constant's own scale (logit or log)."""
    kind: Literal["share", "positive"]
    source: str

    def to_scale(self, value: float) -> float:
        return math.log(value / (1.0 - value)) if self.kind == "share" else math.log(value)

    def from_scale(self, place: float) -> float:
        return 1.0 / (1.0 + math.exp(-place)) if self.kind == "share" else math.exp(place)


SHIPPED: Final = Path(__file__).parent.parent / "estimate" / "constants.toml"


def priors(path: Path | None = None) -> tuple[Prior, ...]:
    """What is believed of each constant: from the shipped file, or from another of its format.

    Raises ConfigError, as `read_constants`.
    """
    path = path or SHIPPED
    beliefs = []
    for name, entry in _entries(path).items():
        kind, source = entry.get("kind"), entry.get("source")
        if kind not in ("share", "positive"):
            raise ConfigError(f"{path}: the kind of {name} is {kind!r}; it must be 'share' or 'positive'")
        if not isinstance(source, str) or not source:
            raise ConfigError(f"{path}: {name} lacks a source")
        value = _number(path, name, entry, "prior", kind)
        beliefs.append(Prior(name, value, _number(path, name, entry, "spread", "positive"), kind, source))
    return tuple(beliefs)


def read_constants(path: Path | None = None) -> dict[str, float]:
    """The values of a file of constants; the shipped ones where there is no path.

    Raises ConfigError where the file cannot be read, or lacks a constant that the estimate needs.
    """
    if path is None:
        return shipped()
    entries = _entries(path)
    values = {
        name: _number(path, name, entry, "value", entry.get("kind", "positive"))
        for name, entry in entries.items()
    }
    missing = [name for name in shipped() if name not in values]
    if missing:
        raise ConfigError(
            f"{path} lacks {len(missing)} of the {len(shipped())} constants that the estimate needs, "
            f"{missing[0]} first; `colossus calibrate` writes a whole file"
        )
    return values


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    try:
        with path.open("rb") as file:
            table = tomllib.load(file).get("constant")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the constants {path}: {error}") from None
    if not isinstance(table, dict) or not table:
        raise ConfigError(f'{path} holds no constants: tables [constant."name"] with a value each')
    for name, entry in table.items():
        if not isinstance(entry, dict):
            raise ConfigError(f"{path}: {name} is {entry!r}, not a table with a value, a prior and a source")
    return table


def _number(path: Path, name: str, entry: Mapping[str, Any], key: str, kind: str) -> float:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{path}: the {key} of {name} is {value!r}; it must be a number")
    below = 1.0 if kind == "share" else math.inf
    if not 0.0 < value < below:
        raise ConfigError(f"{path}: the {key} of {name} is {value}; it must lie between 0 and {below:g}")
    return float(value)


def predict_s(table: Table, values: Mapping[str, float]) -> Vector:
    """Step seconds of each run."""
    with np.errstate(divide="ignore", invalid="ignore"):  # of alternatives that np.where then leaves out
        parts = step_parts(table.shape, table.execution, table.hardware, table.constants(values))
    return np.asarray(parts.total_s)


def usable(run: Run) -> bool:
    """Whether a run is one to fit on: timed, its layout published or nearly so, all of it on the chips."""
    tier = run.row.get("tier", "A")
    return run.step_s > 0 and not run.out_of_memory and tier in TIER_WEIGHT and not offloads(run.row)


def offloads(row: Mapping[str, str]) -> bool:
    """Whether the optimizer runs on the host, which no candidate can say."""
    return any("offload" in row.get(name, "").lower() for name in ("framework", "fsdp"))


TIER_WEIGHT: Final = {"": 1.0, "A": 1.0, "B": 0.5}
"""Tier B: something about the row had to be assumed."""


NOISE: Final = 0.04
"""Spread of the logarithm of a measured step time about a right prediction: what no layout explains."""
FULL_VOICE: Final = 60
"""Rows of one source on one chip up to which each counts in full: a thousand small models on one node must not
drown the rest."""


def weights(runs: Sequence[Run]) -> Vector:
    """One for each configuration however often it was measured, half for rows with something assumed."""
    keys = [configuration(run) for run in runs]
    counts = Counter(keys)
    families = [
        (run.row.get("source", "").partition('"')[0][:30], run.node.name, run.stack.name) for run in runs
    ]
    sizes = Counter(families)
    return np.array(
        [
            TIER_WEIGHT.get(run.row.get("tier", "A"), 0.2)
            / counts[key]
            * min(1.0, (FULL_VOICE / sizes[family]) ** 0.8)
            for run, key, family in zip(runs, keys, families, strict=True)
        ]
    )


def configuration(run: Run) -> tuple[str, ...]:
    """What tells configurations apart; measurements of one differ in these no more."""
    columns = (
        "model_name", "gpu", "n_gpus", "precision", "seq_len", "tp", "pp", "vpp", "cp", "ep", "fsdp",
        "micro_batch", "global_batch_seqs", "recompute",
    )  # fmt: skip
    kernel = run.row.get("notes", "").partition(";")[0] if "kernel:" in run.row.get("notes", "") else ""
    return (*(run.row.get(name, "") for name in columns), run.stack.name, kernel)


@dataclass(frozen=True, slots=True)
class Fit:
    values: dict[str, float]
    moved: dict[str, float]
    """How far from its prior each constant has gone, in its spreads."""
    posterior_spread: dict[str, float]
    """Standard deviation left after the measurements, on the constant's own scale (logit or log): far below the
    prior's where the data decide, near it where they say little. It takes rows for independent and the model
    for right, so it is a lower bound."""
    log_errors: Vector
    """Of predicted over measured, by row."""


@dataclass(frozen=True, slots=True)
class _Problem:
    """Residuals of rows and of priors, as functions of the constants' places on their own scales."""

    table: Table
    beliefs: Sequence[Prior]

    def values(self, place: Vector) -> dict[str, float]:
        return {prior.name: prior.from_scale(x) for prior, x in zip(self.beliefs, place, strict=True)}

    def residuals(self, place: Vector) -> Vector:
        rows = (np.log(predict_s(self.table, self.values(place))) - np.log(self.table.step_s)) / NOISE
        believed = [
            (x - prior.to_scale(prior.value)) / prior.spread
            for prior, x in zip(self.beliefs, place, strict=True)
        ]
        return np.concatenate([rows, np.array(believed)])

    def jacobian(self, place: Vector, residuals: Vector) -> Vector:
        columns = []
        for i in range(len(place)):
            moved = place.copy()
            moved[i] += 1e-4
            columns.append((self.residuals(moved) - residuals) / 1e-4)
        return np.stack(columns, axis=1)


def fit(
    table: Table,
    beliefs: Sequence[Prior],
    *,
    rounds: int = 25,
    report: Callable[[int, float], None] | None = None,
) -> Fit:
    """Levenberg-Marquardt on the scaled constants. `table` holds runs with a measured step time."""
    problem = _Problem(table, beliefs)
    num_rows = len(table.runs)
    weight = weights(table.runs)

    def importance(residuals: Vector) -> Vector:
        robust = 1.0 / (1.0 + (residuals[:num_rows] / 3.0) ** 2)  # Cauchy: 3 × noise counts half
        return np.concatenate([weight * robust, np.ones(len(beliefs))])

    def loss(residuals: Vector) -> float:
        rows, believed = residuals[:num_rows], residuals[num_rows:]
        return float(np.sum(weight * 9.0 * np.log1p((rows / 3.0) ** 2)) + np.sum(believed**2))

    start = np.array([prior.to_scale(prior.value) for prior in beliefs])
    place, damping = start.copy(), 1e-2
    residuals = problem.residuals(place)
    best = loss(residuals)
    normal = np.eye(len(place))
    for number in range(rounds):
        jacobian = problem.jacobian(place, residuals)
        importances = importance(residuals)
        normal = jacobian.T @ (importances[:, None] * jacobian)
        gradient = jacobian.T @ (importances * residuals)
        gain = 0.0
        for _ in range(8):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient)
            step = np.clip(step, -0.7, 0.7)
            trial = problem.residuals(place + step)
            if loss(trial) < best:
                gain = best - loss(trial)
                place, residuals, best = place + step, trial, loss(trial)
                damping = max(damping / 4, 1e-6)
                break
            damping *= 4
        if report is not None:
            report(number, best)
        if gain < 1e-4 * best:
            break
    names = [prior.name for prior in beliefs]
    spreads = np.array([prior.spread for prior in beliefs])
    return Fit(
        values=problem.values(place),
        moved=dict(zip(names, ((place - start) / spreads).tolist(), strict=True)),
        posterior_spread=dict(zip(names, np.sqrt(np.diag(np.linalg.inv(normal))).tolist(), strict=True)),
        log_errors=residuals[:num_rows] * NOISE,
    )


def summary(log_errors: Vector) -> dict[str, Any]:
    """Errors in percent of the measured step time."""
    relative = np.abs(np.expm1(log_errors)) * 100
    return {
        "n": len(relative),
        "mape": float(np.mean(relative)),
        "median": float(np.median(relative)),
        "p90": float(np.percentile(relative, 90)),
        "bias": float(np.mean(np.expm1(log_errors)) * 100),
    }


def source_of(run: Run) -> str:
    """Who measured: what is left out together in cross-validation. Revisions of one table are one source, and so
    are the rounds of a benchmark (`mlcommons/training_results_v4.1`)."""
    place = run.row.get("url_or_path", "") or run.row.get("source", "")
    repository = re.match(r"(?:github:)?([\w.-]+/[\w.-]+)", place)
    return re.sub(r"_v\d[\d.]*$", "", repository[1]) if repository else re.split(r"[ :]", place)[0]


@dataclass(frozen=True, slots=True)
class Fold:
    """Rows that were left out of a fit together, and its errors on them."""

    name: str
    rows: npt.NDArray[np.int64]
    """Their places in the table."""
    log_errors: Vector


def leave_out(
    table: Table,
    beliefs: Sequence[Prior],
    groups: Mapping[str, npt.NDArray[np.int64]],
    *,
    report: Callable[[str], None] | None = None,
) -> list[Fold]:
    """The errors of each group's rows under a fit that has not seen them."""
    folds = []
    for name, rows in groups.items():
        if report is not None:
            report(name)
        others = np.setdiff1d(np.arange(len(table.runs)), rows)
        if len(others):
            own = _take(table, rows)
            values = fit(_take(table, others), beliefs, rounds=12).values
            folds.append(Fold(name, rows, np.log(predict_s(own, values)) - np.log(own.step_s)))
    return folds


def by_source(
    runs: Sequence[Run], only: Callable[[Run], bool] = lambda run: True
) -> dict[str, npt.NDArray[np.int64]]:
    """Rows by source, of the sources that hold a row of interest."""
    sources = np.array([source_of(run) for run in runs])
    wanted = sorted({source_of(run) for run in runs if only(run)})
    return {source: np.flatnonzero(sources == source) for source in wanted}


def by_configuration(runs: Sequence[Run], num_groups: int = 4) -> dict[str, npt.NDArray[np.int64]]:
    """Rows in groups by a hash of what was run: measurements of one configuration are in one group."""
    place = np.array(
        [
            int.from_bytes(hashlib.sha256(repr(configuration(run)).encode()).digest()[:8], "big") % num_groups
            for run in runs
        ]
    )
    return {f"configurations {i + 1} of {num_groups}": np.flatnonzero(place == i) for i in range(num_groups)}


def _take(table: Table, rows: npt.NDArray[np.int64]) -> Table:
    return Table(
        [table.runs[int(i)] for i in rows],
        table.shape.take(rows),
        table.execution.take(rows),
        table.hardware.take(rows),
        table.step_s[rows],
    )


# --- the file ---


HEAD: Final = """\
# Constants of the estimate of a step's time, fitted to published measurements by `colossus calibrate`.
#
# value: what the estimate uses. prior, spread: what was believed before the measurements, from `source`, and how
# far they may move it; the spread is a standard deviation on the logit scale for a share, on the log scale for a
# positive number (0.1: about 10 %). moved: how far they did, in spreads. posterior_spread: what is left of the
# spread afterwards, on the same scale: far below it, the measurements decide; near it, the prior does.
# Errors are in percent of the measured step time: mape mean, median, p90 (of ten rows nine are closer), bias.
"""


@dataclass(frozen=True, slots=True)
class TableFile:
    """A table that was fitted to."""

    name: str
    sha256: str
    num_rows: int
    num_used: int


def constants_toml(
    result: Fit,
    beliefs: Sequence[Prior],
    runs: Sequence[Run],
    tables: Sequence[TableFile],
    *,
    date: str,
    left_out: Mapping[str, Vector] | None = None,
) -> str:
    """A file of constants for people to read, and for `read_constants`, `priors` and the estimate.

    `runs` are those of the fit in its order; `left_out` the log errors of a cross-validation by source.
    """
    lines = [HEAD, "[fit]", f"date = {_text(date)}", f"num_runs = {len(runs)}"]
    lines.append(f"num_configurations = {len({configuration(run) for run in runs})}")
    lines += [f"{key} = {value:.2f}" for key, value in summary(result.log_errors).items() if key != "n"]
    for file in tables:
        lines += ["", "[[fit.table]]", f"name = {_text(file.name)}", f"sha256 = {_text(file.sha256)}"]
        lines += [f"num_rows = {file.num_rows}", f"num_used = {file.num_used}"]
    sources = np.array([source_of(run) for run in runs])
    errors = {source: result.log_errors[sources == source] for source in sorted(set(sources.tolist()))}
    lines += ["", "# Errors of the rows that were fitted, by source.", "[residuals]", *_errors(errors)]
    if left_out:
        lines += [
            "",
            "# Errors of each source's rows under a fit that has not seen that source.",
            "[left_out]",
        ]
        lines += _errors({**left_out, "all": np.concatenate(list(left_out.values()))})
    for prior in beliefs:
        lines += [
            "",
            f"[constant.{_text(prior.name)}]",
            f"value = {result.values[prior.name]:.5g}",
            f"prior = {prior.value:.5g}",
            f"spread = {prior.spread:g}",
            f"moved = {result.moved[prior.name]:.2f}",
            f"posterior_spread = {result.posterior_spread[prior.name]:.3g}",
            f"kind = {_text(prior.kind)}",
            f"source = {_text(prior.source)}",
        ]
    return "\n".join(lines) + "\n"


def _errors(by_source: Mapping[str, Vector]) -> list[str]:
    return [
        f"{_text(source)} = {{ "
        + ", ".join(
            f"{key} = {value if key == 'n' else format(value, '.4g')}"
            for key, value in summary(errors).items()
        )
        + " }"
        for source, errors in by_source.items()
    ]


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's


def write_whole(path: Path, text: str, *, replace: bool) -> None:
    """Writes a file whole or not at all. Raises ConfigError where it exists and is not to be replaced, or cannot
    be written."""
    if path.exists() and not replace:
        raise ConfigError(f"{path} exists; choose another name, or say --replace to write over it")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
