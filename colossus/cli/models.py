"""`colossus models` and `colossus models show`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from colossus.cli.group import Group
from colossus.cli.options import JsonOption

if TYPE_CHECKING:
    from colossus.spec.model import ModelSpec

app = typer.Typer(cls=Group, invoke_without_command=True, rich_markup_mode=None)


@app.callback(
    epilog="""\b
Examples:
  colossus models
  colossus models --json | jq '.[] | select(.family == "Grok")'
  colossus models show llama3.1-405b
  colossus models show grok-2 --json > mine.json
"""
)
def models(context: typer.Context, json: JsonOption = False) -> None:
    """List the models of the zoo, or show one in detail.

    FLOPs are those of training on one token, in sequences as long as the model's context.
    """
    if context.invoked_subcommand is not None:
        return
    from colossus import zoo

    found = [zoo.find(name) for name in zoo.names()]
    if json:
        from json import dumps

        typer.echo(dumps([_facts(model) for model in found]))
        return
    from rich.table import Table

    from colossus.cli.screen import screen
    from colossus.units import format_count

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("name", "family"):
        table.add_column(heading, no_wrap=True)
    for heading in ("params", "active", "layers", "hidden", "context", "FLOPs/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("source", style="dim")
    for model in found:
        facts = _facts(model)
        table.add_row(
            model.name,
            facts["family"],
            format_count(facts["num_params"]),
            format_count(facts["num_active_params"]),
            str(facts["layers"]),
            f"{facts['hidden']:,}",
            f"{facts['context']:,}",
            f"{facts['flops_per_token']:.2e}",
            facts["source"],
        )
    screen().print(table)


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A model's name, or a .toml or .json file of one.")
    ],
    json: JsonOption = False,
) -> None:
    """Show one model: what it is made of, and what it costs.

    With --json the whole specification is in `model`; saved as a .json file, it can be named in place of a model.
    """
    from colossus import zoo

    model = zoo.load(name)
    known = model.name in zoo.names() and zoo.find(model.name) == model
    facts = _facts(model) if known else _facts(model, family="", source=name)
    if json:
        from json import dumps

        typer.echo(dumps({**facts, "model": model.model_dump(mode="json")}))
        return
    from rich.table import Table

    from colossus.cli.model_text import model_lines
    from colossus.cli.screen import screen

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for label, text in model_lines(model):
        table.add_row(label, text)
    table.add_row("source", facts["source"])
    console = screen()
    console.print(f"{model.name}\n", style="bold")
    console.print(table)


def _facts(model: "ModelSpec", family: str | None = None, source: str | None = None) -> dict[str, Any]:
    from colossus import zoo

    return {
        "name": model.name,
        "family": zoo.family(model.name) if family is None else family,
        "num_params": model.num_params(),
        "num_active_params": model.num_active_params(),
        "layers": model.num_layers,
        "hidden": model.hidden_size,
        "context": model.context_tokens,
        "flops_per_token": model.flops_per_token(model.context_tokens),
        "source": zoo.source(model.name) if source is None else source,
    }
