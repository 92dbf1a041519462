"""`colossus evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colossus.cli.options import (
    JsonOption,
    ModelArgument,
    RunsOption,
    TextFieldOption,
)
from colossus.errors import ConfigError

if TYPE_CHECKING:
    from colossus.evaluate.settings import Settings
    from colossus.generate import LoadedModel

EPILOG = """\b
Examples:
  colossus evaluate latest                                    the run's own held-out text, as its summary says
  colossus evaluate latest --data book.txt --data stdlib      bits per byte of any text
  colossus evaluate my-model --data 'web/*.jsonl' --stride 64 --max-bytes 10M
  colossus evaluate latest --tasks arc_easy,hellaswag --limit 100
  colossus evaluate latest --tasks my.yaml,other --include my/tasks --num-fewshot 3 --out results.json

\b
Tasks are lm-eval's: its own by name, yours as .yaml files, which may run Python code of theirs: use those you trust.
"""


def evaluate(
    model: ModelArgument,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Text to measure: a file, directory, glob or 'stdlib'. Repeatable. [the run's own held-out text]",
        ),
    ] = None,
    text_field: TextFieldOption = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="N", help="The first so many bytes of each --data: 10M.")
    ] = None,
    files: Annotated[bool, typer.Option("--files", help="A row for each file of --data.")] = False,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens that the model sees. [as trained; 2,048 at most for a directory]"
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Begin a window every N tokens, so that each token has at least context - N before it. "
            "[windows do not overlap, as in training]",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(metavar="NAME,…", help="Tasks of lm-eval, by name or .yaml file.")
    ] = None,
    include: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A folder of task files. Repeatable.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(metavar="N", help="So many documents of each task; below 1: that share.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(metavar="K", min=0, help="Examples in each prompt. [as the task says]")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask tasks by the model's chat template.")] = False,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences at a time.")] = 8,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="What matmuls run in. [as trained; float32]")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the JSON object here.")] = None,
    json: JsonOption = False,
    runs: RunsOption = Path("runs"),
) -> None:
    """Measure a model: bits per byte of text, and tasks of lm-eval.

    Without --data or --tasks: all held-out text of the run, cut as in training.
    """
    from colossus.cli.screen import screen
    from colossus.data import RichProgress

    names = [name.strip() for part in tasks or () for name in part.split(",") if name.strip()]
    _check_options(names, data, tasks, include, limit, num_fewshot, chat, text_field, max_bytes, files, out)
    most = None if max_bytes is None else _bytes(max_bytes)
    found: Sequence[Any] = ()
    if names:
        from colossus.evaluate.tasks import find_tasks

        found = find_tasks(names, include or ())  # before a large model is read, not after

    from colossus.evaluate.settings import settings_of
    from colossus.generate import load_model

    loaded = load_model(model, runs)
    for damaged in loaded.rejected:
        typer.echo(f"warning: {damaged.path} is damaged ({damaged.reason}); using an older one", err=True)
    settings = settings_of(loaded, context_tokens=context, stride_tokens=stride, dtype=dtype, batch=batch)
    record: dict[str, Any] = {"model": loaded.name, "path": str(loaded.path)}
    console = screen()
    if data or not names:
        with RichProgress() as progress:
            record["text"] = _measure(loaded, settings, data, text_field, most, files, progress)
        if not json:
            from colossus.cli.evaluate_tables import text_table

            for line in text_table(record["text"]):
                console.print(line)
    if names:
        from colossus.cli.evaluate_tables import task_table

        with RichProgress() as progress:
            record["tasks"] = _run(loaded, settings, context, found, limit, num_fewshot, chat, progress)
        if not json:
            console.print(task_table(record["tasks"]))
    from json import dumps

    if out is not None:
        _write(out, dumps(record, indent=2) + "\n")
    if json:
        typer.echo(dumps(record))


def _check_options(
    names: Sequence[str],
    data: list[str] | None,
    tasks: list[str] | None,
    include: list[Path] | None,
    limit: float | None,
    num_fewshot: int | None,
    chat: bool,
    text_field: str | None,
    max_bytes: str | None,
    files: bool,
    out: Path | None,
) -> None:
    """Raises ConfigError for an option that goes with another one that is not there, and what cannot be."""
    of_tasks = {"--include": include, "--limit": limit, "--num-fewshot": num_fewshot, "--chat": chat or None}
    of_data = {"--text-field": text_field, "--max-bytes": max_bytes, "--files": files or None}
    if tasks is not None and not names:
        raise ConfigError("--tasks names no task")
    for what, there, options in (("--tasks", names, of_tasks), ("--data", data, of_data)):
        lost = [option for option, value in options.items() if value is not None]
        if lost and not there:
            raise ConfigError(f"{lost[0]} goes with {what}; give {what} too")
    if limit is not None and not 0 < limit < float("inf"):
        raise ConfigError(f"--limit is {limit:g}; it is a number of documents, or a share below 1")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(
            f"--out {out}: " + ("it is a folder" if out.is_dir() else f"there is no folder {out.parent}")
        )


def _bytes(text: str) -> int:
    from colossus.units import parse_number

    try:
        number = int(parse_number(text))
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"--max-bytes: {error}") from None
    if number < 1:
        raise ConfigError(f"--max-bytes is {text}; it must be above 0")
    return number


def _measure(
    loaded: "LoadedModel",
    settings: "Settings",
    data: list[str] | None,
    text_field: str | None,
    max_bytes: int | None,
    files: bool,
    progress: Any,
) -> dict[str, Any]:
    """What `--json` says of text."""
    from colossus.evaluate.measure import measure_held_out, measure_text
    from colossus.spec.data import Source

    if data:
        sources = tuple(Source(path=path, text_field=text_field or "text") for path in data)
        measured = measure_text(
            loaded, sources, settings, max_bytes=max_bytes, by_file=files, progress=progress
        )
    else:
        measured = measure_held_out(loaded, settings, progress=progress)
    if measured.skipped:
        typer.echo(f"skipped: {measured.skipped}", err=True)
    return measured.record()


def _run(
    loaded: "LoadedModel",
    settings: "Settings",
    context: int | None,
    tasks: Sequence[Any],
    limit: float | None,
    num_fewshot: int | None,
    chat: bool,
    progress: Any,
) -> list[dict[str, Any]]:
    """What `--json` says of tasks."""
    from dataclasses import asdict

    from colossus.evaluate.language_model import ColossusLM
    from colossus.evaluate.tasks import run_tasks

    if chat and loaded.chat_template is None:
        raise ConfigError(f"{loaded.name} has no chat template; leave out --chat")
    asked = ColossusLM(
        loaded, context_tokens=context, batch=settings.batch, dtype=settings.torch_dtype, progress=progress
    )
    metrics = run_tasks(asked, tasks, limit=limit, num_fewshot=num_fewshot, chat=chat, progress=progress)
    return [asdict(metric) for metric in metrics]


def _write(path: Path, text: str) -> None:
    from colossus.data.storage import write_atomically

    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror or error}") from None
