"""`colossus compare`: a run beside its plan's estimate, two plans, two runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colossus.cli.options import JsonOption, RunsOption
from colossus.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from colossus.observe.run_directory import RunDirectory
    from colossus.spec.plan import Plan

EPILOG = """\b
Examples:
  colossus compare latest                  a run: what its plan estimated, and what was measured
  colossus compare other.json latest       ... beside the estimate of another plan
  colossus compare first-001 second-001    two runs
  colossus compare a.json b.json           two plans
  colossus compare latest --json | jq '.fields[] | select(.within == false)'
"""

Compared = Annotated[
    str,
    typer.Argument(
        metavar="PLAN_OR_RUN",
        help="A file written by colossus plan --out; or a run: its directory, its name, or 'latest'.",
    ),
]
Second = Annotated[
    str | None, typer.Argument(metavar="PLAN_OR_RUN", help="What to set beside it. [of a run: its own plan]")
]


def compare(
    first: Compared,
    second: Second = None,
    runs: RunsOption = Path("runs"),
    json: JsonOption = False,
) -> None:
    """Compare what was estimated with what was measured, field by field; or two plans, or two runs.

    Of a run the median step counts, without those that start a process, follow an evaluation or run beside a
    checkpoint. A difference is the measured figure over the likely one. What is estimated and not measured is listed
    with the reason.
    """
    from colossus.cli.compare_run import beside, two_runs
    from colossus.cli.screen import screen
    from colossus.observe.run_directory import RunDirectory
    from colossus.spec.plan import Plan

    one, other = _found(first, runs), None if second is None else _found(second, runs)
    if isinstance(one, Plan) and isinstance(other, Plan):
        _two_plans(one, other, (first, str(second)), json=json)
        return
    parts: Iterator[Any]
    match one, other:
        case (RunDirectory() as run, None):
            told, parts = beside(run)
        case (Plan() as plan, RunDirectory() as run) | (RunDirectory() as run, Plan() as plan):
            told, parts = beside(run, plan)
        case (RunDirectory(), RunDirectory()):
            told, parts = two_runs(one, other)
        case _:
            raise ConfigError(
                f"{first} is a plan, and compare sets one thing beside another: name a second plan, or a run"
            )
    if json:
        from json import dumps

        typer.echo(dumps(told))
        return
    console = screen()
    for part in parts:
        console.print(part)


def _found(text: str, runs: Path) -> "Plan | RunDirectory":
    """A file is a plan, and so is what looks like the name of one."""
    from colossus.observe.run_directory import RunDirectory
    from colossus.spec.plan import Plan

    path = Path(text)
    if path.is_file() or path.suffix == ".json":
        return Plan.load(path)
    return RunDirectory.open(text, runs)


# --- two plans ---


def _two_plans(first: "Plan", second: "Plan", names: tuple[str, str], *, json: bool) -> None:
    """What differs, and which is better in what."""
    from colossus.planner.explain.compare import rows, verdicts

    fields, better = rows(first, second), verdicts(first, second)
    if json:
        from json import dumps

        typer.echo(dumps({
            "fields": [{"field": row.field, "a": row.a, "b": row.b, "differs": row.differs} for row in fields],
            "better": {
                verdict.respect: {"plan": verdict.better, "ratio": verdict.ratio, "text": verdict.text}
                for verdict in better
            },
        }))  # fmt: skip
        return
    from rich.text import Text

    from colossus.cli.plan import _console
    from colossus.cli.plan_text import grid

    console = _console()
    table = grid(4)
    table.add_row("", "", Text(f"A {names[0]}", "bold"), Text(f"B {names[1]}", "bold"))
    for row in fields:
        style = "bold yellow" if row.differs else "dim"
        table.add_row(Text("≠" if row.differs else " ", style), Text(row.field, "" if row.differs else "dim"),
                      Text(_short(row.a, row.differs), style), Text(_short(row.b, row.differs), style))  # fmt: skip
    console.print(table)
    console.print()
    for line in _verdict_lines(first, second, better):
        console.print(Text(line))


def _short(text: str, differs: bool) -> str:
    """What is the same in both plans needs no second line."""
    return text if differs or len(text) <= 38 else f"{text[:37].rstrip()}…"


def _verdict_lines(a: "Plan", b: "Plan", better: Any) -> list[str]:
    lines = []
    different = [name for name in ("model", "tokens", "fleet") if getattr(a, name) != getattr(b, name)]
    if different:
        lines.append(
            f"The plans differ in {' and '.join(different)}, so that totals are not of the same thing."
        )
    for side, name in (("a", "A"), ("b", "B")):
        won = [verdict.text for verdict in better if verdict.better == side]
        lines += [f"{name} has {won[0]}"] if won else []
        lines += [f"      {text}" for text in won[1:]]
    same = [verdict.respect for verdict in better if verdict.better == "same"]
    return [*lines, f"The same: {', '.join(same)}."] if same else lines
