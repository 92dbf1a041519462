"""`colossus fleet list`, `show` and `chips`: what there is to train on, and where each number is from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colossus.cli.group import Group
from colossus.cli.options import JsonOption

if TYPE_CHECKING:
    from rich.table import Table

    from colossus.spec.fleet import Fleet, Sourced
    from colossus.spec.ranged import Ranged

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Show fleets and the chips, networks and sites they are made of, each number with its source.",
)


@app.command(
    "list",
    epilog="""\b
Examples:
  colossus fleet list
  colossus fleet list --json | jq '.fleets[] | {name, num_chips}'
""",
)
def list_fleets(json: JsonOption = False) -> None:
    """List the named fleets.

    FLOP/s are the dense bfloat16 peak of all chips; power is the nodes' rating, without switches and cooling.
    """
    from colossus.hardware import fleets

    known = fleets()
    if json:
        from json import dumps

        typer.echo(dumps({"fleets": [_totals(fleet) for fleet in known.values()]}))
        return
    rows = [
        (name, _pools(fleet), _si(fleet.peak_flops("bfloat16"), "FLOP/s"), _si(fleet.memory_bytes, "B"),
         _si(fleet.power_watts, "W"), fleet.fabric.name, fleet.site.name)
        for name, fleet in known.items()
    ]  # fmt: skip
    columns = ("fleet", "chips", "bfloat16 peak", "memory", "power", "fabric", "site")
    _print(_table(columns, rows, right={"bfloat16 peak", "memory", "power"}))


@app.command(
    epilog="""\b
Examples:
  colossus fleet show colossus-200k
  colossus fleet show h100:4096
  colossus fleet show h100:150000+h200:50000 --json
  colossus fleet show my-fleet.toml

A fleet's own file:
  name = "mine"
  fabric = "infiniband-ndr-3-tier"
  site = "us-average"
  [[pool]]
  node = "hgx-h200"
  count = 256
"""
)
def show(
    fleet: Annotated[
        str,
        typer.Argument(
            metavar="FLEET", help="A name, chips in place (h100:4096), or a .toml file. Counts are of chips."
        ),
    ],
    json: JsonOption = False,
) -> None:
    """Show one fleet: pools, chips, network, site; every number with its source."""
    from colossus.hardware import parse_fleet

    found = parse_fleet(fleet)
    if json:
        from json import dumps

        typer.echo(dumps({**_totals(found), "fleet": found.model_dump(mode="json")}))
        return
    totals = (
        f"{found.name}: {found.num_chips:,} chips in {found.num_nodes:,} nodes, "
        f"{_si(found.memory_bytes, 'B')}, {_si(found.power_watts, 'W')} rated"
    )
    entries: dict[tuple[str, str], Sourced] = {}
    for pool in found.pools:
        entries["node", pool.node.name] = pool.node
        entries["chip", pool.chip.name] = pool.chip
    entries["fabric", found.fabric.name] = found.fabric
    entries["site", found.site.name] = found.site
    pools = [
        (f"{pool.num_nodes:,} x {pool.node.name}", f"{pool.num_chips:,} x {pool.chip.name}", _si(
            pool.num_chips * pool.chip.peak_flops["bfloat16"], "FLOP/s"))
        for pool in found.pools
    ]  # fmt: skip
    _print(
        totals,
        f"source: {found.source}",
        *([f"note: {found.note}"] if found.note else []),
        _table(("nodes", "chips", "bfloat16 peak"), pools, right={"bfloat16 peak"}),
        *(_sheet(kind, entry) for (kind, _), entry in entries.items()),
    )


@app.command(
    epilog="""\b
Examples:
  colossus fleet chips
  colossus fleet chips --json | jq '.chips[] | {name, peak_flops, sources}'
"""
)
def chips(json: JsonOption = False) -> None:
    """List the chips of the catalog, with sources.

    Peaks are dense, in TFLOP/s; memory is what a process can have of it.
    """
    from colossus.hardware import aliases
    from colossus.hardware import chips as all_chips

    known = all_chips()
    if json:
        from json import dumps

        typer.echo(dumps({"chips": [chip.model_dump(mode="json") for chip in known.values()]}))
        return
    rows = []
    for name, chip in known.items():
        peaks = [chip.peak_flops.get(precision) for precision in ("float32", "bfloat16", "fp8", "nvfp4")]
        rows.append(
            (name, chip.generation, *(f"{peak / 1e12:,g}" if peak else "-" for peak in peaks),
             f"{chip.memory_bytes / 2**30:.1f}", f"{chip.memory_bandwidth / 1e12:.3g}", f"{chip.power_watts:.0f}",
             chip.source)
        )  # fmt: skip
    right = ("float32", "bfloat16", "fp8", "nvfp4", "GiB", "TB/s", "W")
    short = ", ".join(f"{alias} is {name}" for alias, name in aliases("chip").items())
    _print(_table(("chip", "generation", *right, "source"), rows, right=set(right)), f"Short names: {short}.")


# --- as text ---


def _totals(fleet: "Fleet") -> dict[str, Any]:
    return {
        "name": fleet.name,
        "pools": [
            {"node": pool.node.name, "chip": pool.chip.name, "num_nodes": pool.num_nodes, "num_chips": pool.num_chips}
            for pool in fleet.pools
        ],
        "num_chips": fleet.num_chips,
        "num_nodes": fleet.num_nodes,
        "bfloat16_peak_flops": fleet.peak_flops("bfloat16"),
        "memory_bytes": fleet.memory_bytes,
        "power_watts": fleet.power_watts,
        "fabric": fleet.fabric.name,
        "site": fleet.site.name,
    }  # fmt: skip


def _pools(fleet: "Fleet") -> str:
    return " + ".join(f"{pool.num_chips:,} {pool.chip.name}" for pool in fleet.pools)


def _sheet(kind: str, entry: "Sourced") -> "Table":
    """One entry of the catalog: a row for each number, with the source where it has one of its own."""
    rows = []
    for field in type(entry).model_fields:
        value = getattr(entry, field)
        if field in ("name", "source", "sources", "note", "chip") or value is None:
            continue
        rows.append((field, _value(field, value), entry.sources.get(field, "")))
    rows.append(("source", "", entry.source))
    if entry.note:
        rows.append(("note", "", entry.note))
    return _table((f"{kind} {entry.name}", "", "source"), rows)


def _value(field: str, value: Any) -> str:
    if field == "peak_flops":
        return "\n".join(f"{precision} {_si(flops, 'FLOP/s')}" for precision, flops in value.items())
    if field == "tiers":
        return "\n".join(
            f"{tier.name}: {tier.num_chips:,} chips, {tier.latency_s * 1e6:.1f} us"
            + (f", {tier.oversubscription:g}:1" if tier.oversubscription > 1 else "")
            for tier in value
        )
    if field == "power_limits":
        limits = [f"{limit.since}: {_si(limit.facility_watts, 'W')}" for limit in value]
        return "\n".join(limits) or "as much as is needed"
    if field == "memory_bytes":
        return f"{value / 2**30:.2f} GiB"
    if field.endswith("bandwidth"):
        return _si(value, "B/s")
    if field.endswith("watts"):
        return _si(value, "W")
    if hasattr(value, "likely"):
        return _ranged(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _ranged(value: "Ranged") -> str:
    return f"{value.likely:,.4g} ({value.low:,.4g} to {value.high:,.4g})" if value.likely < 1000 else (
        f"{value.likely:,.0f} ({value.low:,.0f} to {value.high:,.0f})"
    )  # fmt: skip


def _si(value: float, unit: str) -> str:
    """9.894e19 FLOP/s → `"98.94 EFLOP/s"`; decimal prefixes, four digits."""
    for prefix, scale in (
        ("Z", 1e21),
        ("E", 1e18),
        ("P", 1e15),
        ("T", 1e12),
        ("G", 1e9),
        ("M", 1e6),
        ("k", 1e3),
    ):
        if value >= scale:
            return f"{value / scale:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def _table(
    columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: set[str] | None = None
) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        numbers = column in (right or set())
        table.add_column(
            column,
            justify="right" if numbers else "left",
            no_wrap=numbers or column == columns[0],
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # as text: square brackets are not markup
    return table


def _print(*parts: Any) -> None:
    from rich.text import Text

    from colossus.cli.screen import screen

    console = screen()
    for part in parts:
        console.print(Text(part) if isinstance(part, str) else part)
