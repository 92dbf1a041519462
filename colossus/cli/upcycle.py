"""`colossus upcycle`."""

from pathlib import Path
from typing import Annotated

import typer

from colossus.cli.options import (
    DataOption,
    JsonOption,
    MinutesOption,
    RunNameOption,
    RunsOption,
    SettingsOption,
    StepsOption,
    TextFieldOption,
    TokensOption,
    budget_settings,
    data_settings,
)

EPILOG = """\b
Examples:
  colossus upcycle small-llama-001                       eight experts in every layer, two for each token
  colossus upcycle latest --experts 4 --top-k 1 --tokens 50M
  colossus train --resume small-llama-001-8-experts-001  ... then train it
"""


def upcycle(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, its name, or 'latest'.")],
    experts: Annotated[int, typer.Option(metavar="N", help="Experts in every layer.")] = 8,
    top_k: Annotated[int, typer.Option(metavar="K", help="Experts that each token goes through.")] = 2,
    data: DataOption = None,
    text_field: TextFieldOption = None,
    steps: StepsOption = None,
    tokens: TokensOption = None,
    minutes: MinutesOption = None,
    settings: SettingsOption = None,
    runs: RunsOption = Path("runs"),
    name: RunNameOption = None,
    json: JsonOption = False,
) -> None:
    """Make a mixture of experts from a dense run, to train it on.

    Every expert starts as a copy of the dense MLP, so the new model starts with exactly the loss that the dense
    one ended with. Text, batch and tokenizer are those of the dense run unless told otherwise.
    """
    budget = budget_settings({"steps": steps, "tokens": tokens, "minutes": minutes, "cpu_seconds": None})
    changes = [*data_settings(data, text_field), *budget, *(settings or [])]
    from colossus.checkpoint.continued import continued, settled
    from colossus.checkpoint.upcycle import upcycle_run, upcycled
    from colossus.data import RichProgress
    from colossus.observe.run_directory import RunDirectory
    from colossus.units import format_count

    dense_run = RunDirectory.open(run, runs)
    dense = dense_run.config()
    own_name = name or f"{dense_run.name}-{experts}-experts"
    model = upcycled(dense.model, num_experts=experts, top_k=top_k)
    start = continued(model).model_copy(
        update={"name": own_name, "data": dense.data, "batch": dense.batch, "evaluation": dense.evaluation}
    )
    config = settled(start, changes)
    with RichProgress() as progress:
        made = upcycle_run(dense_run, config, runs_directory=runs, name=own_name, progress=progress)
    if json:
        from json import dumps

        record = {
            "run": str(made.path),
            "num_params": model.num_params(),
            "num_active_params": model.num_active_params(),
        }
        typer.echo(dumps(record))
        return
    typer.echo(
        f"{made.path}: {format_count(model.num_params())} parameters, of which a token uses "
        f"{format_count(model.num_active_params())}"
    )
    typer.echo(f"  train it on: colossus train --resume {made.path}")
