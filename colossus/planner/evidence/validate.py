"""The estimate against published runs: each row is predicted from its layout alone and set beside what was measured.

`compare` predicts, `report` judges: errors of step time and memory, how often the interval holds, verdicts on
what fits, and how well layouts of one run are ranked. Errors are in percent of what was measured.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from colossus.errors import ConfigError, did_you_mean
from colossus.planner.estimate.columns import Array
from colossus.planner.estimate.constants import shipped
from colossus.planner.estimate.execution import RECOMPUTE, Execution
from colossus.planner.estimate.memory import Held, MemoryParts, fits, memory_parts
from colossus.planner.estimate.step import StepParts, step_parts
from colossus.planner.evidence import intervals
from colossus.planner.evidence.calibrate import offloads, source_of
from colossus.planner.evidence.published import Inexpressible, Run, Table, read_rows, run_of
from colossus.spec.model import ModelSpec

Rows = Sequence[Mapping[str, str]]
Mask = npt.NDArray[np.bool_]
MIN_LAYOUTS: Final = 3
"""Layouts of a group from which it is ranked: of two, an order says little."""
SCALES: Final = ((8, "1-8"), (64, "9-64"), (512, "65-512"), (4096, "513-4,096"), (math.inf, "over 4,096"))
"""Buckets of chips."""
MOST: Final = {
    "n_gpus": 1e7,
    "global_batch_seqs": 1e9,
    "seq_len": 1e9,
    "n_layers": 1e5,
    "hidden": 1e7,
    "vocab": 1e9,
}
"""Larger numbers are mistakes, which a mean must not be drowned by."""
MOST_STEP_S: Final = 1e6


# --- rows ---


def read_tables(paths: Sequence[Path]) -> list[dict[str, str]]:
    """The rows of several tables, one after the other. Raises ConfigError where one is none, or all are empty."""
    rows = [row for path in paths for row in read_rows(path)]
    if not rows:
        raise ConfigError(f"there are no rows in {', '.join(map(str, paths))}: only a header")
    return rows


def select(rows: Rows, conditions: Sequence[str]) -> list[Mapping[str, str]]:
    """The rows where all conditions hold: `gpu=H100-SXM|H200,tier=A`. Raises ConfigError for an unknown column, and
    where no row is left."""
    chosen = list(rows)
    columns = {name for row in rows for name in row}
    for condition in [part for text in conditions for part in re.split(r",(?=[^,=|]+=)", text)]:
        name, equals, values = (part.strip() for part in condition.partition("="))
        if not equals:
            raise ConfigError(
                f"{condition!r} selects nothing; write COLUMN=VALUE, as in gpu=H100-SXM|H200,tier=A"
            )
        if name not in columns:
            raise ConfigError(f"there is no column {name!r}." + did_you_mean(name, columns))
        wanted = {value.strip().casefold() for value in values.split("|")}
        left = [row for row in chosen if row.get(name, "").casefold() in wanted]
        if not left:
            known = sorted({row.get(name, "") or "(empty)" for row in chosen})
            raise ConfigError(
                f"no row has {name}={values}; there {'are' if len(known) > 1 else 'is'} {', '.join(known[:12])}"
                + (f" and {len(known) - 12} more" if len(known) > 12 else "")
            )
        chosen = left
    return chosen


# --- step time from published FLOP/s ---


def step_flops(convention: str, model: ModelSpec, sequences: int, sequence: int) -> float | None:
    """FLOPs of one step as a published FLOP/s counts them; None where `convention` says too little to know.

    With B sequences of s tokens, L layers, width h, vocabulary V and N parameters:
    "SC21", with recompute: 96·B·s·L·h²·(1 + s/6h + V/16Lh); without: 72·B·s·L·h²·(1 + s/6h + V/12Lh)
    (arXiv:2104.04473 section 5.1, arXiv:2205.05198 appendix A). "6N" with the whole square of attention:
    B·s·(6N + 12·L·h·s); with its causal half: B·s·(6N + 6·L·h·s) (arXiv:2204.02311 appendix B).
    """
    text = convention.lower()
    layers, hidden, vocab = model.num_layers, model.hidden_size, model.vocab_size
    tokens = float(sequences) * sequence
    square = tokens * layers * hidden**2
    if "older calculator" in text:
        return None
    if re.search(r"72\s*\*?\s*bl?sl?h\^2|72bls|(megatron|sc21).*without recompute", text):
        return 72 * square * (1 + sequence / (6 * hidden) + vocab / (12 * layers * hidden))
    if re.search(r"96\s*\*?\s*b|hardware.*(incl|formula|recompute)", text):
        return 96 * square * (1 + sequence / (6 * hidden) + vocab / (16 * layers * hidden))
    if re.search(r"\b6n\b.*(12\s*\*?\s*l\s*\*?\s*[dh]\s*\*?\s*s)", text):
        return tokens * (6 * model.num_active_params() + 12 * layers * hidden * sequence)
    if re.search(r"\b6n\b.*6\s*\*?\s*s\^2", text):
        return tokens * (6 * model.num_active_params() + 6 * layers * hidden * sequence)
    return None


def timed(run: Run) -> Run:
    """The run with a step time where only FLOP/s per chip were published, in a known convention."""
    if run.step_s > 0 or run.out_of_memory:
        return run
    try:
        rate = float(run.row.get("metric_tflops_per_gpu", "") or "nan") * 1e12
    except ValueError:
        return run
    x = run.execution
    sequences = round(float(x.micro_batch) * float(x.micro_batches) * float(x.data))
    flops = step_flops(run.row.get("flops_convention", ""), run.model, sequences, int(x.sequence))
    if flops is None or not (rate > 0 and math.isfinite(rate)):
        return run
    return replace(run, step_s=flops / (rate * run.num_chips))


# --- predictions ---


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows, and predictions of those that can be expressed."""

    rows: Rows
    places: npt.NDArray[np.int64]
    """Where each run stands among the rows."""
    table: Table
    parts: StepParts
    low_s: Array
    high_s: Array
    memory_bytes: Array
    fits: Mask
    skipped: Mapping[int, str]
    """Why a row's time is not compared, by its place: it cannot be expressed, or no time was published."""

    @property
    def runs(self) -> Sequence[Run]:
        return self.table.runs

    @property
    def timed(self) -> Mask:
        """Runs whose step time is compared."""
        return (
            np.array([int(place) not in self.skipped for place in self.places], dtype=bool) & ~self.overflowed
        )

    @property
    def overflowed(self) -> Mask:
        """Runs that ran out of memory, as published."""
        return np.array([run.out_of_memory for run in self.runs], dtype=bool)

    @property
    def log_errors(self) -> Array:
        """Of predicted over measured step time; NaN where none was measured."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.log(self.parts.total_s / self.table.step_s))

    @property
    def inside(self) -> Mask:
        """Where the interval holds the measured time."""
        return np.asarray((self.low_s <= self.table.step_s) & (self.table.step_s <= self.high_s))


def express(rows: Rows) -> tuple[list[Run], list[int], dict[int, str]]:
    """(Runs, their places among the rows, why the others are none, by place)."""
    skipped: dict[int, str] = {}
    runs: list[Run] = []
    places: list[int] = []
    for place, row in enumerate(rows):
        try:
            run = run_of(row)
            beyond = next((name for name, most in MOST.items() if float(row.get(name, "") or 0) > most), None)
            if beyond:
                raise Inexpressible(f"{beyond} is {row[beyond]}, beyond any run")
            if run.step_s > MOST_STEP_S or run.step_s < 1 / MOST_STEP_S:
                raise Inexpressible(f"a step of {run.step_s:.3g} s is none that was measured")
            if offloads(row):
                raise Inexpressible("the optimizer runs on the host")
        except Exception as error:  # whatever one row holds, it costs that row and no other
            skipped[place] = reason_of(error)
            continue
        runs.append(run)
        places.append(place)
    return runs, places, skipped


def none_expressed(num_rows: int, skipped: Mapping[int, str]) -> str:
    common, count = Counter(skipped.values()).most_common(1)[0]
    return f"none of the {num_rows} rows can be expressed; {count} of them because: {common}"


def compare(
    rows: Rows,
    values: Mapping[str, float] | None = None,
    spread: tuple[intervals.Spread, intervals.Seen] | None = None,
) -> Comparison:
    """Predicts each row with these constants and intervals (the shipped ones). Raises ConfigError where no row at
    all can be expressed."""
    runs, places, skipped = express(rows)
    runs = [timed(run) for run in runs]
    for place, run in zip(places, runs, strict=True):
        if not run.out_of_memory and not run.step_s > 0:
            skipped[place] = "no time published"
    if not runs:
        raise ConfigError(none_expressed(len(rows), skipped))
    table = Table.of(runs)
    with np.errstate(all="ignore"):
        parts = step_parts(
            table.shape,
            table.execution,
            table.hardware,
            table.constants(shipped() if values is None else values),
        )
        known, seen = intervals.shipped() if spread is None else spread
        low_s, high_s = intervals.interval(parts, intervals.Distance.of_runs(seen, runs), known)
        held = Held.of_stacks(table.execution, [f"{run.stack.name}/{run.precision}" for run in runs])
        memory_bytes = as_measured(memory_parts(table.shape, table.execution, held), runs)
        capacity = np.array([run.node.chip.memory_bytes for run in runs], dtype=float)
        fitting = fits(table.shape, _most_recomputed(table.execution, runs), capacity, held)
    total_s = parts.total_s
    for i, place in enumerate(places):
        if not (math.isfinite(total_s[i]) and total_s[i] > 0 and math.isfinite(memory_bytes[i])):
            skipped[place] = "its sizes are beyond what the estimate can count"
    return Comparison(
        rows,
        np.array(places),
        table,
        parts,
        low_s,
        high_s,
        memory_bytes,
        fitting,
        dict(sorted(skipped.items())),
    )


def as_measured(parts: MemoryParts, runs: Sequence[Run]) -> Array:
    """Bytes as each row's notes say that they were counted: tensors (max_memory_allocated), all that the process holds
    (nvidia-smi), else what the allocator reserved, which is what most trainers log."""
    notes = [run.row.get("notes", "").lower() for run in runs]
    allocated = np.array(["max allocated" in note or "max_memory_allocated" in note for note in notes])
    whole = np.array(["nvidia-smi" in note for note in notes])
    return np.where(
        allocated, parts.allocated_bytes, np.where(whole, parts.total_bytes, parts.reserved_bytes)
    )


def _most_recomputed(execution: Execution, runs: Sequence[Run]) -> Execution:
    """A row that does not say what is computed again can have run with anything: it fits if full recompute fits."""
    unstated = np.array([not run.row.get("recompute") and not run.out_of_memory for run in runs])
    full = float(RECOMPUTE.index("full"))
    return replace(execution, recompute=np.where(unstated, full, execution.recompute))


def reason_of(error: Exception) -> str:
    """One sentence, short enough for a table."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    told = getattr(error, "errors", None)
    if callable(told):  # pydantic's: a list of what is wrong with a model's fields
        first = told()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the model'}: {first['msg']}"[:160]
    return " ".join((str(error) or type(error).__name__).split())[:160]


# --- judgement ---


def summary(relative: Array, inside: Mask | None = None) -> dict[str, Any]:
    """Errors in percent of what was measured, from relative ones (predicted / measured − 1); None where there is
    no row."""
    size = np.abs(relative) * 100.0
    some = len(size) > 0
    found: dict[str, Any] = {
        "n": len(size),
        "mape": float(np.mean(size)) if some else None,
        "median": float(np.median(size)) if some else None,
        "p90": float(np.percentile(size, 90)) if some else None,
        "bias": float(np.mean(relative)) * 100.0 if some else None,
    }
    if inside is not None:
        found["interval_coverage"] = float(np.mean(inside)) * 100.0 if some else None
    return found


def scale_of(num_chips: int) -> str:
    return next(name for most, name in SCALES if num_chips <= most)


DIMENSIONS: Final[Mapping[str, Callable[[Run], str]]] = {
    "source": source_of,
    "gpu": lambda run: run.row["gpu"],
    "precision": lambda run: run.precision,
    "family": lambda run: run.row.get("family", "") or "(unstated)",
    "scale": lambda run: scale_of(run.num_chips),
}


def report(found: Comparison) -> dict[str, Any]:
    """What `colossus validate --json` prints: every error, regret, share and coverage in percent; None where
    nothing was there to judge."""
    chosen = found.timed
    relative = np.expm1(found.log_errors)
    groups = ranking(found)
    by: dict[str, dict[str, Any]] = {}
    for dimension, name_of in DIMENSIONS.items():
        names = np.array([name_of(run) for run in found.runs])
        order = sorted(set(names[chosen].tolist())) if dimension != "scale" else [
            name for _, name in SCALES if (chosen & (names == name)).any()
        ]  # fmt: skip
        by[dimension] = {
            name: summary(relative[chosen & (names == name)], found.inside[chosen & (names == name)])
            for name in order
        }
    reasons: dict[str, list[str]] = {}
    for place, reason in found.skipped.items():
        reasons.setdefault(reason, []).append(found.rows[place].get("id", ""))
    return {
        **summary(relative[chosen], found.inside[chosen]),
        "rows": len(found.rows),
        "skipped": len(found.skipped),
        "skipped_reasons": {
            reason: {"count": len(ids), "ids": ids}
            for reason, ids in sorted(reasons.items(), key=lambda entry: -len(entry[1]))
        },
        "memory": _memory(found),
        "oom": _verdicts(found),
        "ranking": {
            "groups": len(groups),
            "layouts": sum(group.num_layouts for group in groups),
            "spearman": _mean([group.spearman for group in groups if group.spearman is not None]),
            "regret_mean": _mean([group.regret * 100.0 for group in groups]),
            "regret_max": max((group.regret * 100.0 for group in groups), default=None),
        },
        "by": by,
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _memory(found: Comparison) -> dict[str, Any]:
    measured = np.array([run.memory_bytes for run in found.runs])
    with np.errstate(invalid="ignore"):
        known = (measured > 0) & np.isfinite(found.memory_bytes)
    return summary(found.memory_bytes[known] / measured[known] - 1.0)


def _verdicts(found: Comparison) -> dict[str, Any]:
    """ "Out of memory" is what is to be found: precision of what was called so, recall of what was."""
    known = np.isfinite(found.memory_bytes)
    called, was = ~found.fits & known, found.overflowed & known
    both = int(np.sum(called & was))

    def percent(part: int, whole: int) -> float | None:
        return 100.0 * part / whole if whole else None

    def ids(mask: Mask) -> list[str]:
        return [found.runs[int(i)].row.get("id", "") for i in np.flatnonzero(mask)]

    return {
        "num_out_of_memory": int(np.sum(was)),
        "num_ran": int(np.sum(known & ~was)),
        "precision": percent(both, int(np.sum(called))),
        "recall": percent(both, int(np.sum(was))),
        "accuracy": percent(int(np.sum((called == was) & known)), int(np.sum(known))),
        "missed": ids(was & ~called),
        "false_alarms": ids(called & ~was),
    }


# --- ranking ---

LAYOUT: Final = (
    "tp", "pp", "chunks", "cp", "data", "shard", "sharding", "ep", "expert_tp", "micro_batch", "recompute",
    "sequence_parallel",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Group:
    """Layouts of one run: the same model, chips, batch, sequence, precision and software."""

    name: str
    num_layouts: int
    spearman: float | None
    """Rank correlation of predicted with measured times; None where all were measured alike."""
    regret: float
    """How much longer the layout that was ranked first took than the best that was measured, as a share of that."""


def ranking(found: Comparison) -> list[Group]:
    """The groups of rows that differ in nothing but their layout; recompute belongs to the layout."""
    members: dict[tuple[Any, ...], dict[tuple[float, ...], list[int]]] = {}
    for i in np.flatnonzero(found.timed):
        run = found.runs[int(i)]
        layout = tuple(float(getattr(run.execution, name)) for name in LAYOUT)
        members.setdefault(same_run(run), {}).setdefault(layout, []).append(int(i))
    groups = []
    predicted, measured = found.parts.total_s, found.table.step_s
    for key, layouts in members.items():
        if len(layouts) < MIN_LAYOUTS:
            continue
        # A layout that was measured several times counts once.
        guess = np.array([np.median(predicted[rows]) for rows in layouts.values()])
        truth = np.array([np.median(measured[rows]) for rows in layouts.values()])
        name = f"{key[1]} on {key[3]} {key[2]}, batch {key[4]}, {key[5]} tokens"
        groups.append(Group(name, len(layouts), spearman(guess, truth), regret(guess, truth)))
    return groups


def same_run(run: Run) -> tuple[Any, ...]:
    """What rows have in common that differ in their layout alone."""
    row, x = run.row, run.execution
    kernel = re.search(r"kernel: ([^;]*)", row.get("notes", ""))
    software = [x.flash, x.fused, x.few_launches, x.score_traffic, x.overlap_data, x.overlap_tensor]
    return (
        source_of(run), row["model_name"], row["gpu"], run.num_chips, row["global_batch_seqs"], row["seq_len"],
        run.precision, row.get("framework", ""), kernel and kernel[1], run.model.num_layers,
        run.model.hidden_size, run.model.attention.num_heads, run.model.vocab_size,
        float(run.hardware.nic_bandwidth), tuple(map(float, software)), section_of(row),
    )  # fmt: skip


def section_of(row: Mapping[str, str]) -> str:
    """The part of a source that a row stands in: a table, a sheet, a section. Sections were measured at different
    times, with different versions of the code; what stands in brackets and a trial's number tell single rows."""
    return re.sub(r"\s*(\([^)]*\)|\b(trial|row|line|run) #?\d+)", "", row.get("source", "")).strip()


def ranks(values: Array) -> Array:
    """Places in ascending order from 1; equal values share the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2.0)[group])


def spearman(a: Array, b: Array) -> float | None:
    """Pearson's correlation of the ranks. None where `b` is the same throughout; 0 where only `a` is."""
    x, y = ranks(a) - np.mean(ranks(a)), ranks(b) - np.mean(ranks(b))
    if not y.any():
        return None
    return float(np.sum(x * y) / np.sqrt(np.sum(x**2) * np.sum(y**2))) if x.any() else 0.0


def regret(predicted: Array, measured: Array) -> float:
    """How much longer the choice takes than the best, as a share of the best; of equal guesses the mean counts."""
    chosen = measured[predicted == predicted.min()]
    return float(np.mean(chosen) / measured.min() - 1.0)


# --- row by row ---


def details(found: Comparison) -> list[dict[str, Any]]:
    """One entry for each row of the table, in its order; empty text where there is nothing to say."""
    run_at = {int(place): i for i, place in enumerate(found.places)}
    names = [field.name for field in fields(StepParts)]
    columns = {name: np.broadcast_to(getattr(found.parts, name), found.low_s.shape) for name in names}
    timed_rows, total_s, overflowed = found.timed, found.parts.total_s, found.overflowed
    listed = []
    for place, row in enumerate(found.rows):
        entry: dict[str, Any] = {
            name: row.get(name, "")
            for name in ("id", "source", "model_name", "gpu", "n_gpus", "precision", "tier")
        }
        i = run_at.get(place)
        if i is not None:
            run = found.runs[i]
            compared = bool(timed_rows[i])
            entry |= {
                "measured_s": run.step_s if compared else "",
                "predicted_s": float(total_s[i]),
                "low_s": float(found.low_s[i]),
                "high_s": float(found.high_s[i]),
                "error_percent": 100.0 * float(total_s[i] / run.step_s - 1.0) if compared else "",
                **{name: float(column[i]) for name, column in columns.items()},
                "measured_memory_gib": run.memory_bytes / 2**30 if run.memory_bytes > 0 else "",
                "predicted_memory_gib": float(found.memory_bytes[i]) / 2**30,
                "verdict": "fits" if found.fits[i] else "out of memory",
                "published_verdict": "out of memory" if overflowed[i] else "ran",
            }
        listed.append({**entry, "skipped": found.skipped.get(place, "")})
    return listed
