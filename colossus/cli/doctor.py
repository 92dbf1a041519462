"""`colossus doctor`: what of this machine is fit for training, and how fast it is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colossus.cli.options import JsonOption

if TYPE_CHECKING:
    from colossus.doctor.checks import Check

EPILOG = """\b
Examples:
  colossus doctor
  colossus doctor --directory /mnt/runs --json
  colossus doctor --calibrate --out here.toml
  colossus plan gpt2 --fleet here.toml --tokens 100M
"""
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}


def doctor(
    directory: Annotated[
        Path, typer.Option(metavar="DIR", help="Where runs go: its disk is looked at, and measured.")
    ] = Path("runs"),
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Measure what the planner needs to know, and write a fleet's file."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Where --calibrate writes. [HOST.toml]")
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Processes that --calibrate keeps busy at once. [a GPU each; on a CPU 2]"
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Calibrate on few sizes, to try it out: too coarse to plan with.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Write over a file that exists.")] = False,
    json_: JsonOption = False,
) -> None:
    """Check this machine for training, and say what to fix.

    Ends with 1 where something is a problem, with 0 otherwise. With --calibrate, measures instead (some three
    minutes): matmuls, attention, passes over memory, collectives between processes, disk. The file it writes is a
    fleet: `colossus plan MODEL --fleet FILE` then estimates from what was measured.
    """
    from colossus.errors import ConfigError

    if calibrate:
        _calibrate(directory, out, ranks, quick, replace, json_)
        return
    for option, given in (("--out", out), ("--ranks", ranks), ("--quick", quick), ("--replace", replace)):
        if given:
            raise ConfigError(f"{option} says how to calibrate; give --calibrate too")
    from colossus.doctor.checks import check_all
    from colossus.doctor.facts import gather

    checks = check_all(gather(directory))
    problems = [check for check in checks if check.status == "problem"]
    if json_:
        import json
        from dataclasses import asdict

        typer.echo(json.dumps({"fit": not problems, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print(checks)
    if problems:
        raise typer.Exit(1)


def _print(checks: "list[Check]") -> None:
    from rich.text import Text

    from colossus.cli.screen import screen

    told = screen()
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text.assemble(
            (f"{check.status:<8}", _STYLES[check.status]), f"{check.name:<{width}}  {check.found}"
        )
        if check.advice:
            line.append(f"\n{'':8}{'':{width}}  {check.advice}", "bold")
        told.print(line, soft_wrap=True)
    count = {status: sum(check.status == status for check in checks) for status in _STYLES}
    told.print(f"{len(checks)} checks: {count['problem']} problems, {count['warning']} warnings")


def _calibrate(
    directory: Path, out: Path | None, ranks: int | None, quick: bool, replace: bool, json_: bool
) -> None:
    import platform
    from datetime import date

    from colossus.cli.plan_files import refuse_no_place
    from colossus.cli.screen import screen
    from colossus.errors import ColossusError, ConfigError

    host = platform.node() or "this-machine"
    path = out or Path(f"{host}.toml")
    refuse_no_place("the output", path)
    if path.exists() and not replace:
        raise ConfigError(f"{path} exists; choose another name with --out, or say --replace to write over it")
    try:
        from colossus.doctor import calibrate as measuring
    except ImportError as error:
        raise ColossusError(
            f"measuring needs torch, which cannot be imported ({error}): pip install torch"
        ) from None
    from colossus.doctor.fleet_file import fleet_toml
    from colossus.hardware import parse_fleet
    from colossus.hardware.this_machine import this_machine
    from colossus.planner.evidence.calibrate import write_whole

    num_ranks = measuring.checked_ranks(ranks)
    num_threads = measuring.threads_of(num_ranks)
    told = screen(stderr=True)
    told.print(
        f"measuring with {num_ranks} ranks of {num_threads} threads at once; some three minutes where nothing else runs"
    )
    found = measuring.measure_ranks(num_ranks, num_threads, quick=quick)
    source = f"measured on {host}, {date.today().isoformat()}, colossus doctor --calibrate"
    text = fleet_toml(
        found,
        name=host.lower(),
        source=source,
        num_ranks=num_ranks,
        num_threads=num_threads,
        memory_bytes=this_machine().chip.memory_bytes,
        disk=measuring.disk_of(directory),
        device=measuring.device_facts(source),
    )
    write_whole(path, text, replace=replace)
    parse_fleet(str(path) if "/" in str(path) else f"./{path}")  # what was written can be read
    summary = measuring.summary(found)
    if json_:
        import json

        typer.echo(json.dumps({"file": str(path), "ranks": num_ranks, "threads": num_threads, **summary}))
        return
    _print_summary(summary)
    typer.echo(f"wrote {path}")


def _print_summary(summary: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from colossus.cli.screen import screen

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("measured")
    table.add_column("", justify="right")
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), value if isinstance(value, str) else f"{value:,.4g}")
    screen().print(table)
