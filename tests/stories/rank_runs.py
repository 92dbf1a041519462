"""Runs of many ranks for stories: their plans, what befalls a rank of one, and that nothing of it is left.

What is to happen inside a rank is Python code that every rank runs before anything else, as a `sitecustomize` of
the processes of that run alone; `rank` and `later` are defined in it.
"""

import os
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from colossus.observe.run_directory import RunDirectory
from colossus.spec.config import override, run_config, to_toml
from colossus.spec.model import ModelSpec
from tests.parallel.plans import write_plan
from tests.stories.processes import PLAIN, Done, Process, recipe, running

TWO_LAYERS = PLAIN.model_copy(update={"num_layers": 2})
ENDS_WITHIN_S = 30.0
MARK = "STORY_MARK"

_PRELUDE = """
import importlib, os, signal, sys, time

if "RANK" in os.environ:
    rank = int(os.environ["RANK"])
    if sys.orig_argv[1:3] == ["-m", "colossus.trainer.run_ranks"]:
        # Two runs on a busy machine may find another library the faster one, whose sums differ in the last bit.
        from colossus.trainer import machine

        machine.float32_libraries = lambda: ("default",)
"""


@dataclass
class Ranks:
    """A folder with a recipe, plans and runs; all processes that come of it bear one mark."""

    folder: Path
    settings: tuple[str, ...] = ()
    model: ModelSpec = TWO_LAYERS
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.recipe = recipe(self.folder, dtype=None)
        config = override(run_config(self.recipe, []), [*self.settings])
        Path(self.recipe).write_text(to_toml(config.model_copy(update={"model": self.model})))

    def plan(self, name: str = "plan", **settings: Any) -> str:
        return str(write_plan(self.folder / f"{name}.json", self.model, **settings))

    def run(self, name: str) -> RunDirectory:
        return RunDirectory(self.folder / "runs" / f"{name}-001")

    def new(self, name: str, plan: str | None) -> tuple[str, ...]:
        """The command that trains a new run, by one process where there is no plan."""
        planned = () if plan is None else ("--plan", plan)
        return ("train", self.recipe, *planned, "--runs", str(self.folder / "runs"), "--name", name)

    @contextmanager
    def running(
        self, *arguments: str, in_ranks: str = "", before: Callable[[], None] | None = None
    ) -> Iterator[Process]:
        """As `processes.running`; `in_ranks` is the code that each rank begins with."""
        folder = self.folder / f"site-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(
            _PRELUDE + textwrap.indent(textwrap.dedent(in_ranks), " " * 4)
        )
        with running(*arguments, before=_Before(folder, self.mark, before)) as process:
            yield process

    def colossus(
        self,
        *arguments: str,
        in_ranks: str = "",
        before: Callable[[], None] | None = None,
        status: int = 0,
    ) -> Done:
        """Runs to its end, which is with `status` and leaves no process."""
        with self.running(*arguments, in_ranks=in_ranks, before=before) as process:
            done = Done(process.wait(), process.out, process.err)
        assert done.status == status, f"{arguments} ended with {done.status}:\n{done.out}\n{done.err}"
        self.nothing_is_left()
        return done

    def nothing_is_left(self) -> None:
        """Of all that was started, sooner or later; the guardian of a run that was killed takes a moment."""
        ends_s = time.monotonic() + ENDS_WITHIN_S
        while left := self._alive():
            assert time.monotonic() < ends_s, f"left behind: {left}"
            time.sleep(0.05)

    def _alive(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


@dataclass(frozen=True)
class _Before:
    """What the launcher's process does first: its children shall know the mark, and run the ranks' code."""

    folder: Path
    mark: str
    also: Callable[[], None] | None

    def __call__(self) -> None:
        os.environ[MARK] = self.mark
        os.environ["PYTHONPATH"] = os.pathsep.join([str(self.folder), *_python_path()])
        if self.also is not None:
            self.also()


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def rank_processes(process: Process) -> dict[int, psutil.Process]:
    """The living ranks of a launcher, by number."""
    found = {}
    with suppress(psutil.Error, OSError):
        for child in psutil.Process(process.process.pid).children():
            with suppress(psutil.Error, OSError):
                if (rank := child.environ().get("RANK")) is not None:
                    found[int(rank)] = child
    return found


def patience(process: Process) -> None:
    """From now on it has `ENDS_WITHIN_S` to end."""
    process.ends_s = time.monotonic() + ENDS_WITHIN_S
