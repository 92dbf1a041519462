"""What can happen in a run, and the log it is written to.

The trainer and the simulator emit the same events, so whatever reads a log cannot tell a rehearsed run from a real
one. The log is JSON lines, one event a line, only ever appended to; a line torn by a crash is passed over on reading.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened. `time_s` is seconds since 1970 (wall clock; simulated time in a simulation)."""

    time_s: float = field(default_factory=time.time)
    kinds: ClassVar[dict[str, type["Event"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        Event.kinds[cls.__name__] = cls  # dataclass(slots=True) makes a second class: the last one stays

    def to_json(self) -> str:
        return json.dumps({"event": type(self).__name__, **dataclasses.asdict(self)}, separators=(",", ":"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """The process is about to run its first step: step 0, or the one after the checkpoint it resumes from."""

    first_step: int
    num_params: int
    host: str
    process_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision(Event):
    """Something was chosen, and why."""

    what: str
    choice: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone(Event):
    """One optimizer step. Losses are nats per token, `tokens` and `seconds` count from the start of the run.

    `busiest_expert`: the tokens of the busiest expert over the mean of its layer, in the worst layer; None for models
    without experts.
    """

    step: int
    tokens: int
    seconds: float
    cpu_seconds: float
    step_time_s: float
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens_per_s: float
    mfu: float
    memory_bytes: int
    busiest_expert: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSkipped(Event):
    """A step's loss or gradient was not finite: it was not applied. `first_sample` and `num_samples` name its batch."""

    step: int
    loss: float | None
    gradient_norm: float | None
    first_sample: int
    num_samples: int
    in_a_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationStarted(Event):
    """Training is done; all held-out text is being looked at, which can take a while."""

    step: int
    num_heldout_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """Held-out text after `step` steps."""

    step: int
    tokens: int
    loss: float
    bits_per_byte: float
    num_heldout_tokens: int
    seconds: float
    """What the evaluation took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(Event):
    step: int
    path: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFailed(Event):
    """A checkpoint could not be written; training goes on, and the one before it stays."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRejected(Event):
    """A checkpoint was found damaged on loading; an older one is used."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished(Event):
    """The process ended in good order. `reason`: `budget`, `interrupted` or `diverged`."""

    step: int
    reason: str


class EventLog:
    """Appends events to a file; every line reaches the system at once, so a killed process loses none.

    Raises OSError where the file cannot be opened. A write that fails later (disk full) is counted in `num_lost`
    and training goes on: a log must not stop what it logs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_lost = 0
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._finish_torn_line()

    def write(self, event: Event) -> None:
        try:
            os.write(self._file, (event.to_json() + "\n").encode())
        except OSError:
            self.num_lost += 1

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _finish_torn_line(self) -> None:
        """A crash can leave half a line; end it, so that the next event starts on a line of its own."""
        size = self.path.stat().st_size
        if size:
            with self.path.open("rb") as file:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    os.write(self._file, b"\n")


def read_events(path: Path) -> Iterator[Event]:
    """The events of a log in order. Torn lines and kinds of event of a newer version are passed over."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
                yield Event.kinds[record.pop("event")](**record)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
