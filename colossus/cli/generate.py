"""`colossus generate`."""

import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from colossus.cli.options import (
    JsonOption,
    ModelArgument,
    RunsOption,
    SamplingSeedOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from colossus.errors import ConfigError

if TYPE_CHECKING:
    from colossus.generate import LoadedModel, Sampling

Pieces = Generator[str, None, int]

EPILOG = """\b
Examples:
  colossus generate latest --prompt 'def main('
  colossus generate first-light-001 --prompt 'import ' --temperature 0 --max-tokens 200
  colossus generate latest --prompt 'The ' --top-p 0.9 --num-samples 3 --seed 1 --json
  colossus generate Llama-3.2-1B --prompts questions.txt --out answers.jsonl
"""


def generate(
    run: ModelArgument,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the model goes on from.")] = "",
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Many prompts at once: one a line, or .jsonl with "prompt". Writes JSON lines.',
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where those lines go, once all are there. [stdout]")
    ] = None,
    max_batch: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many of them are written at once.")
    ] = 16,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to write at the most.")] = 128,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SamplingSeedOption = None,
    stop: StopOption = None,
    num_samples: Annotated[int, typer.Option(metavar="N", min=1, help="Write so many texts.")] = 1,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Show text while it is written, or when it is whole.")
    ] = True,
    json: JsonOption = False,
    runs: RunsOption = Path("runs"),
) -> None:
    """Let a trained model write: a run's newest checkpoint, or a Hugging Face directory."""
    if prompts is not None and prompt:
        raise ConfigError("--prompt and --prompts contradict each other; give one of them")
    if out is not None and prompts is None:
        raise ConfigError("--out is where the answers to --prompts go; give --prompts too")
    many = None if prompts is None else _read_prompts(prompts)
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {out}: there is no directory {out.absolute().parent}")
    if out is not None and out.is_dir():
        raise ConfigError(f"cannot write {out}: it is a directory")
    from colossus.generate import Sampling, load_model
    from colossus.generate import generate as pieces

    _check_prompt(prompt)
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
    loaded = load_model(run, runs)
    for damaged in loaded.rejected:
        typer.echo(f"warning: {damaged.path} is damaged ({damaged.reason}); using an older one", err=True)
    if many is not None:
        _write_many(loaded, many, samplings, out, max_batch, json)
        return
    samples: list[dict[str, str | int]] = []
    started = time.perf_counter()
    for i, sampling in enumerate(samplings):
        if i and not json:
            typer.secho(f"\n--- {i + 1} of {num_samples}", dim=True)
        written = pieces(loaded.model, loaded.tokenizer, prompt, sampling, borders=loaded.borders)
        text, num_tokens = _collect(written) if json else _show(prompt, written, stream)
        samples.append({"text": text, "num_tokens": num_tokens})
    if json:
        from json import dumps

        rate = sum(int(sample["num_tokens"]) for sample in samples) / (time.perf_counter() - started)
        typer.echo(dumps({"prompt": prompt, "samples": samples, "tokens_per_s": round(rate, 1)}))


def _read_prompts(path: Path) -> list[str]:
    """One prompt a line, or the field `prompt` of each line of a .jsonl. Raises ConfigError with the line."""
    from json import loads

    if path.exists() and not path.is_file():
        raise ConfigError(f"--prompts {path} is not a file; give one with a prompt on each line")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read --prompts {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts {path} is not UTF-8 text, from byte {error.start} on") from None
    if not content.strip():
        raise ConfigError(f"--prompts {path} is empty; put a prompt on each line")
    lines = [line.removesuffix("\r") for line in content.removesuffix("\n").split("\n")]
    if path.suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--prompts {path}, line {number} is not JSON: {error}") from None
        text = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ConfigError(f'--prompts {path}, line {number} has no text under "prompt"')
        _check_prompt(text)
        found.append(text)
    return found


def _write_many(
    loaded: "LoadedModel",
    prompts: list[str],
    samplings: "list[Sampling]",
    out: Path | None,
    max_batch: int,
    json: bool,
) -> None:
    """An answer of each sampling to each prompt, in the order of the file."""
    from json import dumps

    from colossus.data.storage import write_atomically
    from colossus.generate import generate_batch

    asked = [(prompt, sampling) for prompt in prompts for sampling in samplings]
    started = time.perf_counter()
    completions = generate_batch(
        loaded.model,
        loaded.tokenizer,
        [prompt for prompt, _ in asked],
        [sampling for _, sampling in asked],
        borders=loaded.borders,
        max_rows=max_batch,
    )
    took_s = time.perf_counter() - started
    samples = [
        {
            "prompt": prompt,
            "text": completion.text,
            "num_tokens": completion.num_tokens,
            "finish_reason": completion.finish_reason,
        }
        for (prompt, _), completion in zip(asked, completions, strict=True)
    ]
    rate = round(sum(completion.num_tokens for completion in completions) / took_s, 1)
    lines = "".join(f"{dumps(sample, ensure_ascii=False)}\n" for sample in samples)
    if out is not None:
        try:
            write_atomically(out, lines.encode())
        except OSError as error:
            raise ConfigError(f"cannot write {out}: {error.strerror or error}") from None
    if json:
        typer.echo(dumps({"samples": samples, "tokens_per_s": rate}))
    elif out is None:
        typer.echo(lines, nl=False)
    else:
        typer.echo(f"{out}: {len(samples):,} texts, {rate:,.1f} tokens/s")


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
