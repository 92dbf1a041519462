"""`colossus validate`: the estimate beside published measurements."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colossus.cli.options import JsonOption

if TYPE_CHECKING:
    from colossus.planner.evidence.validate import Comparison

EPILOG = """\b
Examples:
  colossus validate runs.csv
  colossus validate runs.csv more.csv --where 'gpu=H100-SXM|H200,tier=A' --plot scatter.png
  colossus validate runs.csv --out rows.csv --json | jq '{n, mape, median}'
  colossus validate runs.csv --constants constants.toml
"""


def validate(
    tables: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Tables of published runs, as CSV.", show_default=False),
    ],
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=VALUE", help="Only rows with this value, or one of several: gpu=A|B,tier=A."
        ),
    ] = None,
    constants: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Constants of the estimate. [the shipped ones]")
    ] = None,
    spreads: Annotated[
        Path | None,
        typer.Option("--intervals", metavar="FILE", help="Widths of intervals. [the shipped ones]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Write each row: measured, predicted, parts, verdict."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw predicted against measured (needs matplotlib)."),
    ] = None,
    worst: Annotated[int, typer.Option(metavar="N", min=0, help="How many of the worst rows to list.")] = 10,
    json: JsonOption = False,
) -> None:
    """Predict published runs from their layouts alone, and show the errors.

    Errors are in percent of what was measured: the mean of their sizes (MAPE), the median, p90 (nine rows of ten
    are closer), the bias. Rows that cannot be expressed are counted with their reason; rows that ran out of memory
    count for verdicts only. Layouts of one run are ranked where at least three were measured; the regret is how
    much slower the first of the ranking was than the measured best.
    """
    from colossus.planner.evidence import intervals
    from colossus.planner.evidence.calibrate import read_constants
    from colossus.planner.evidence.validate import compare, read_tables, report, select

    _keep_tables(tables, out, plot)
    rows = select(read_tables(tables), where or [])
    found = compare(rows, read_constants(constants), intervals.read(spreads) if spreads else None)
    judged = report(found)
    if out is not None:
        _write_rows(found, out)
    if plot is not None:
        _draw(found, plot)
    if json:
        from json import dumps

        typer.echo(dumps(judged))
        return
    _print(found, judged, worst, [path for path in (out, plot) if path])


def _keep_tables(tables: Sequence[Path], *written: Path | None) -> None:
    from colossus.cli.plan_files import refuse_special
    from colossus.errors import ConfigError

    for path in written:
        if path is not None:
            refuse_special("the output", path)
        if path is not None and path.resolve() in {table.resolve() for table in tables}:
            raise ConfigError(f"{path} is one of the tables that are read; write to another file")


def _write_rows(found: "Comparison", path: Path) -> None:
    import csv
    import io

    from colossus.planner.evidence.calibrate import write_whole
    from colossus.planner.evidence.validate import details

    rows = details(found)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, max(rows, key=len), restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_whole(path, text.getvalue(), replace=True)


# --- as text ---


def _print(found: "Comparison", judged: Mapping[str, Any], worst: int, written: Sequence[Path]) -> None:
    from rich.text import Text

    from colossus.cli.screen import screen

    console = screen()
    oom, memory, rank = judged["oom"], judged["memory"], judged["ranking"]
    lines = [
        f"{judged['rows']:,} rows: {judged['n']:,} step times compared, {oom['num_out_of_memory']:,} out of memory "
        f"as published, {judged['skipped']:,} skipped"
    ]
    console.print(Text(lines[0]))
    console.print(_errors(judged))
    if worst and judged["n"]:
        console.print(_worst(found, worst))
    facts = []
    if memory["n"]:
        facts.append(
            ("memory", f"{memory['n']:,} peaks: median error {memory['median']:.1f} %, MAPE {memory['mape']:.1f} %, "
             f"bias {memory['bias']:+.1f} %")
        )  # fmt: skip
    facts.append(("verdicts", _verdicts(oom)))
    if rank["groups"]:
        correlation = "-" if rank["spearman"] is None else f"{rank['spearman']:.3f}"
        facts.append(
            ("ranking", f"{rank['groups']:,} runs with {rank['layouts']:,} layouts: rank correlation {correlation}, "
             f"regret {rank['regret_mean']:.2f} % on average, {rank['regret_max']:.1f} % at most")
        )  # fmt: skip
    for reason, those in judged["skipped_reasons"].items():
        ids = ", ".join(those["ids"][:4]) + (" ..." if those["count"] > 4 else "")
        facts.append(("skipped", f"{those['count']:,} because: {reason} ({ids})"))
    facts += [("wrote", str(path)) for path in written]
    for name, text in facts:
        console.print(Text.assemble((f"{name:10}", "bold"), text), soft_wrap=True)


def _verdicts(oom: Mapping[str, Any]) -> str:
    if not oom["num_out_of_memory"] + oom["num_ran"]:
        return "none"
    text = f"{oom['accuracy']:.1f} % right of {oom['num_out_of_memory'] + oom['num_ran']:,}"
    if oom["recall"] is not None:
        text += f"; {oom['recall']:.1f} % of {oom['num_out_of_memory']:,} out-of-memory runs found"
    if oom["precision"] is not None:
        text += f"; {oom['precision']:.1f} % of such warnings true"
    return text


def _errors(judged: Mapping[str, Any]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=48)
    for name in ("rows", "MAPE %", "median %", "p90 %", "bias %", "in interval %"):
        table.add_column(name, justify="right", no_wrap=True)

    def add(first: str, second: str, entry: Mapping[str, Any], style: str = "") -> None:
        numbers = [entry[name] for name in ("mape", "median", "p90", "bias")]
        cells = [f"{x:.1f}" if x is not None else "-" for x in numbers]
        coverage = entry["interval_coverage"]
        last = "-" if coverage is None else f"{coverage:.0f}"
        table.add_row(Text(first), Text(second), f"{entry['n']:,}", *cells, last, style=style)

    add("all", "", judged, "bold")
    for dimension, entries in judged["by"].items():
        table.add_section()
        for i, (name, entry) in enumerate(entries.items()):
            add(dimension if i == 0 else "", f"{name} GPUs" if dimension == "scale" else name, entry)
    return table


def _worst(found: "Comparison", count: int) -> Any:
    import numpy as np
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("worst rows", "model", "chips", "layout"):
        table.add_column(name, no_wrap=name != "model", overflow="ellipsis")
    for name in ("measured s", "predicted s", "error %"):
        table.add_column(name, justify="right", no_wrap=True)
    size = np.where(found.timed, np.abs(found.log_errors), -1.0)
    for i in np.argsort(-size)[: min(count, int(np.sum(found.timed)))]:
        run, x = found.runs[int(i)], found.runs[int(i)].execution
        axes = [("tp", x.tp), ("pp", x.pp), ("cp", x.cp), ("ep", x.ep), ("mb", x.micro_batch)]
        predicted = float(found.parts.total_s[i])
        table.add_row(
            Text(run.row.get("id", "")),
            Text(run.row["model_name"][:32]),
            Text(f"{run.num_chips:,} {run.row['gpu']} {run.precision}"),
            " ".join(f"{name}{int(value)}" for name, value in axes if value > 1 or name == "mb"),
            f"{run.step_s:.4g}",
            f"{predicted:.4g}",
            f"{100 * (predicted / run.step_s - 1):+.1f}",
        )
    return table


# --- as a picture ---

_INK, _PAPER, _GRID = "#33373d", "#fbfbf9", "#dcdcd8"
_COLOURS = ("#3b76af", "#c03d3e", "#3a923a", "#8d6ab8", "#e1812c", "#857045", "#4aa5a5", "#d684bd", "#7f7f7f")


def _draw(found: "Comparison", path: Path) -> None:
    """Predicted against measured step times, both on log scales, a colour for each chip."""
    import numpy as np

    from colossus.errors import ConfigError

    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib; run `pip install matplotlib`") from None
    chosen = found.timed
    if not chosen.any():
        raise ConfigError("there is no step time to draw: no row has a published one")
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigError(f"cannot draw {path}: its name must end in one of .png, .svg or .pdf")
    measured, predicted = found.table.step_s[chosen], found.parts.total_s[chosen]
    chips = np.array([run.row["gpu"] for run in found.runs])[chosen]
    figure = Figure(figsize=(8, 8), dpi=130, facecolor=_PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=_PAPER)
    ends = np.array([min(measured.min(), predicted.min()) / 1.3, max(measured.max(), predicted.max()) * 1.3])
    axes.fill_between(ends, ends / 1.1, ends * 1.1, color=_GRID, alpha=0.7, lw=0, label="within 10 %")
    axes.plot(ends, ends, color=_INK, lw=0.8)
    names, counts = np.unique(chips, return_counts=True)
    for place, i in enumerate(np.argsort(-counts)):
        own = chips == names[i]
        axes.scatter(
            measured[own], predicted[own], s=14, alpha=0.6, lw=0, color=_COLOURS[place % len(_COLOURS)],
            label=f"{names[i]} ({counts[i]:,})",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axes.set_xlabel("measured step time, s", color=_INK)
    axes.set_ylabel("predicted step time, s", color=_INK)
    size = np.abs(predicted / measured - 1) * 100
    axes.set_title(
        f"{len(size):,} published runs: MAPE {size.mean():.1f} %, median {np.median(size):.1f} %",
        color=_INK, fontsize=12, loc="left",
    )  # fmt: skip
    axes.grid(color=_GRID, lw=0.6)
    axes.tick_params(colors=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
