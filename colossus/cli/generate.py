"""`colossus generate`."""

import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated

import typer

from colossus.cli.options import JsonOption, RunsOption
from colossus.errors import ConfigError

Pieces = Generator[str, None, int]

EPILOG = """\b
Examples:
  colossus generate latest --prompt 'def main('
  colossus generate first-light-001 --prompt 'import ' --temperature 0 --max-tokens 200
  colossus generate latest --prompt 'The ' --top-p 0.9 --num-samples 3 --seed 1 --json
"""


def generate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, its name, or 'latest'.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the model goes on from.")] = "",
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to write at the most.")] = 128,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0: always the likeliest token; 1: as the model says.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Choose among the K likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Choose among the likeliest that together make up P.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed writes the same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Stop before it. Repeatable.")
    ] = None,
    num_samples: Annotated[int, typer.Option(metavar="N", min=1, help="Write so many texts.")] = 1,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Show text while it is written, or when it is whole.")
    ] = True,
    json: JsonOption = False,
    runs: RunsOption = Path("runs"),
) -> None:
    """Let a trained model write, from its newest checkpoint."""
    from colossus.generate import Sampling, load_run
    from colossus.generate import generate as pieces
    from colossus.observe.run_directory import RunDirectory

    _check_prompt(prompt)
    found = RunDirectory.open(run, runs)
    samplings = [
        Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_tokens=max_tokens,
            seed=None if seed is None else seed + i,  # as many texts as asked for, and not one of them twice
            stop=tuple(stop or ()),
        )
        for i in range(num_samples)
    ]
    model, tokenizer, rejected = load_run(found)
    for damaged in rejected:
        typer.echo(f"warning: {damaged.path} is damaged ({damaged.reason}); using an older one", err=True)
    samples: list[dict[str, str | int]] = []
    started = time.perf_counter()
    for i, sampling in enumerate(samplings):
        if i and not json:
            typer.secho(f"\n--- {i + 1} of {num_samples}", dim=True)
        written = pieces(model, tokenizer, prompt, sampling)
        text, num_tokens = _collect(written) if json else _show(prompt, written, stream)
        samples.append({"text": text, "num_tokens": num_tokens})
    if json:
        from json import dumps

        rate = sum(int(sample["num_tokens"]) for sample in samples) / (time.perf_counter() - started)
        typer.echo(dumps({"prompt": prompt, "samples": samples, "tokens_per_s": round(rate, 1)}))


def _check_prompt(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the prompt is not UTF-8 text: a wrong byte after {prompt[: error.start]!r}"
        ) from None


def _show(prompt: str, pieces: Pieces, stream: bool) -> tuple[str, int]:
    """Prints the prompt and what follows, piece by piece or all at once."""
    if stream:
        typer.secho(prompt, bold=True, nl=False)
        text, num_tokens = _collect(pieces, show=lambda piece: typer.echo(piece, nl=False))  # echo flushes
        typer.echo()
    else:
        text, num_tokens = _collect(pieces)
        typer.secho(prompt, bold=True, nl=False)
        typer.echo(text)
    return text, num_tokens


def _collect(pieces: Pieces, show: Callable[[str], None] = lambda piece: None) -> tuple[str, int]:
    """The whole text, and what the generator returns: its number of tokens."""
    text = ""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return text, end.value
        show(piece)
        text += piece
