"""`colossus train`."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colossus.cli.options import (
    CpuSecondsOption,
    DataOption,
    JsonOption,
    MinutesOption,
    RunNameOption,
    RunsOption,
    StepsOption,
    TextFieldOption,
    TokenizerOption,
    TokensOption,
    VocabSizeOption,
    budget_settings,
    data_settings,
    tokenizer_settings,
)
from colossus.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from colossus.observe import Observer
    from colossus.observe.summary import Summary
    from colossus.spec.plan import Plan
    from colossus.spec.run import RunConfig

DEFAULT_RECIPE = "first-light"

EPILOG = """\b
Examples:
  colossus train                                        three minutes, from the Python library's own source
  colossus train --data books/ --data 'web/*.jsonl=3'   a mixture: three samples from web to one from books
  colossus train --tokens 10M --set optimizer.learning_rate=0.01
  colossus train my-run.toml --seed 7 --name seed-7     a whole configuration from a file
  colossus train --print-config > my-run.toml           ... and how to get one to start from
  colossus train --resume first-light-001               go on after an interruption or a crash
  colossus train --resume latest --minutes 10           ... and train for ten minutes in all
  colossus train --plan plan.json --data books/         as many processes as the plan has ranks
  colossus train --resume latest --plan other.json      ... and on, under another layout
  colossus train --json | jq .heldout_bits_per_byte
"""


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help=f"A recipe (see: colossus recipes) or a .toml file. [{DEFAULT_RECIPE}]"
        ),
    ] = None,
    data: DataOption = None,
    text_field: TextFieldOption = None,
    tokenizer: TokenizerOption = None,
    vocab_size: VocabSizeOption = None,
    steps: StepsOption = None,
    tokens: TokensOption = None,
    minutes: MinutesOption = None,
    cpu_seconds: CpuSecondsOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change anything that --print-config shows. Repeatable."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Decides initial weights and sample order.")
    ] = None,
    runs: RunsOption = Path("runs"),
    name: RunNameOption = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Go on with this run: its directory, its name, or 'latest'."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Execute this plan (of: colossus plan --out FILE): its model, batch and layout, on all of its ranks.",
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole configuration as TOML, and train nothing.")
    ] = False,
    json: JsonOption = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard scalars too, into RUNS/tensorboard.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="CPU threads; by default, the cores that are free to use."),
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample/--no-sample", help="Show text that the model wrote.")
    ] = True,
) -> None:
    """Train a model, on whatever machine this is.

    The layout, precision and batch split are planned for the machine; every choice is shown with its reason.
    The run's directory has all of it: configuration, events, checkpoints, curves. Ctrl-C stops after a
    checkpoint.
    """
    budget = budget_settings(
        {"steps": steps, "tokens": tokens, "minutes": minutes, "cpu_seconds": cpu_seconds}
    )
    changes = [
        *data_settings(data, text_field),
        *tokenizer_settings(tokenizer, vocab_size),
        *([f"seed={seed}"] if seed is not None else []),
        *([f"model.vocab_size={vocab_size}"] if vocab_size is not None else []),
        *(settings or []),
    ]
    planned = None
    if plan is not None:
        from colossus.spec.plan import Plan

        planned = Plan.load(plan)
        if recipe is None and resume is None:  # the plan's model is trained, not the recipe's
            name = name or planned.model.name
    if resume is not None:
        config = _resumed_config(resume, runs, budget, [*_words(recipe, name), *changes])
    else:
        config = _new_config(recipe, name, tokenizer, [*budget, *changes], planned)
    if print_config:
        from colossus.spec.config import to_toml

        typer.echo(to_toml(config), nl=False)
        return
    with _stdout_kept_for_json(json):
        summary, reason = _watch(config, runs, name, resume, threads, tensorboard, json, sample, planned)
    if json:
        typer.echo(summary.to_json())
    if reason == "interrupted":
        raise typer.Exit(130)


def _new_config(
    recipe: str | None, name: str | None, tokenizer: Path | None, changes: list[str], plan: "Plan | None"
) -> "RunConfig":
    from colossus.observe.run_directory import check_name
    from colossus.spec.config import run_config

    if tokenizer is not None:  # the model needs a row for every token
        from colossus.data.tokenizer import Tokenizer

        changes = [f"model.vocab_size={Tokenizer.load(tokenizer).vocab_size}", *changes]
    if plan is not None and recipe is None:
        # Nobody chose what the default recipe says of these: the plan's comes first, then what was asked for.
        changes = [*_planned(plan), *changes]
    config = run_config(recipe or DEFAULT_RECIPE, changes)
    if plan is not None:
        from colossus.spec.config import with_plan

        config = with_plan(config, plan)
    check_name(name or config.name)  # before the corpus is prepared, not after
    return config


MOST_BETWEEN_CHECKPOINTS_S = 1800
"""Plans know how often machines fail, and not how often someone pulls a plug."""


def _planned(plan: "Plan") -> list[str]:
    """What a plan says of how a run is configured, beside the model and the batch."""
    from colossus.spec.config import run_config

    every_s = min(plan.estimate.checkpoint_interval_s, MOST_BETWEEN_CHECKPOINTS_S)
    changes = [f"checkpoints.every={max(1, round(every_s))} seconds"]
    if run_config(DEFAULT_RECIPE, []).optimizer.kind != plan.optimizer:
        changes.append(f"optimizer.kind={plan.optimizer}")
    return changes


def _words(recipe: str | None, name: str | None) -> list[str]:
    return [*([recipe] if recipe else []), *([f"--name {name}"] if name else [])]


def _resumed_config(resume: str, runs: Path, budget: list[str], refused: Sequence[str]) -> "RunConfig":
    from colossus.observe.run_directory import RunDirectory
    from colossus.spec.config import override

    run = RunDirectory.open(resume, runs)
    if refused:
        raise ConfigError(
            f"--resume {resume} goes on with that run as it is, so it takes no {', '.join(refused)}, only another "
            f"budget; to start a new run like it: colossus train {run.config_path}"
        )
    return override(run.config(), budget)


def _watch(
    config: "RunConfig",
    runs: Path,
    name: str | None,
    resume: str | None,
    threads: int | None,
    tensorboard: bool,
    json: bool,
    sample: bool,
    plan: "Plan | None",
) -> "tuple[Summary, str]":
    """Trains under the eyes of whoever started it; the summary, and why training ended."""
    from colossus.cli.screen import screen
    from colossus.events import Event, RunFinished
    from colossus.observe.run_directory import RunDirectory
    from colossus.observe.summary import summary_table

    console = screen(stderr=json)
    if plan is not None or (resume is not None and RunDirectory.open(resume, runs).has_plan):
        return _watch_ranks(config, runs, name, resume, threads, plan, console, sample)
    ends: list[str] = []

    def note_end(event: Event) -> None:
        if isinstance(event, RunFinished):
            ends.append(event.reason)

    title = Path(resume).name if resume else name or config.name
    with _view(config, title, console) as view:
        observers: list[Observer] = [view, note_end]
        if tensorboard:
            from colossus.observe.tensorboard import TensorBoard

            # A new run's number is not known yet; the time tells it from its namesakes.
            own = title if resume else f"{title}-{time.strftime('%Y%m%d-%H%M%S')}"
            observers.append(TensorBoard(runs / "tensorboard" / own))
        summary = _run(config, runs, name, resume, observers, threads)
    console.print()
    console.print(summary_table(summary))
    reason = ends[-1] if ends else "budget"
    _show_what_is_next(summary, reason, console, sample)
    return summary, reason


def _watch_ranks(
    config: "RunConfig",
    runs: Path,
    name: str | None,
    resume: str | None,
    threads: int | None,
    plan: "Plan | None",
    console: "Console",
    sample: bool,
) -> "tuple[Summary, str]":
    """The same for a run of many processes; the first of them says how it goes."""
    from colossus.data import RichProgress
    from colossus.events import RunFinished
    from colossus.observe.run_directory import RunDirectory
    from colossus.observe.summary import Summary, summary_table
    from colossus.trainer.run_ranks import resume_ranks, start_ranks

    if resume is not None:
        run = resume_ranks(RunDirectory.open(resume, runs), budget=config.budget, plan=plan, threads=threads)
    else:
        assert plan is not None
        run = start_ranks(
            config,
            plan,
            runs_directory=runs,
            name=name or config.name,
            threads=threads,
            progress=RichProgress(),
        )
    summary = Summary.read(run.summary_path)
    reason = next((e.reason for e in reversed(list(run.events())) if isinstance(e, RunFinished)), "budget")
    console.print()
    console.print(summary_table(summary))
    _show_what_is_next(summary, reason, console, sample)
    return summary, reason


def _run(
    config: "RunConfig",
    runs: Path,
    name: str | None,
    resume: str | None,
    observers: "list[Observer]",
    threads: int | None,
) -> "Summary":
    """The one place where the command line meets the trainer, and torch is imported."""
    from colossus.data import RichProgress
    from colossus.observe.run_directory import RunDirectory
    from colossus.trainer import run

    watching: Any = {"observers": observers, "threads": threads, "progress": RichProgress()}
    if resume is not None:
        return run.resume(RunDirectory.open(resume, runs), budget=config.budget, **watching)
    return run.start(config, runs_directory=runs, name=name or config.name, **watching)


@contextlib.contextmanager
def _view(config: "RunConfig", title: str, console: "Console") -> "Iterator[Observer]":
    """The live view on a terminal, lines elsewhere."""
    if console.is_terminal and not console.is_dumb_terminal:
        from colossus.observe.terminal import TerminalView

        with TerminalView(config, title, console) as view:
            yield view
    else:
        from colossus.observe.lines import Lines

        yield Lines(config, lambda line: print(line, file=console.file, flush=True))


def _show_what_is_next(summary: "Summary", reason: str, console: "Console", sample: bool) -> None:
    from rich.text import Text

    run = Path(summary.run_dir)
    if sample and (run / "sample.txt").is_file():
        console.print("\nThe model writes:\n", style="dim")
        console.print(Text((run / "sample.txt").read_text(encoding="utf-8", errors="replace").rstrip()))
    console.print(f"\n{run}", style="bold", soft_wrap=True)
    notes = ["look:  curves.png, README.md", f"try:   colossus generate {run} --prompt 'import '"]
    notes.append(f"check: colossus compare {run}")
    if reason == "interrupted":
        notes.append(f"go on: colossus train --resume {run}")
    for note in notes:
        console.print(f"  {note}", style="dim", soft_wrap=True)


@contextlib.contextmanager
def _stdout_kept_for_json(json: bool) -> Iterator[None]:
    """What anything prints in there goes to stderr: libraries, compilers and child processes write to the
    descriptor, so it is the descriptor that is turned."""
    if not json:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
