"""The live view of a run in a terminal."""

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from colossus.events import Decision, Event, RunFinished, RunStarted
from colossus.observe.chart import braille, sparkline
from colossus.observe.tracker import Tracker
from colossus.spec.run import RunConfig
from colossus.units import format_bytes, format_count, format_seconds

_REFRESHES_PER_S = 2
_CHART_ROWS = 5


class TerminalView:
    """An observer that keeps one picture of the run up to date.

    A context manager, so that the terminal is left as it was.
    Before the first step there is nothing to draw: decisions are printed as they come, and scroll away above.
    """

    def __init__(self, config: RunConfig, title: str, console: Console | None = None) -> None:
        self._config, self._title = config, title
        self._console = console or Console()
        self._tracker = Tracker(config)
        self._lock = threading.Lock()  # the picture is drawn by a thread of Live's
        self._live: Live | None = None

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._tracker.see(event)
        if isinstance(event, Decision) and self._live is None:
            self._console.print(_decision(event))
        elif isinstance(event, RunStarted) and self._live is None:
            self._live = Live(
                self, console=self._console, refresh_per_second=_REFRESHES_PER_S, vertical_overflow="visible"
            )
            self._live.start()
        elif isinstance(event, RunFinished):
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the last picture standing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            yield self._draw(min(options.max_width, 110))

    def _draw(self, width: int) -> Group:
        tracker = self._tracker
        parts: list[Text | Table] = [Text(), self._heading(), self._bar(width), Text()]
        if tracker.step is None:
            since = time.time() - tracker.started.time_s if tracker.started else 0.0
            parts.append(Text(f" first step … {format_seconds(since)}", style="dim"))
        else:
            parts += [*self._loss_chart(width), self._heldout(width), Text(), self._figures()]
        parts += [_note("warning", warning, "yellow") for warning in tracker.warnings]
        parts += [_decision(decision) for decision in tracker.decisions if self._since_start(decision)]
        return Group(*parts)

    def _since_start(self, decision: Decision) -> bool:
        """Earlier ones stand above the picture already."""
        return self._tracker.started is not None and decision.time_s >= self._tracker.started.time_s

    def _heading(self) -> Text:
        tracker = self._tracker
        params = format_count(tracker.started.num_params) if tracker.started else "?"
        return Text.assemble(
            (f" {self._title}", "bold"),
            (
                f"   {self._config.model.name}, {params} parameters, for {self._config.budget.describe()}",
                "dim",
            ),
        )

    def _bar(self, width: int) -> Table:
        tracker = self._tracker
        left = tracker.time_left_s
        gone = tracker.step.seconds if tracker.step else 0.0
        row = Table.grid(padding=(0, 1))
        row.add_row(
            "",
            ProgressBar(total=1.0, completed=tracker.fraction, width=max(10, width - 42)),
            Text(f"{tracker.fraction:4.0%}", style="bold"),
            Text(
                f"{format_seconds(gone)} gone, {format_seconds(left) if left is not None else '?'} left",
                style="dim",
            ),
        )
        return row

    def _loss_chart(self, width: int) -> list[Text]:
        points, loss = self._tracker.losses.points, self._tracker.loss.value
        # The start is a cliff that would flatten all that follows: leave out the first twentieth.
        shown = points[len(points) // 20 :]
        rows = braille(shown, max(10, width - 30), _CHART_ROWS)
        labels = [""] * _CHART_ROWS
        if shown:
            labels[0], labels[-1] = f"{max(shown):.2f}", f"{min(shown):.2f}"
        lines = []
        for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
            name = (" training loss", f"{loss:9.3f} nats") if loss is not None else ("", "")
            head = name[0] if i == 0 else name[1] if i == 1 else " per token" if i == 2 else ""
            style = "bold" if i == 1 else "dim"
            lines.append(Text.assemble((f"{head:<17}", style), (f"{label:>6} ", "dim"), (row, "cyan")))
        return lines

    def _heldout(self, width: int) -> Text:
        values, running = self._tracker.bits_per_byte, self._tracker.evaluating
        if running is not None:
            since, size = time.time() - running.time_s, format_count(running.num_heldout_tokens)
            return Text(f" held-out        measuring on all {size} tokens … {format_seconds(since)}")
        if not values:
            return Text(" held-out            not yet measured", style="dim")
        return Text.assemble(
            (f" held-out        {values[-1]:7.4f} ", "bold"),
            (f"{sparkline(values, max(10, width - 50)):<2}", "magenta"),
            (" bits per byte", "dim"),
        )

    def _figures(self) -> Table:
        tracker, step = self._tracker, self._tracker.step
        assert step is not None
        grid = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(4):
            grid.add_column(no_wrap=True)
        saved = tracker.checkpoint
        checkpoint = (
            f"step {saved.step:,}, {format_seconds(max(0.0, time.time() - saved.time_s))} ago"
            if saved
            else "none yet"
        )
        grid.add_row(
            _figure(" step", f"{step.step + 1:,}"),
            _figure("tokens", format_count(step.tokens)),
            _figure("speed", f"{format_count(tracker.tokens_per_s)} tok/s"),
            _figure("MFU", f"{tracker.mfu:.0%}"),
        )
        grid.add_row(
            _figure(" lr", f"{step.learning_rate:.2g}"),
            _figure("gradient", f"{step.gradient_norm:.2g}"),
            _figure("memory", format_bytes(step.memory_bytes)),
            _figure("checkpoint", checkpoint),
        )
        return grid


def _figure(label: str, value: str) -> Text:
    return Text.assemble((f"{label} ", "dim"), value)


def _note(label: str, text: str, style: str) -> Text:
    return Text.assemble((f" {label} ", f"bold {style}"), text)


def _decision(event: Decision) -> Text:
    return Text.assemble((f" {event.what} ", "dim"), (event.choice, "bold"), (f"  {event.reason}", "dim"))
