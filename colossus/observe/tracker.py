"""Where a run stands right now: events in, a live view's figures out. For the view and the lines alike."""

import math
from collections import deque

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
from colossus.observe.meters import Smoothed, Thinned, seconds_left, throughput
from colossus.spec.duration import Progress
from colossus.spec.run import RunConfig


class Tracker:
    """Takes every event; costs a few microseconds for each, however long the run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.started: RunStarted | None = None
        self.step: StepDone | None = None
        self.loss = Smoothed(half_life=20)
        self.losses = Thinned()
        self.bits_per_byte: list[float] = []
        self.evaluating: EvaluationStarted | None = None
        self.checkpoint: CheckpointSaved | None = None
        self.decisions: deque[Decision] = deque(maxlen=4)
        self.warnings: deque[str] = deque(maxlen=3)
        self.finished: RunFinished | None = None
        self._speeds: deque[float] = deque(maxlen=20)
        self._utilisations: deque[float] = deque(maxlen=20)
        self._fractions: deque[tuple[float, float]] = deque(maxlen=100)

    def see(self, event: Event) -> None:
        match event:
            case StepDone():
                self._see_step(event)
            case EvaluationStarted():
                self.evaluating = event
            case Evaluated():
                self.bits_per_byte.append(event.bits_per_byte)
                self.evaluating = None
            case CheckpointSaved():
                self.checkpoint = event
            case Decision():
                self.decisions.append(event)
            case StepSkipped() | CheckpointFailed() | CheckpointRejected():
                self.warnings.append(describe_problem(event))
            case RunStarted():
                self.started = event
            case RunFinished():
                self.finished = event

    def _see_step(self, event: StepDone) -> None:
        self.step = event
        if math.isfinite(event.loss):
            self.loss = self.loss.add(event.loss)
            self.losses.add(event.loss)
        self._speeds.append(event.tokens_per_s)
        self._utilisations.append(event.mfu)
        self._fractions.append((event.time_s, self.fraction))

    @property
    def progress(self) -> Progress:
        if self.step is None:
            return Progress()
        return Progress(self.step.step + 1, self.step.tokens, self.step.seconds, self.step.cpu_seconds)

    @property
    def fraction(self) -> float:
        """The part of the budget that is used, from 0 to 1."""
        return min(1.0, self.config.budget.done(self.progress))

    @property
    def time_left_s(self) -> float | None:
        return seconds_left(self._fractions)

    @property
    def tokens_per_s(self) -> float:
        return throughput(list(self._speeds))

    @property
    def mfu(self) -> float:
        return throughput(list(self._utilisations))
