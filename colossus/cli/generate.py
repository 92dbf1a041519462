"""`colossus generate`."""

from pathlib import Path
from typing import Annotated

import typer

from colossus.cli.options import JsonOption, RunsOption

EPILOG = """\b
Examples:
  colossus generate latest --prompt 'def main('
  colossus generate first-light-001 --prompt 'import ' --temperature 0 --max-tokens 200
  colossus generate latest --prompt 'The ' --top-p 0.9 --num-samples 3 --seed 1 --json
"""


def generate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, its name, or 'latest'.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the model goes on from.")] = "",
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to write at the most.")] = 128,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0.0, help="0: always the likeliest token; 1: as the model says.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="Only from the K likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", min=0.0, max=1.0, help="Only from the likeliest that make up P."),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed writes the same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Stop at this text. Repeatable.")
    ] = None,
    num_samples: Annotated[int, typer.Option(metavar="N", min=1, help="Write so many texts.")] = 1,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Show the text while it is written.")
    ] = True,
    json: JsonOption = False,
    runs: RunsOption = Path("runs"),
) -> None:
    """Let a trained model write, from its newest checkpoint."""
    raise NotImplementedError
