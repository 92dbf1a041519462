"""`colossus calibrate`: fit the constants of the estimate to published measurements."""

from pathlib import Path
from typing import Annotated, Any

import typer

EPILOG = """\b
Examples:
  colossus calibrate runs.csv --out constants.toml
  colossus calibrate runs.csv more.csv --out constants.toml --cross-validate
  colossus calibrate runs.csv --out constants.toml --intervals intervals.toml --replace
  colossus validate runs.csv --constants constants.toml
"""


def calibrate(
    tables: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Tables of published runs, as CSV.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.toml", help="Where the constants are written.")],
    priors: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml", help="Priors: a file of constants. [those of the shipped constants]"
        ),
    ] = None,
    cross_validate: Annotated[
        bool,
        typer.Option("--cross-validate", help="Also fit without each source, and tell the errors on it."),
    ] = False,
    intervals: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="Write how wide the estimate's intervals are, too; fits without each source, and without each "
            "quarter of the configurations.",
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write over files that exist.")] = False,
) -> None:
    """Fit the constants of the estimate to published measurements.

    Each constant starts from a prior with a source. The file that is written tells its value, how far it moved,
    how strongly the measurements decide it, and the errors by source. Rows of tier A count in full, of tier B
    half, others not at all.
    """
    import hashlib
    from datetime import date

    from colossus.cli.plan_files import refuse_no_place
    from colossus.cli.screen import screen
    from colossus.errors import ConfigError
    from colossus.planner.evidence import calibrate as fitting
    from colossus.planner.evidence import intervals as spreads
    from colossus.planner.evidence.published import Run, Table, read_rows
    from colossus.planner.evidence.validate import express, none_expressed

    for path in (out, intervals):
        if path is not None:
            refuse_no_place("the output", path)
        if path is not None and path.exists() and not replace:
            raise ConfigError(f"{path} exists; choose another name, or say --replace to write over it")
        if path is not None and path.resolve() in {table.resolve() for table in tables}:
            raise ConfigError(f"{path} is one of the tables that are read; write to another file")
    beliefs = fitting.priors(priors)
    runs: list[Run] = []
    files = []
    for path in tables:
        rows = read_rows(path)
        own, _, skipped = express(rows)
        if rows and not own:
            raise ConfigError(f"{path}: {none_expressed(len(rows), skipped)}")
        used = [run for run in own if fitting.usable(run)]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append(fitting.TableFile(path.name, digest, len(rows), len(used)))
        runs += used
    if not runs:
        raise ConfigError(
            "there is nothing to fit: no row of tier A or B has a published step time and can be expressed"
        )
    told = screen(stderr=True)
    table = Table.of(runs)
    told.print(f"fitting {len(beliefs)} constants to {len(runs):,} runs")
    result = fitting.fit(table, beliefs)
    folds, num_sources = [], 0
    if cross_validate or intervals is not None:
        groups = fitting.by_source(runs)
        if len(groups) < 2:
            raise ConfigError("cross-validation leaves out one source at a time; the tables hold only one")
        num_sources = len(groups)
        if intervals is not None:
            groups |= fitting.by_configuration(runs)
        folds = fitting.leave_out(table, beliefs, groups, report=lambda name: told.print(f"without {name}"))
    today = date.today().isoformat()
    errors = {fold.name: fold.log_errors for fold in folds[:num_sources]}
    text = fitting.constants_toml(result, beliefs, runs, files, date=today, left_out=errors)
    fitting.write_whole(out, text, replace=replace)
    if intervals is not None:
        spread, seen, coverage = spreads.fitted(table, result.values, folds, num_sources)
        text = spreads.intervals_toml(spread, seen, date=today, coverage=coverage)
        fitting.write_whole(intervals, text, replace=replace)
    screen().print(_summary(result, beliefs, runs, errors))
    for path in (out, intervals):
        if path is not None:
            typer.echo(f"wrote {path}")


def _summary(result: Any, beliefs: Any, runs: Any, left_out: Any) -> Any:
    import numpy as np
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from colossus.planner.evidence.calibrate import source_of, summary

    errors = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("source", "runs", "MAPE %", "median %", "p90 %", "left out: MAPE %", "median %"):
        errors.add_column(name, justify="left" if name == "source" else "right")
    sources = np.array([source_of(run) for run in runs])

    def add(name: str, own: Any, unseen: Any, style: str = "") -> None:
        fitted, other = summary(own), summary(unseen) if unseen is not None and len(unseen) else None
        cells = [f"{fitted[key]:.1f}" for key in ("mape", "median", "p90")]
        cells += [f"{other[key]:.1f}" if other else "-" for key in ("mape", "median")]
        errors.add_row(Text(name), f"{fitted['n']:,}", *cells, style=style)

    add("all", result.log_errors, np.concatenate(list(left_out.values())) if left_out else None, "bold")
    for source in sorted(set(sources.tolist())):
        add(source, result.log_errors[sources == source], left_out.get(source))
    moved = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("moved furthest", "prior", "value", "spreads"):
        moved.add_column(name, justify="left" if name == "moved furthest" else "right")
    for prior in sorted(beliefs, key=lambda prior: -abs(result.moved[prior.name]))[:10]:
        values = f"{prior.value:.4g}", f"{result.values[prior.name]:.4g}", f"{result.moved[prior.name]:+.1f}"
        moved.add_row(prior.name, *values)
    return Group(errors, moved)
