"""`colossus import`."""

from pathlib import Path
from typing import Annotated

import typer

from colossus.cli.options import (
    CpuSecondsOption,
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
  colossus import Llama-3.2-1B --data my/texts --tokens 50M
  colossus import HuggingFaceTB/SmolLM2-135M --data books/    from the hub, where there is network
  colossus import my-model --set optimizer.learning_rate=3e-5 --name finer
  colossus train --resume finer-001                           ... then train it
"""


def import_(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="A Hugging Face directory, or a name on the hub (owner/name) where there is network.",
        ),
    ],
    data: DataOption = None,
    text_field: TextFieldOption = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Use this tokenizer in place of the directory's."),
    ] = None,
    steps: StepsOption = None,
    tokens: TokensOption = None,
    minutes: MinutesOption = None,
    cpu_seconds: CpuSecondsOption = None,
    settings: SettingsOption = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Decides the sample order.")] = None,
    runs: RunsOption = Path("runs"),
    name: RunNameOption = None,
    json: JsonOption = False,
) -> None:
    """Make a run from the weights of a Hugging Face directory, to train it on.

    Everything is looked at before anything is read: the architecture, every tensor's name and shape, the
    files' offsets. Pickles are refused and never opened. Memory holds one tensor at a time.
    """
    budget = budget_settings(
        {"steps": steps, "tokens": tokens, "minutes": minutes, "cpu_seconds": cpu_seconds}
    )
    changes = [
        *data_settings(data, text_field),
        *([f"seed={seed}"] if seed is not None else []),
        *budget,
        *(settings or []),
    ]
    from colossus.checkpoint.continued import continued, settled
    from colossus.checkpoint.hugging_face import import_run, open_directory
    from colossus.checkpoint.hugging_face.hub import find_directory
    from colossus.data import RichProgress
    from colossus.observe.run_directory import check_name
    from colossus.units import format_count
    from colossus.zoo.hugging_face import safe_name

    own_name = name or safe_name(model.rstrip("/").rpartition("/")[2])
    check_name(own_name)
    source = open_directory(find_directory(model), name=own_name)
    start = continued(source.model).model_copy(update={"name": own_name})
    config = settled(start, changes)
    with RichProgress() as progress:
        run = import_run(
            source,
            config,
            runs_directory=runs,
            name=own_name,
            origin=model,
            tokenizer=tokenizer,
            progress=progress,
        )
    num_params = source.model.num_params()
    if json:
        from json import dumps

        record = {
            "run": str(run.path),
            "architecture": source.architecture.name,
            "num_params": num_params,
            "num_tensors": len(source.tensors),
            "num_bytes": source.num_bytes,
        }
        typer.echo(dumps(record))
        return
    typer.echo(f"{run.path}: {source.architecture.name}, {format_count(num_params)} parameters")
    typer.echo(f"  train it on: colossus train --resume {run.path}")
    typer.echo(f"  try it:      colossus generate {run.path} --prompt 'import '")
