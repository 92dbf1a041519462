"""How long work reports itself: a small protocol, silent by default, and a form for people."""

import sys
import time
from types import TracebackType
from typing import Any, Protocol, TextIO

from colossus.units import format_count


class Progress(Protocol):
    """Told what is being done. One stage runs at a time; the next `stage` ends the one before."""

    def stage(self, name: str, total: int | None) -> None:
        """A new stage begins. `total` is in whatever unit `advance` counts, None when not known ahead."""

    def advance(self, amount: int) -> None:
        """So much more of the current stage is done."""


class SilentProgress:
    """Says nothing."""

    def stage(self, name: str, total: int | None) -> None:
        """Ignored."""

    def advance(self, amount: int) -> None:
        """Ignored."""


class RichProgress:
    """A bar on a terminal; elsewhere one plain line when a stage begins, and one every `every_s` seconds.

    Use it as a context manager, so that the terminal is left as it was found.
    """

    def __init__(self, stream: TextIO | None = None, every_s: float = 10.0) -> None:
        self._stream = stream or sys.stderr
        self._every_s = every_s
        self._name = ""
        self._total: int | None = None
        self._done = 0
        self._said_at = 0.0
        self._bars: Any = None
        self._task: Any = None

    def __enter__(self) -> "RichProgress":
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[amount]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def stage(self, name: str, total: int | None) -> None:
        """Starts a new bar, or says one line."""
        self._name, self._total, self._done = name, total, 0
        self._said_at = time.monotonic()
        if self._bars is None:
            print(name, file=self._stream, flush=True)
            return
        if self._task is not None:
            self._bars.stop_task(self._task)
        self._task = self._bars.add_task(name, total=total, amount="")

    def advance(self, amount: int) -> None:
        """Moves the bar, or says a line when the last one is old enough."""
        self._done += amount
        if self._bars is not None:
            self._bars.update(self._task, completed=self._done, amount=self._amount())
        elif time.monotonic() - self._said_at >= self._every_s:
            self._said_at = time.monotonic()
            print(f"{self._name}: {self._amount()}", file=self._stream, flush=True)

    def _amount(self) -> str:
        if self._total is None:
            return format_count(self._done)
        return f"{format_count(self._done)} of {format_count(self._total)}"
