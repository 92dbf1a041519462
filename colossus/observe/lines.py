"""Progress as lines of text, for logs, pipes and machines without a terminal."""

import sys
from collections.abc import Callable

from colossus.events import (
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    Decision,
    Evaluated,
    EvaluationStarted,
    Event,
    RunFinished,
    RunStarted,
    StepDone,
    StepSkipped,
)
from colossus.observe.history import describe_problem
from colossus.observe.tracker import Tracker
from colossus.spec.run import RunConfig
from colossus.units import format_bytes, format_count, format_seconds

_EARLY_INTERVAL_S, _INTERVAL_S = 2.0, 10.0
_EARLY_S = 20.0


def _print(line: str) -> None:
    print(line, file=sys.stdout, flush=True)


class Lines:
    """One aligned line every 2 seconds at first, then every 10; what is rarer than a step gets one at once.

    Time is the events' own, so a replayed log reads as it did live.
    """

    def __init__(self, config: RunConfig, write: Callable[[str], None] = _print) -> None:
        self._tracker = Tracker(config)
        self._write = write
        self._last_s: float | None = None
        self._unprinted = False

    def __call__(self, event: Event) -> None:
        self._tracker.see(event)
        match event:
            case StepDone():
                self._unprinted = True
                if self._is_due(event.time_s):
                    self._print_step(event.time_s)
            case Evaluated():
                self._write(
                    f"{'':4} held-out after {event.step:,} steps: {event.bits_per_byte:.4f} bits per byte "
                    f"({format_count(event.num_heldout_tokens)} tokens, {format_seconds(event.seconds)})"
                )
            case EvaluationStarted():
                self._write(
                    f"{'':4} evaluating on all {format_count(event.num_heldout_tokens)} held-out tokens"
                )
            case CheckpointSaved():
                size, took = format_bytes(event.num_bytes), format_seconds(event.seconds)
                self._write(f"{'':4} checkpoint after {event.step:,} steps: {size}, {took}")
            case Decision():
                self._write(f"{'':4} {event.what}: {event.choice}. {event.reason}")
            case RunStarted():
                self._write(_start_line(event))
            case RunFinished():
                if self._unprinted:
                    self._print_step(event.time_s)
                self._write(end_line(event))
            case StepSkipped() | CheckpointFailed() | CheckpointRejected():
                self._write(f"warning: {describe_problem(event)}")

    def _is_due(self, now_s: float) -> bool:
        if self._last_s is None:
            return True
        start = self._tracker.started
        early = start is None or now_s - start.time_s < _EARLY_S
        return now_s - self._last_s >= (_EARLY_INTERVAL_S if early else _INTERVAL_S)

    def _print_step(self, now_s: float) -> None:
        self._last_s, self._unprinted = now_s, False
        self._write(step_line(self._tracker))


def _start_line(event: RunStarted) -> str:
    how = f"resuming at step {event.first_step:,}" if event.first_step else "starting"
    return f"{how}: {format_count(event.num_params)} parameters, process {event.process_id} on {event.host}"


def end_line(event: RunFinished) -> str:
    """Why training ended."""
    how = {"budget": "finished: the budget is used up", "diverged": "stopped: the training diverged"}
    return f"{how.get(event.reason, event.reason)}, after {event.step:,} steps"


def step_line(tracker: Tracker) -> str:
    """Where the run stands, in columns that stay put from line to line."""
    step, left = tracker.step, tracker.time_left_s
    if step is None:
        return "no steps yet"
    loss = tracker.loss.value or step.loss
    heldout = f"{tracker.bits_per_byte[-1]:.3f}" if tracker.bits_per_byte else "-"
    return (
        f"{tracker.fraction:4.0%} step {step.step + 1:>7,}  {format_seconds(step.seconds):>8}  "
        f"loss {loss:6.3f}  bits/byte {heldout:>5}  lr {step.learning_rate:.1e}  "
        f"{format_count(tracker.tokens_per_s):>5} tok/s  MFU {tracker.mfu:4.0%}  "
        f"{format_bytes(step.memory_bytes):>9}  {format_seconds(left) if left is not None else '?':>8} left"
    )
