"""How well the planner's estimate matches published runs, on rows that were fitted and on rows that were not.

    python benchmarks/planner_accuracy.py RUNS.csv [MORE.csv ...]

Fits the constants anew without each source and without each quarter of the configurations (two minutes on one
core), judges the shipped constants on all rows, and writes benchmarks/planner_accuracy.md.
"""

import argparse
import hashlib
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from colossus.planner.evidence import intervals
from colossus.planner.evidence.calibrate import (
    Fold,
    by_configuration,
    by_source,
    fit,
    leave_out,
    priors,
    summary,
    usable,
)
from colossus.planner.evidence.published import Run, Table
from colossus.planner.evidence.validate import (
    DIMENSIONS,
    Comparison,
    compare,
    express,
    ranking,
    read_tables,
    report,
)

HERE = Path(__file__).parent
HEADS = ("rows", "MAPE", "median", "p90", "bias")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", type=Path, metavar="FILE.csv")
    parser.add_argument("--out", type=Path, default=HERE / "planner_accuracy.md")
    given = parser.parse_args()
    started = time.process_time()
    rows = read_tables(given.tables)
    found = compare(rows)
    runs = [run for run in express(rows)[0] if usable(run)]
    table = Table.of(runs)
    beliefs = priors()
    fitted = fit(table, beliefs)
    sources = by_source(runs)
    folds = leave_out(table, beliefs, {**sources, **by_configuration(runs)}, report=print)
    unseen, seen = folds[: len(sources)], folds[len(sources) :]
    coverage = intervals.fitted(table, fitted.values, folds, len(sources))[2]
    lines = [
        "# Accuracy of the planner's estimate",
        "",
        f"{date.today()}. {processor()}, Python {platform.python_version()}, numpy {np.__version__}; "
        f"{time.process_time() - started:.0f} s of CPU time. Command: `python benchmarks/planner_accuracy.py "
        + " ".join(path.name for path in given.tables)
        + "`.",
        "",
        *(
            f"* {path.name}: sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
            for path in given.tables
        ),
        "",
        "Errors are of the predicted step time, in percent of the measured one: mean of the sizes (MAPE), median, "
        "p90 (nine rows of ten are closer), bias. Each row is predicted from its layout alone.",
        "",
        "## The shipped constants, on all rows",
        "",
        "Most of these rows were fitted; what follows below were not.",
        "",
        *judged(found),
        "## Rows that the constants had not seen",
        "",
        "Sources: the constants are fitted without any row of the source. Configurations: they are fitted without a "
        "quarter of the configurations, of which the source has others. Rows of tier A and B.",
        "",
        *left_out(runs, unseen, seen),
        "## Intervals",
        "",
        "Rows whose measured time lies in the 80 % interval, in percent, counted by their weight in the fit. Neither "
        "the constants nor the widths had seen the source (the last line: the configuration, and the widths the "
        "source).",
        "",
        *markdown(
            ("left out", "in the interval"), [(name, f"{value:.0f}") for name, value in coverage.items()]
        ),
    ]
    given.out.write_text("\n".join(lines), encoding="utf-8")
    print(f"wrote {given.out} ({time.process_time() - started:.0f} s of CPU time)")


def judged(found: Comparison) -> list[str]:
    """Errors by dimension, ranking, verdicts and memory."""
    told = report(found)
    rows = [("all", "", *numbers(told), percent(told["interval_coverage"]))]
    for dimension, entries in told["by"].items():
        rows += [
            (dimension, name, *numbers(entry), percent(entry["interval_coverage"]))
            for name, entry in entries.items()
        ]
    rank, oom, memory = told["ranking"], told["oom"], told["memory"]
    lines = markdown(("by", "", *HEADS, "in interval"), rows)
    lines += [
        f"* Ranking: {rank['groups']} runs measured in three layouts or more, {rank['layouts']} layouts. Rank "
        f"correlation {decimal(rank['spearman'])}; the layout that is ranked first is {decimal(rank['regret_mean'])} % "
        f"slower than the measured best on average, {decimal(rank['regret_max'])} % at most.",
        f"* Out of memory: {percent(oom['accuracy'])} % of {oom['num_out_of_memory'] + oom['num_ran']} verdicts right; "
        f"{percent(oom['recall'])} % of {oom['num_out_of_memory']} overflows found, {percent(oom['precision'])} % of "
        "warnings true.",
        f"* Memory: {memory['n']} published peaks, median error {percent(memory['median'])} %, MAPE "
        f"{percent(memory['mape'])} %, bias {percent(memory['bias'])} %.",
        f"* Skipped: {told['skipped']} of {told['rows']} rows. "
        + "; ".join(f"{those['count']} {reason}" for reason, those in told["skipped_reasons"].items())
        + ".",
        "",
        "Where the ranking costs most:",
        "",
    ]
    worst = sorted(ranking(found), key=lambda group: -group.regret)[:8]
    return lines + markdown(
        ("run", "layouts", "rank correlation", "regret %"),
        [(g.name, str(g.num_layouts), decimal(g.spearman), f"{100 * g.regret:.1f}") for g in worst],
    )


def left_out(runs: Sequence[Run], unseen: Sequence[Fold], seen: Sequence[Fold]) -> list[str]:
    errors = {"sources": whole(len(runs), unseen), "configurations": whole(len(runs), seen)}
    names: Mapping[str, Callable[[Run], str]] = {
        "": lambda run: "all",
        "tier A": lambda run: run.node.chip.generation if run.row.get("tier") == "A" else "",
        **DIMENSIONS,
    }
    rows = []
    for dimension, name_of in names.items():
        labels = np.array([name_of(run) for run in runs])
        for label in sorted(set(labels.tolist()) - {""}):
            cells = [
                numbers(summary(error[chosen]))
                if (chosen := (labels == label) & ~np.isnan(error)).any()
                else ["-"] * 5
                for error in errors.values()
            ]
            rows.append((dimension, label, *cells[0], *cells[1][1:]))
    heads = ("by", "", *HEADS, *(f"configurations: {head}" for head in HEADS[1:]))
    return markdown(heads, rows)


def whole(num_runs: int, folds: Sequence[Fold]) -> Any:
    """Float64[runs]: the log error of each under the fit that had not seen it."""
    errors = np.full(num_runs, np.nan)
    for fold in folds:
        errors[fold.rows] = fold.log_errors
    return errors


def numbers(entry: Mapping[str, Any]) -> list[str]:
    return [str(entry["n"]), *(percent(entry[name]) for name in ("mape", "median", "p90", "bias"))]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    right = ["---:" if rows and re.fullmatch(r"-?[\d.]+", rows[0][i]) else "---" for i in range(len(heads))]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, right, *rows)] + [""]


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
