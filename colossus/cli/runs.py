"""`colossus runs` and `colossus runs show`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from colossus.cli.group import Group
from colossus.cli.options import JsonOption, RunsOption

app = typer.Typer(cls=Group, invoke_without_command=True, rich_markup_mode=None)


@app.callback(
    epilog="""\b
Examples:
  colossus runs
  colossus runs --json | jq '.runs[] | select(.state == "crashed").path'
  colossus runs show latest --curves
"""
)
def runs(context: typer.Context, runs: RunsOption = Path("runs"), json: JsonOption = False) -> None:
    """List all runs and how they went, or show one in detail.

    A run is 'crashed' when its process is gone and did not say goodbye; `colossus train --resume` goes on
    with it.
    """
    if context.invoked_subcommand is not None:
        context.obj = runs
        return
    from colossus.observe.overview import overview, overview_table
    from colossus.observe.run_directory import RunDirectory

    rows = [overview(run) for run in RunDirectory.all(runs)]
    if json:
        from json import dumps

        typer.echo(dumps({"runs": [row.to_dict() for row in rows]}))
    elif not rows:
        typer.echo(f"No runs in {runs} yet. Start one: colossus train")
    else:
        from colossus.cli.screen import screen

        console = screen()
        console.print(overview_table(rows, time.time(), console.width))


@app.command()
def show(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, its name, or 'latest'.")],
    curves: Annotated[
        bool, typer.Option("--curves", help="Draw curves.png from the log as it is now.")
    ] = False,
    runs: Annotated[Path | None, typer.Option("--runs", metavar="DIR", help="As for `runs`.")] = None,
    json: JsonOption = False,
) -> None:
    """Show one run: figures, decisions with reasons, problems."""
    from colossus.observe.overview import detail, overview
    from colossus.observe.run_directory import RunDirectory

    found = RunDirectory.open(run, runs or context.obj)
    if curves:
        from colossus.observe.curves import write_curves

        write_curves(found.events(), found.curves_path, found.name)
    if json:
        from json import dumps

        typer.echo(dumps(overview(found).to_dict()))
        return
    from colossus.cli.screen import screen

    console = screen()
    for part in detail(found):
        console.print(part)
    if curves:
        console.print(f"wrote {found.curves_path}", style="dim")
