"""`colossus chat`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from colossus.cli.options import (
    ModelArgument,
    RunsOption,
    SamplingSeedOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from colossus.errors import ColossusError

if TYPE_CHECKING:
    from colossus.generate import LoadedModel, Sampling
    from colossus.generate.chat import ChatFormat

EPILOG = """\b
Examples:
  colossus chat Llama-3.2-1B-Instruct --system 'Answer in one sentence.'
  colossus chat latest --temperature 0
  echo 'What is a tensor?' | colossus chat Llama-3.2-1B-Instruct

While it runs: /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer.
"""


def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of an answer at the most.")] = 512,
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SamplingSeedOption = None,
    stop: StopOption = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Talk with a model, by its own chat template; a model that has none continues a transcript."""
    from colossus.generate import Sampling, load_model
    from colossus.generate.chat import chat_format

    def sampling(more_stops: tuple[str, ...]) -> Sampling:
        return Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_tokens=max_tokens,
            seed=seed,
            stop=(*(stop or ()), *more_stops),
        )

    sampling(())  # mistakes are said before anything is loaded
    loaded = load_model(model, runs)
    for damaged in loaded.rejected:
        typer.echo(f"warning: {damaged.path} is damaged ({damaged.reason}); using an older one", err=True)
    form = chat_format(loaded)
    _converse(loaded, form, sampling(form.stop), system)


def _converse(loaded: "LoadedModel", form: "ChatFormat", sampling: "Sampling", system: str | None) -> None:
    context = loaded.model.spec.context_tokens
    # A quarter of a small context is left for the answer; the conversation has the rest.
    room = context - min(sampling.max_tokens, max(1, context // 4))
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    interactive = sys.stdin.isatty()
    if interactive:
        typer.secho(f"{loaded.name}: /reset forgets, /exit leaves, Ctrl-C stops an answer", dim=True)
    while (said := _next_line(interactive)) is not None:
        match said.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                messages = list(start)
                typer.secho("forgotten", dim=True, err=True)
                continue
        asked = [*messages, {"role": "user", "content": said}]
        try:
            ids, num_dropped = form.fit(asked, room)
        except ColossusError as error:
            typer.secho(f"error: {error}", err=True)
            continue
        if num_dropped:
            kept = len(start)
            asked = [*asked[:kept], *asked[kept + num_dropped :]]
            typer.secho(
                f"the context of {context:,} tokens is full: the oldest {num_dropped} messages are left out",
                dim=True,
                err=True,
            )
        messages = [*asked, {"role": "assistant", "content": _answer(loaded, form, sampling, ids)}]


def _next_line(interactive: bool) -> str | None:
    """What is said next; None at the end."""
    while True:
        try:
            if interactive:
                return input("> ")
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        except EOFError:
            typer.echo()
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            typer.secho("\n/exit or Ctrl-D leaves", dim=True, err=True)
        except UnicodeDecodeError:
            typer.secho("error: that is not UTF-8 text", err=True)


def _answer(loaded: "LoadedModel", form: "ChatFormat", sampling: "Sampling", ids: list[int]) -> str:
    """Shows an answer while it is written; what there is of it when Ctrl-C stops it."""
    from colossus.generate import generate_tokens
    from colossus.generate.text import TextWriter

    writer = TextWriter(loaded.tokenizer, sampling, form.ends)
    text = ""
    try:
        for token in generate_tokens(loaded.model, ids, sampling):
            piece = writer.push(token)
            typer.echo(piece if text else piece.lstrip(), nl=False)
            text += piece
            if writer.finish_reason is not None:
                break
    except KeyboardInterrupt:
        text += (piece := writer.close())
        typer.echo(piece, nl=False)
        typer.secho(" … stopped", dim=True, nl=False)
    typer.echo()
    return text.strip()
