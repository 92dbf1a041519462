"""How sure an estimate of a step's time is: an interval that holds the measured time in four cases of five.

The half-width, on the scale of the logarithm, is a root of squares: a part that every estimate has, parts in
proportion to the shares of the step that are hard to predict (communication, idle stages, the host, experts),
and parts for distance from what the constants were fitted on (software, scale, precision of a generation). The
few parameters are in intervals.toml, fitted on errors of sources that the constants had not seen.
"""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from colossus.errors import ConfigError
from colossus.planner.estimate.columns import Array, Columns
from colossus.planner.estimate.step import StepParts, step_parts
from colossus.planner.evidence.calibrate import Fold, source_of, weights
from colossus.planner.evidence.published import Run, Table

CONFIDENCE: Final = 0.8
SHIPPED: Final = Path(__file__).parent / "intervals.toml"
COMMUNICATION: Final = ("tensor_s", "context_s", "shard_s", "data_s", "pipeline_s")
HOST: Final = ("launch_s", "fixed_s")
EXPERTS: Final = ("experts_s", "expert_s")


Box = Mapping[str, tuple[float, float]]
"""Smallest and largest of each of SIZES among measured runs."""
SIZES: Final = ("hidden", "sequence", "num_chips")


@dataclass(frozen=True, slots=True)
class Seen:
    """What the constants were fitted on."""

    boxes: Mapping[str, Mapping[str, Box]]
    """By software, then by generation of chips: the sizes that were measured."""
    num_sources: Mapping[str, int]
    """Sources by generation and precision: `hopper.bfloat16`."""

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Seen":
        points: dict[str, dict[str, list[list[float]]]] = {}
        sources: dict[str, set[str]] = {}
        for run, sizes in zip(runs, sizes_of(runs), strict=True):
            generation = run.node.chip.generation
            points.setdefault(run.stack.name, {}).setdefault(generation, []).append(sizes.tolist())
            sources.setdefault(f"{generation}.{run.precision}", set()).add(source_of(run))
        return cls(
            {
                stack: {
                    generation: dict(zip(SIZES, zip(np.min(at, 0), np.max(at, 0), strict=True), strict=True))
                    for generation, at in sorted(found.items())
                }
                for stack, found in sorted(points.items())
            },
            {name: len(found) for name, found in sorted(sources.items())},
        )

    def box(self, stack: str | None, generation: str) -> Box | None:
        """What was measured with this software on this generation; with a software of None, with any."""
        if stack is not None:
            return self.boxes.get(stack, {}).get(generation)
        found = [boxes[generation] for boxes in self.boxes.values() if generation in boxes]
        if not found:
            return None
        return {name: (min(x[name][0] for x in found), max(x[name][1] for x in found)) for name in SIZES}


def sizes_of(runs: Sequence[Run]) -> Array:
    """Float64[runs, SIZES]."""
    return np.array(
        [[run.model.hidden_size, float(run.execution.sequence), run.num_chips] for run in runs], dtype=float
    ).reshape(-1, len(SIZES))


@dataclass(frozen=True, slots=True)
class Distance(Columns):
    """How far candidates lie from what the constants were fitted on."""

    new_stack: Array
    """1 where the software was not measured on this generation, or is none of those (Colossus's own)."""
    doublings: Array
    """Doublings or halvings by which hidden size, sequence and chips lie outside what was measured with this
    software (a new one: with any) on this generation, added up."""
    few_sources: Array
    """1 / (1 + number of sources that measured this precision on this generation)."""

    @classmethod
    def of(
        cls,
        seen: Seen,
        generation: Sequence[str],
        precision: Sequence[str],
        stack: Sequence[str | None],
        sizes: Array,
    ) -> "Distance":
        """One entry for each candidate. A stack of None is the reference one, which nobody measured; `sizes` is
        Float64[candidates, SIZES]."""
        keys = list(zip(generation, stack, strict=True))
        boxes = {
            key: (found := seen.box(key[1], key[0]), found or seen.box(None, key[0])) for key in set(keys)
        }
        low = np.array(
            [[box[name][0] for name in SIZES] if (box := boxes[key][1]) else UNBOXED for key in keys]
        )
        high = np.array(
            [[box[name][1] for name in SIZES] if (box := boxes[key][1]) else UNBOXED for key in keys]
        )
        place = np.log2(sizes)
        outside = np.maximum(np.maximum(np.log2(low) - place, place - np.log2(high)), 0.0)
        return cls(
            new_stack=np.array([float(key[1] is None or boxes[key][0] is None) for key in keys]),
            doublings=np.sum(np.nan_to_num(outside), axis=-1),
            few_sources=np.array(
                [
                    1.0 / (1.0 + seen.num_sources.get(f"{made}.{name}", 0))
                    for made, name in zip(generation, precision, strict=True)
                ]
            ),
        )

    @classmethod
    def of_runs(cls, seen: Seen, runs: Sequence[Run]) -> "Distance":
        return cls.of(
            seen,
            [run.node.chip.generation for run in runs],
            [run.precision for run in runs],
            [run.stack.name for run in runs],
            sizes_of(runs),
        )


UNBOXED: Final = [math.nan] * len(SIZES)
"""A generation on which nothing was measured: `few_sources` says so already."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Half-widths, on the log scale, of the interval that holds with probability CONFIDENCE."""

    base: float
    """Of every estimate."""
    communication: float
    """For a step that is all exposed communication; less in proportion."""
    bubble: float
    host: float
    experts: float
    new_stack: float
    doubling: float
    """For each doubling of a size beyond what was measured."""
    few_sources: float
    """Where nobody measured this precision on this generation; half of it where one source did."""


PRIORS: Final = {
    "base": (0.06, "assumed: two measurements of one configuration differ by 2 to 5 %"),
    "communication": (0.30, "assumed: bandwidth reached varies by a third between fabrics"),
    "bubble": (0.20, "assumed: stages are seldom as even as counted"),
    "host": (0.50, "assumed: host speed and its jitter vary by half"),
    "experts": (0.30, "assumed: routing is uneven, grouped kernels differ"),
    "new_stack": (0.15, "assumed: softwares differ by 10 to 20 % on one layout"),
    "doubling": (0.05, "assumed: other shapes of kernels, one more tier of the network"),
    "few_sources": (0.20, "assumed: first measurements on a chip change by a fifth with software releases"),
}  # fmt: skip
"""Value and source of what is believed of each part before the errors are seen; each may move by a factor of
e^PRIOR_SPREAD."""
PRIOR_SPREAD: Final = 0.7


def features(parts: StepParts, distance: Distance) -> npt.NDArray[np.float64]:
    """What each field of Spread is multiplied with; shape (candidates, fields)."""
    total = parts.total_s

    def share(names: Sequence[str]) -> Array:
        return np.asarray(sum(getattr(parts, name) for name in names) / total)

    columns = (
        np.ones_like(total), share(COMMUNICATION), share(("bubble_s",)), share(HOST), share(EXPERTS),
        distance.new_stack, distance.doublings, distance.few_sources,
    )  # fmt: skip
    return np.stack(np.broadcast_arrays(*columns), axis=-1)


def half_width(spread: Spread, features: npt.NDArray[np.float64]) -> Array:
    """Half of the interval's width on the log scale."""
    values = np.array([getattr(spread, field.name) for field in fields(spread)])
    return np.asarray(np.sqrt(np.sum((features * values) ** 2, axis=-1)))


def interval(parts: StepParts, distance: Distance, spread: Spread | None = None) -> tuple[Array, Array]:
    """(Low, high) seconds between which the step's time lies with probability CONFIDENCE."""
    half = half_width(shipped()[0] if spread is None else spread, features(parts, distance))
    return parts.total_s * np.exp(-half), parts.total_s * np.exp(half)


def fit_spread(
    log_errors: npt.NDArray[np.float64],
    features: npt.NDArray[np.float64],
    importance: npt.NDArray[np.float64],
) -> Spread:
    """The spread with the least interval score (Gneiting and Raftery 2007: width, plus what is outside over half
    of the probability to be outside) plus the priors' part, by coordinate search on the log scale."""
    start = np.log([value for value, _ in PRIORS.values()])
    size = np.abs(log_errors)
    importance = importance / np.sum(importance)
    effective = 1.0 / np.sum(
        importance**2
    )  # rows that would count alike: what the priors are weighed against

    def score(place: npt.NDArray[np.float64]) -> float:
        half = np.sqrt(np.sum((features * np.exp(place)) ** 2, axis=-1))
        outside = np.maximum(size - half, 0.0)
        rows = np.sum(importance * (2.0 * half + 2.0 / (1.0 - CONFIDENCE) * outside))
        typical = 2.0 * np.sum(importance * size)
        return float(rows / typical + np.mean(((place - start) / PRIOR_SPREAD) ** 2) * len(start) / effective)

    place, stride = start.copy(), 0.4
    best = score(place)
    while stride > 1e-3:
        improved = False
        for i in range(len(place)):
            for sign in (1.0, -1.0):
                trial = place.copy()
                trial[i] += sign * stride
                found = score(trial)
                if found < best:
                    place, best, improved = trial, found, True
                    break
        stride = stride if improved else stride / 2.0
    return Spread(**dict(zip(PRIORS, np.exp(place).tolist(), strict=True)))


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Rows under fits that had not seen them, and how far they lay from what those fits had seen.

    Of two kinds: rows of a source that was left out whole, and rows whose configuration was left out while
    others of its source were not. The first are far from what was fitted, the second near: both are needed to
    find how the width grows with distance.
    """

    runs: Sequence[Run]
    source_left_out: npt.NDArray[np.bool_]
    log_errors: npt.NDArray[np.float64]
    features: npt.NDArray[np.float64]

    @classmethod
    def of(cls, runs: Sequence[Run], parts: StepParts, left_out: Sequence[Fold], by_source: int) -> "LeftOut":
        """`parts` and `runs` are of one length; the first `by_source` folds left sources out."""
        order = np.concatenate([fold.rows for fold in left_out])
        matrices = []
        for fold in left_out:
            own = set(fold.rows.tolist())
            seen = Seen.of([run for i, run in enumerate(runs) if i not in own])
            chosen = [runs[int(i)] for i in fold.rows]
            matrices.append(features(parts.take(fold.rows), Distance.of_runs(seen, chosen)))
        return cls(
            [runs[int(i)] for i in order],
            np.arange(len(order)) < sum(len(fold.rows) for fold in left_out[:by_source]),
            np.concatenate([fold.log_errors for fold in left_out]),
            np.concatenate(matrices),
        )

    @property
    def importance(self) -> Array:
        """As in the fit of the constants; both kinds count alike."""
        first = self.source_left_out
        both = np.zeros(len(self.runs))
        for chosen in (first, ~first):
            own = weights([self.runs[int(i)] for i in np.flatnonzero(chosen)])
            both[chosen] = own / np.sum(own)
        return both

    def fit(self) -> Spread:
        return fit_spread(self.log_errors, self.features, self.importance)

    def coverage(self) -> dict[str, float]:
        """Percent of the rows inside intervals whose spread was fitted on other sources alone: by source that
        was left out, of `unseen sources` and of `unseen configurations` of seen sources."""
        sources = np.array([source_of(run) for run in self.runs])
        names = sorted(set(sources[self.source_left_out].tolist()))
        if len(names) < 2:
            return {}
        importance = self.importance
        inside = np.zeros(len(self.runs), dtype=bool)
        for source in sorted(set(sources.tolist())):
            own, rest = sources == source, sources != source
            spread = fit_spread(self.log_errors[rest], self.features[rest], importance[rest])
            inside[own] = np.abs(self.log_errors[own]) <= half_width(spread, self.features[own])

        def percent(chosen: npt.NDArray[np.bool_]) -> float:
            return 100.0 * float(np.sum(importance * inside * chosen) / np.sum(importance * chosen))

        return {
            **{source: percent((sources == source) & self.source_left_out) for source in names},
            "unseen sources": percent(self.source_left_out),
            "unseen configurations": percent(~self.source_left_out),
        }


def fitted(
    table: Table, values: Mapping[str, float], left_out: Sequence[Fold], num_sources: int
) -> tuple[Spread, Seen, dict[str, float]]:
    """(The spread for these constants, what they have seen, coverage on what they have not).

    The first `num_sources` folds left out sources, the others configurations.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = step_parts(table.shape, table.execution, table.hardware, table.constants(values))
    unseen = LeftOut.of(table.runs, parts, left_out, num_sources)
    return unseen.fit(), Seen.of(table.runs), unseen.coverage()


# --- the file ---

HEAD: Final = """\
# How wide the intervals of the estimate of a step's time are: half-widths on the log scale (0.1: about 10 %) of
# the interval that holds four times of five, added as squares. Fitted by `colossus calibrate --intervals` on
# errors of rows that the constants had not seen, half of the weight on sources that were left out whole, half on
# configurations of which the source had others. prior: what was believed before, from `source`.
"""


def intervals_toml(spread: Spread, seen: Seen, *, date: str, coverage: Mapping[str, float]) -> str:
    """A file of intervals for people to read, and for `read`."""
    lines = [HEAD, f"date = {json.dumps(date)}", f"confidence = {CONFIDENCE}"]
    for name, (prior, source) in PRIORS.items():
        lines += ["", f"[spread.{name}]", f"value = {getattr(spread, name):.4g}", f"prior = {prior:g}"]
        lines.append(f"source = {json.dumps(source)}")
    lines += ["", "# What the constants were fitted on: smallest and largest, by software and generation."]
    for stack, boxes in seen.boxes.items():
        for generation, box in boxes.items():
            lines.append(f"[seen.sizes.{json.dumps(stack)}.{json.dumps(generation)}]")
            lines += [f"{name} = [{low:.17g}, {high:.17g}]" for name, (low, high) in box.items()]
    lines += ["", "# Sources by generation and precision.", "[seen.num_sources]"]
    lines += [f"{json.dumps(k)} = {v}" for k, v in seen.num_sources.items()]
    lines += ["", "# Percent of the rows inside, counted by importance; the spread had not seen the source."]
    lines += ["[coverage]", *(f"{json.dumps(name)} = {value:.1f}" for name, value in coverage.items())]
    return "\n".join(lines) + "\n"


def read(path: Path) -> tuple[Spread, Seen]:
    """A file of intervals. Raises ConfigError where it is none."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        values = {name: _positive(table["spread"][name]["value"]) for name in PRIORS}
        boxes = {
            stack: {
                generation: {name: (_positive(box[name][0]), _positive(box[name][1])) for name in SIZES}
                for generation, box in found.items()
            }
            for stack, found in table["seen"]["sizes"].items()
        }
        num_sources = {name: int(_positive(value)) for name, value in table["seen"]["num_sources"].items()}
        return Spread(**values), Seen(boxes, num_sources)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the intervals {path}: {error}") from None
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path} is no file of intervals ({error}); calibrate --intervals writes one"
        ) from None


def _positive(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{value} is not a positive number")
    return number


@cache
def shipped() -> tuple[Spread, Seen]:
    """The intervals that come with Colossus, and what its constants were fitted on."""
    return read(SHIPPED)
