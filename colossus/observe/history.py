"""An event log, read as the history of one run: what was kept, what was redone, what went wrong."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from colossus.events import (
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    Decision,
    Evaluated,
    Event,
    RunFinished,
    RunStarted,
    StepDone,
    StepSkipped,
)

Problem: TypeAlias = StepSkipped | CheckpointFailed | CheckpointRejected


@dataclass(frozen=True, slots=True)
class History:
    """A run so far. Steps that a crash threw away and a resume did again are there once, as done last."""

    starts: tuple[RunStarted, ...]
    decisions: tuple[Decision, ...]
    steps: tuple[StepDone, ...]
    evaluations: tuple[Evaluated, ...]
    checkpoints: tuple[CheckpointSaved, ...]
    problems: tuple[Problem, ...]
    finished: RunFinished | None
    """How the last process ended; None while it runs, and when it was killed."""

    @property
    def num_steps(self) -> int:
        return self.steps[-1].step + 1 if self.steps else 0

    @property
    def num_tokens(self) -> int:
        return self.steps[-1].tokens if self.steps else 0

    @property
    def bits_per_byte(self) -> float | None:
        """The latest held-out figure."""
        return self.evaluations[-1].bits_per_byte if self.evaluations else None


def history(events: Iterable[Event]) -> History:
    """Folds a log into the history it tells."""
    starts: list[RunStarted] = []
    decisions: list[Decision] = []
    steps: list[StepDone] = []
    evaluations: list[Evaluated] = []
    checkpoints: list[CheckpointSaved] = []
    problems: list[Problem] = []
    finished: RunFinished | None = None
    for event in events:
        match event:
            case RunStarted(first_step=first):
                starts.append(event)
                finished = None
                while steps and steps[-1].step >= first:
                    steps.pop()
                while evaluations and evaluations[-1].step > first:
                    evaluations.pop()
                while checkpoints and checkpoints[-1].step > first:
                    checkpoints.pop()
            case Decision():
                decisions.append(event)
            case StepDone():
                steps.append(event)
            case Evaluated():
                evaluations.append(event)
            case CheckpointSaved():
                checkpoints.append(event)
            case StepSkipped() | CheckpointFailed() | CheckpointRejected():
                problems.append(event)
            case RunFinished():
                finished = event
    return History(
        starts=tuple(starts),
        decisions=tuple(decisions),
        steps=tuple(steps),
        evaluations=tuple(evaluations),
        checkpoints=tuple(checkpoints),
        problems=tuple(problems),
        finished=finished,
    )


def describe_problem(event: Problem) -> str:
    """A sentence for people."""
    match event:
        case StepSkipped():
            what = "loss" if event.loss is None else "gradient"
            last_sample = event.first_sample + event.num_samples - 1
            return (
                f"step {event.step} skipped: its {what} was not finite "
                f"(samples {event.first_sample} to {last_sample}; {event.in_a_row} in a row)"
            )
        case CheckpointFailed():
            return f"checkpoint at step {event.step} not written: {event.reason}; training goes on"
        case CheckpointRejected():
            return f"checkpoint {event.path} is damaged ({event.reason}); an older one is used"
