"""Fitting the physical constants to published measurements.

Each constant has a prior: a value with a source, and a spread that says how far measurements may move it. The
fit is the most probable set: least squares over the logarithms of predicted over measured step times, with the
priors as further terms, and large errors counted less (Cauchy's loss), because some rows are not what they
say. Shares move on the logit scale, positive constants on the log scale, so that every set is physical.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from colossus.planner.published import Run, Table
from colossus.planner.step import step_parts

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


def priors(path: Path | None = None) -> tuple[Prior, ...]:
    import tomllib

    path = path or Path(__file__).parent / "constants.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8"))["constant"]
    return tuple(
        Prior(name, entry["prior"], entry["spread"], entry["kind"], entry["source"])
        for name, entry in table.items()
    )


def predict_s(table: Table, values: Mapping[str, float]) -> Vector:
    """Step seconds of each run."""
    return np.asarray(
        step_parts(table.shape, table.execution, table.hardware, table.constants(values)).total_s
    )


NOISE = 0.04
"""Spread of the logarithm of a measured step time about a right prediction: what no layout explains."""


@dataclass(frozen=True, slots=True)
class Fit:
    values: dict[str, float]
    moved: dict[str, float]
    """How far from its prior each constant has gone, in its spreads."""
    log_errors: Vector


def weights(runs: Sequence[Run]) -> Vector:
    """One for each configuration however often it was measured, half for rows with something assumed."""
    keys = [configuration(run) for run in runs]
    counts = Counter(keys)
    families = [(run.row.get("source", "").partition('"')[0][:30], run.node.name, run.stack.name) for run in runs]
    sizes = Counter(families)
    tier = {"A": 1.0, "B": 0.5}
    return np.array(
        [
            tier.get(run.row.get("tier", "A"), 0.2) / counts[key] * min(1.0, (FULL_VOICE / sizes[family]) ** 0.8)
            for run, key, family in zip(runs, keys, families, strict=True)
        ]
    )


FULL_VOICE = 60
"""Rows of one source on one chip up to which each counts in full: a thousand small models on one node must not
drown the rest."""


def configuration(run: Run) -> tuple[str, ...]:
    """What tells configurations apart; measurements of one differ in these no more."""
    columns = (
        "model_name", "gpu", "n_gpus", "precision", "seq_len", "tp", "pp", "vpp", "cp", "ep", "fsdp",
        "micro_batch", "global_batch_seqs", "recompute",
    )  # fmt: skip
    kernel = run.row.get("notes", "").partition(";")[0] if "kernel:" in run.row.get("notes", "") else ""
    return (*(run.row.get(name, "") for name in columns), run.stack.name, kernel)


def fit(
    table: Table,
    beliefs: Sequence[Prior],
    *,
    rounds: int = 25,
    report: Callable[[int, float], None] | None = None,
) -> Fit:
    """Levenberg-Marquardt on the scaled constants. `table` holds runs with a measured step time."""
    start = np.array([prior.to_scale(prior.value) for prior in beliefs])
    spread = np.array([prior.spread for prior in beliefs])
    measured = np.log(table.step_s)
    weight = weights(table.runs)

    def values_at(place: Vector) -> dict[str, float]:
        return {prior.name: prior.from_scale(x) for prior, x in zip(beliefs, place, strict=True)}

    def residuals(place: Vector) -> Vector:
        errors = (np.log(predict_s(table, values_at(place))) - measured) / NOISE
        return np.concatenate([errors, (place - start) / spread])

    def importance(errors: Vector) -> Vector:
        robust = 1.0 / (1.0 + (errors[: len(measured)] / 3.0) ** 2)  # Cauchy: 3 × noise counts half
        return np.concatenate([weight * robust, np.ones(len(start))])

    def loss(errors: Vector) -> float:
        rows, beliefs_part = errors[: len(measured)], errors[len(measured) :]
        return float(np.sum(weight * 9.0 * np.log1p((rows / 3.0) ** 2)) + np.sum(beliefs_part**2))

    place, damping = start.copy(), 1e-2
    errors = residuals(place)
    best = loss(errors)
    for number in range(rounds):
        jacobian = np.empty((len(errors), len(place)))
        for i in range(len(place)):
            moved = place.copy()
            moved[i] += 1e-4
            jacobian[:, i] = (residuals(moved) - errors) / 1e-4
        w = importance(errors)
        normal = jacobian.T @ (w[:, None] * jacobian)
        gradient = jacobian.T @ (w * errors)
        improved = False
        for _ in range(8):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient)
            step = np.clip(step, -0.7, 0.7)
            trial = residuals(place + step)
            if loss(trial) < best:
                gain = best - loss(trial)
                place, errors, best = place + step, trial, loss(trial)
                damping = max(damping / 4, 1e-6)
                improved = True
                break
            damping *= 4
        if report is not None:
            report(number, best)
        if not improved or gain < 1e-4 * best:
            break
    return Fit(
        values=values_at(place),
        moved={
            prior.name: float((x - x0) / prior.spread)
            for prior, x, x0 in zip(beliefs, place, start, strict=True)
        },
        log_errors=np.log(predict_s(table, values_at(place))) - measured,
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
    """Who measured: what is left out together in cross-validation. Revisions of one table are one source."""
    place = run.row.get("url_or_path", "") or run.row.get("source", "")
    repository = re.match(r"(?:github:)?([\w.-]+/[\w.-]+)", place)
    return repository[1] if repository else re.split(r"[ :]", place)[0]


def leave_one_out(
    table: Table, beliefs: Sequence[Prior], *, only: Callable[[Run], bool] = lambda run: True
) -> dict[str, Vector]:
    """By source that holds a row of interest: the log errors of its rows under a fit that has not seen it."""
    sources = [source_of(run) for run in table.runs]
    errors = {}
    for source in sorted({s for s, run in zip(sources, table.runs, strict=True) if only(run)}):
        rest = fit(table.choose(lambda run: source_of(run) != source), beliefs, rounds=12)  # noqa: B023
        own = table.choose(lambda run: source_of(run) == source)  # noqa: B023
        errors[source] = np.log(predict_s(own, rest.values)) - np.log(own.step_s)
    return errors
