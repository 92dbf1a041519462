"""`colossus export`."""

from pathlib import Path
from typing import Annotated

import typer

from colossus.cli.options import JsonOption, RunsOption
from colossus.errors import ConfigError

EPILOG = """\b
Examples:
  colossus export latest my-model                      float32: exactly the weights that were trained
  colossus export llama-001 my-model --dtype bfloat16  half the size, rounded
  colossus export llama-001 early --step 1000          from an older checkpoint
"""


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, its name, or 'latest'.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to make.")],
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="float32 is exact, bfloat16 takes half the space.")
    ] = "float32",
    step: Annotated[
        int | None, typer.Option(metavar="N", help="The checkpoint of this step; else the newest good one.")
    ] = None,
    shard_gb: Annotated[
        float, typer.Option("--shard-gb", metavar="GB", help="Size of a file at the most, in 10^9 bytes.")
    ] = 5.0,
    json: JsonOption = False,
    runs: RunsOption = Path("runs"),
) -> None:
    """Write a run's model as a Hugging Face directory.

    Weights in safetensors, configuration, tokenizer and a card with the run's facts: what transformers and
    vLLM load. Memory holds one tensor at a time, however large the model.
    """
    from typing import cast, get_args

    from colossus.errors import did_you_mean
    from colossus.observe.run_directory import RunDirectory
    from colossus.spec.model import Dtype

    if dtype not in get_args(Dtype):
        raise ConfigError(f"--dtype is {dtype!r}.{did_you_mean(dtype, get_args(Dtype))}")
    if not 0 < shard_gb < 1e9:
        raise ConfigError(f"--shard-gb is {shard_gb:g}; it must be above 0")
    found = RunDirectory.open(run, runs)
    from colossus.zoo.hugging_face import architecture_of

    try:
        architecture_of(found.config().model)
    except ConfigError as error:
        raise ConfigError(f"{error}. `colossus train small-llama` trains one that others load") from None
    from colossus.checkpoint.hugging_face import export_run
    from colossus.data import RichProgress

    with RichProgress() as progress:
        exported = export_run(
            found,
            directory,
            dtype=cast("Dtype", dtype),
            checkpoint=step,
            max_shard_bytes=max(1, round(shard_gb * 1e9)),
            progress=progress,
        )
    for damaged in exported.rejected:
        typer.echo(f"warning: {damaged.path} is damaged ({damaged.reason}); used an older one", err=True)
    written = exported.written
    if json:
        from json import dumps

        record = {
            "directory": str(written.path),
            "architecture": written.architecture,
            "step": exported.step,
            "dtype": dtype,
            "num_tensors": written.num_tensors,
            "num_bytes": written.num_bytes,
            "num_files": written.num_files,
        }
        typer.echo(dumps(record))
        return
    from colossus.units import format_bytes

    files = "1 file" if written.num_files == 1 else f"{written.num_files:,} files"
    typer.echo(
        f"{written.path}: {written.architecture}, step {exported.step:,}, {format_bytes(written.num_bytes)} of "
        f"{dtype} in {files}"
    )
    typer.echo(f"  try:         colossus generate {written.path} --prompt 'import '")
    typer.echo(f"  train it on: colossus import {written.path}")
