"""What a run measured of itself, from its events; to be set beside what its plan estimated (gap.py).

report = measure(run)         of a directory
report = measured(events)     of a log, or of a rehearsal's
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
)
from colossus.observe.run_directory import RunDirectory
from colossus.observe.summary import Summary
from colossus.spec.ranged import Ranged

SETTLING_STEPS = 3
"""The first steps of a process, which compile, fill caches and make the optimizer's state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WallTime:
    """Where the seconds of a run went, from its first process's first step on; start-up before that is not logged."""

    total_s: float
    """Without what passed between a process that ended in good order and the next one."""
    kept_s: float
    """In steps that are part of the model as it is."""
    lost_s: float
    """In steps that a crash threw away."""
    evaluating_s: float
    down_s: float
    """From the last sign of a process that crashed to the first step of the next one."""

    @property
    def other_s(self) -> float:
        """Between steps: waiting for checkpoints, skipped steps, logging."""
        return max(0.0, self.total_s - self.kept_s - self.lost_s - self.evaluating_s - self.down_s)

    @property
    def goodput(self) -> float | None:
        """Share of wall time spent on steps that were kept."""
        return self.kept_s / self.total_s if self.total_s > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run as measured. A `Ranged` is a median, and what four in five of the steady steps lie between.

    A step is steady where nothing else went on: it is not among the first of its process, no checkpoint was written
    beside it, and no evaluation went just before it.
    """

    num_steps: int
    """Kept, under the plan in question."""
    num_tokens: int
    num_steady_steps: int
    step_time_s: Ranged | None
    tokens_per_s: Ranged | None
    step_cpu_s: Ranged | None
    """CPU time of the first rank: less than the step on a CPU means that it waited, for ranks or other programs."""
    wall: WallTime
    num_crashes: int
    """Processes that ended without a goodbye and were followed by another."""
    checkpoint_interval_s: float | None
    """Median from the start of one checkpoint to the start of the next."""
    device_kind: str | None
    """`cpu` or `cuda`; None where no process has ended in good order."""
    memory_bytes_by_rank: tuple[int, ...]
    """The most that each rank of the last process held: in tensors on a GPU, in the whole process on a CPU."""
    memory_note: str
    """What keeps `memory_bytes_by_rank` from being that; empty where nothing does."""
    hosts: tuple[str, ...]
    """Where the first rank ran."""


def measure(run: RunDirectory) -> Report:
    """What is measured of a run so far, under the plan that its directory has now."""
    fingerprint = run.plan().fingerprint() if run.has_plan else None
    summary = Summary.read(run.summary_path) if run.summary_path.is_file() else None
    return measured(run.events(), fingerprint=fingerprint, summary=summary)


def measured(
    events: Iterable[Event], *, fingerprint: str | None = None, summary: Summary | None = None
) -> Report:
    """Folds a log. With `fingerprint`, only what was done under that plan counts; it may follow others.

    summary: what the last process said at its end; it is passed over where that one has not ended.
    """
    told = _of_plan(events, fingerprint)
    fold = _Fold()
    for event in told:
        fold.see(event)
    steady = [step.done for step in fold.steps if step.steady]
    cpu_s = [step.cpu_s for step in fold.steps if step.steady and step.cpu_s is not None]
    memory, note = _memory(fold, summary)
    return Report(
        num_steps=len(fold.steps),
        num_tokens=sum(_tokens(step.done) for step in fold.steps),
        num_steady_steps=len(steady),
        step_time_s=_spread([step.step_time_s for step in steady]),
        tokens_per_s=_spread([step.tokens_per_s for step in steady]),
        step_cpu_s=_spread(cpu_s),
        wall=fold.wall(),
        num_crashes=fold.num_crashes,
        checkpoint_interval_s=_interval_s(told),
        device_kind=None if summary is None else summary.device_kind,
        memory_bytes_by_rank=memory,
        memory_note=note,
        hosts=tuple(dict.fromkeys(event.host for event in told if isinstance(event, RunStarted))),
    )


def _of_plan(events: Iterable[Event], fingerprint: str | None) -> list[Event]:
    """What happened since the plan was last taken up. A log that names no plans is of one plan."""
    kept: list[Event] = []
    current = fingerprint
    for event in events:
        if fingerprint is not None and isinstance(event, Decision) and event.what == "plan":
            if event.choice != current:
                kept.clear()
            current = event.choice
        kept.append(event)
    return kept if current == fingerprint else []


@dataclass(slots=True)
class _Step:
    done: StepDone
    steady: bool
    cpu_s: float | None
    """None where the step before it is not in the log."""


class _Fold:
    """A walk through a log, process by process."""

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.num_crashes = 0
        self.finished = False
        self._steps_here = 0
        self._evaluated = False
        self._lost_s = self._evaluating_s = self._down_s = self._total_s = 0.0
        self._last_s: float | None = None

    def see(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._start(event)
            case StepDone():
                steady = self._steps_here >= SETTLING_STEPS and not self._evaluated
                before = self.steps[-1].done if self.steps and self._steps_here else None
                known = before is not None and before.step == event.step - 1
                cpu_s = event.cpu_seconds - before.cpu_seconds if before is not None and known else None
                self.steps.append(_Step(event, steady, cpu_s))
                self._steps_here += 1
                self._evaluated = False
            case Evaluated():
                self._evaluating_s += event.seconds
                self._evaluated = True
            case CheckpointSaved() | CheckpointFailed():
                for step in self.steps:  # it was copied after `event.step` steps, and written during these
                    step.steady = step.steady and step.done.step < event.step
            case RunFinished():
                self.finished = True
        # A process decides, and looks for checkpoints, before its first step: that is not yet the run going on.
        if not isinstance(event, Decision | CheckpointRejected):
            if self._last_s is not None:
                self._total_s += max(0.0, event.time_s - self._last_s)
            self._last_s = event.time_s

    def _start(self, event: RunStarted) -> None:
        if self.finished:
            self._last_s = None  # a pause that somebody wanted
        elif self._last_s is not None:
            self.num_crashes += 1
            self._down_s += max(0.0, event.time_s - self._last_s)
        self.finished = False
        self._steps_here = 0
        self._evaluated = False
        while self.steps and self.steps[-1].done.step >= event.first_step:
            self._lost_s += self.steps.pop().done.step_time_s

    def wall(self) -> WallTime:
        return WallTime(
            total_s=self._total_s,
            kept_s=sum(step.done.step_time_s for step in self.steps),
            lost_s=self._lost_s,
            evaluating_s=self._evaluating_s,
            down_s=self._down_s,
        )


def _tokens(step: StepDone) -> int:
    """Of this step alone; its `tokens` count from the start of the run."""
    return round(step.tokens_per_s * step.step_time_s)


def _memory(fold: _Fold, summary: Summary | None) -> tuple[tuple[int, ...], str]:
    if summary is not None and fold.finished:
        if summary.peak_memory_bytes_by_rank:
            return summary.peak_memory_bytes_by_rank, ""
        return (summary.peak_rss_bytes,), "of the first rank's process alone, as logged by an older version"
    if not fold.steps:
        return (), "no step is done"
    most = max(step.done.memory_bytes for step in fold.steps)
    return (most,), "of the first rank alone, as it was between steps: the last process has not ended"


def _interval_s(events: Sequence[Event]) -> float | None:
    """The last checkpoint of a process comes when training ends, not when it is due."""
    spans: list[float] = []
    begun: list[float] = []
    for event in events:
        if isinstance(event, CheckpointSaved):
            begun.append(event.time_s - event.seconds)
        elif isinstance(event, RunStarted | RunFinished):
            due = begun[:-1] if isinstance(event, RunFinished) else begun
            spans += [later - earlier for earlier, later in pairwise(due)]
            begun = []
    spans += [later - earlier for earlier, later in pairwise(begun)]
    return statistics.median(spans) if spans else None


def _spread(values: Sequence[float]) -> Ranged | None:
    """Median, and the tenth and ninetieth percentile."""
    if not values:
        return None
    if len(values) == 1:
        return Ranged.exactly(values[0])
    cuts, median = statistics.quantiles(values, n=10, method="inclusive"), statistics.median(values)
    # Of equal values the quantiles can be off by a rounding.
    return Ranged(low=min(cuts[0], median), likely=median, high=max(cuts[-1], median))
