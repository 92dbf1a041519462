"""Runs at a glance, and one in detail: what `colossus runs` shows."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colossus.errors import RunError
from colossus.observe.history import History, describe_problem, history
from colossus.observe.run_directory import RunDirectory, State
from colossus.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_STYLES: dict[State, str] = {
    "starting": "cyan", "running": "cyan", "finished": "green", "interrupted": "yellow", "diverged": "red",
    "crashed": "red", "new": "cyan",
}  # fmt: skip


_COLUMNS = ("run", "model", "params", "steps", "tokens", "bits/byte", "state", "when", "size")
_NUMBERS = ("params", "steps", "tokens", "bits/byte", "size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """One run in one row. None: not known."""

    name: str
    path: str
    state: State
    model: str | None
    num_params: int | None
    steps: int
    tokens: int
    heldout_bits_per_byte: float | None
    started_s: float | None
    last_active_s: float
    num_bytes: int
    problem: str | None = None
    """Why the configuration cannot be read, if it cannot."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def overview(run: RunDirectory) -> Overview:
    """Looks at a run's configuration, log and lock. A run that is damaged gets a row all the same."""
    events = list(run.events())
    told = history(events)
    try:
        model, problem = run.config().model, None
    except RunError as error:
        model, problem = None, str(error)
    return Overview(
        name=run.name,
        path=str(run.path),
        state=run.state(events),
        model=model.name if model else None,
        num_params=model.num_params() if model else None,
        steps=told.num_steps,
        tokens=told.num_tokens,
        heldout_bits_per_byte=told.bits_per_byte,
        started_s=events[0].time_s if events else None,
        last_active_s=run.last_active_s(),
        num_bytes=run.num_bytes(),
        problem=problem,
    )


def overview_table(rows: list[Overview], now_s: float, width: int) -> "Table":
    """All runs, the last active one at the foot, where the eye is; narrow ones leave the size out."""
    from rich.table import Table
    from rich.text import Text

    left_out = {"size", "steps"} if width < 80 else {"size"} if width < 100 else set()
    columns = [name for name in _COLUMNS if name not in left_out]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, justify="right" if name in _NUMBERS else "left", no_wrap=True)
    for row in sorted(rows, key=lambda row: row.last_active_s):
        bits = row.heldout_bits_per_byte
        cells: dict[str, Text | str] = {
            "run": Text(row.name, style="bold"),
            "model": row.model or "?",
            "params": format_count(row.num_params) if row.num_params else "?",
            "steps": f"{row.steps:,}",
            "tokens": format_count(row.tokens),
            "bits/byte": f"{bits:.4f}" if bits is not None else "-",
            "state": Text(row.state, style=_STYLES[row.state]),
            "when": how_long_ago(now_s - row.last_active_s),
            "size": format_bytes(row.num_bytes),
        }
        table.add_row(*(cells[name] for name in columns))
    return table


def how_long_ago(seconds: float) -> str:
    """`"now"`, `"5 min ago"`, `"3 days ago"`."""
    for unit, length in (("day", 86400), ("hour", 3600), ("min", 60)):
        count = int(seconds // length)
        if count:
            return f"{count} {unit}{'s' if count > 1 and unit != 'min' else ''} ago"
    return "now"


def detail(run: RunDirectory) -> "list[Table | Text]":
    """One run: how it stands, what was decided, what went wrong, and what can be done now."""
    from rich.table import Table
    from rich.text import Text

    from colossus.observe.summary import Summary, summary_table

    row, told = overview(run), history(run.events())
    parts: list[Table | Text] = [
        Text.assemble((row.name, "bold"), "  ", (row.state, _STYLES[row.state]), (f"  {run.path}", "dim"))
    ]
    if row.problem:
        parts.append(Text(row.problem, style="red"))
    parts += [
        Text(),
        summary_table(Summary.read(run.summary_path)) if run.summary_path.is_file() else _so_far(told),
    ]
    if told.decisions:
        parts += [Text("\nDecisions", style="dim"), _decisions(told)]
    if told.problems:
        parts.append(Text("\nProblems", style="dim"))
        parts += [Text(describe_problem(problem), style="yellow") for problem in told.problems[-10:]]
        if len(told.problems) > 10:
            parts.append(Text(f"and {len(told.problems) - 10} before them", style="dim"))
    parts.append(Text(f"\n{_next(run, row.state)}", style="dim"))
    return parts


def _so_far(told: History) -> "Table":
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right", style="bold")
    if told.bits_per_byte is not None:
        table.add_row("held-out", f"{told.bits_per_byte:.4f} bits per byte")
    table.add_row("trained", f"{format_count(told.num_tokens)} tokens in {told.num_steps:,} steps")
    if told.steps:
        table.add_row("training loss", f"{told.steps[-1].loss:.4f} nats per token, last step")
        table.add_row("took", format_seconds(told.steps[-1].seconds))
    if told.checkpoints:
        table.add_row("last checkpoint", f"after {told.checkpoints[-1].step:,} steps")
    if len(told.starts) > 1:
        table.add_row("resumed", f"{len(told.starts) - 1} times")
    return table


def _decisions(told: History) -> "Table":
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("dim", "bold", "dim"):
        table.add_column(style=column)
    latest = {decision.what: decision for decision in told.decisions}  # a resume decides the same again
    for decision in latest.values():
        table.add_row(decision.what, decision.choice, decision.reason)
    return table


def _next(run: RunDirectory, state: State) -> str:
    match state:
        case "crashed" | "interrupted":
            return f"go on: colossus train --resume {run.path}"
        case "new":
            return f"train it: colossus train --resume {run.path}"
        case "running" | "starting":
            holder = run.holder()
            return (
                f"process {holder[0]} on {holder[1]} is training" if holder else "another process is training"
            )
        case _:
            return f"let it write: colossus generate {run.path} --prompt 'import '"
