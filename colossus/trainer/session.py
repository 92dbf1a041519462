"""One process's part of a run: what happens around the loop, from the first step to the summary."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from colossus.checkpoint import Saved, SaveFailed, Saver
from colossus.data import BatchReader, Corpus
from colossus.errors import RunError, TrainingDiverged
from colossus.events import (
    CheckpointFailed,
    CheckpointSaved,
    Decision,
    Evaluated,
    EvaluationStarted,
    Event,
    EventLog,
    RunFinished,
    RunStarted,
)
from colossus.observe import Observer
from colossus.observe.curves import write_curves
from colossus.observe.history import history
from colossus.observe.meters import smooth
from colossus.observe.run_directory import RunDirectory
from colossus.observe.summary import Summary
from colossus.spec.duration import Duration
from colossus.spec.duration import Progress as RunProgress
from colossus.spec.rank import RankPlan
from colossus.spec.run import RunConfig
from colossus.trainer.interrupts import Interrupts
from colossus.trainer.loop import train
from colossus.trainer.machine import compile_marker, peak_memory_bytes, peak_rss_bytes, release_memory
from colossus.trainer.precision import use_float32_library
from colossus.trainer.state import AnyState


@dataclass
class Costs:
    """What this process spent beside training."""

    started_s: float = field(default_factory=time.perf_counter)
    preparation_cpu_s: float = 0.0
    evaluation_cpu_s: float = 0.0


@contextlib.contextmanager
def writing(run: RunDirectory) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write to {run.path}: {error.strerror or error}") from None


def run_session(
    run: RunDirectory,
    config: RunConfig,
    plan: RankPlan,
    corpus: Corpus,
    reader: BatchReader,
    state: AnyState,
    costs: Costs,
    observers: Sequence[Observer],
    news: Sequence[Event] = (),
) -> Summary:
    """Trains `state` to the end of its budget or an interrupt. Of many ranks the first one writes and tells."""
    with ExitStack() as stack:
        if state.leads:
            with writing(run):
                log = stack.enter_context(EventLog(run.events_path))
            observers = (log.write, *observers)
        else:
            observers = ()
        interrupts = stack.enter_context(Interrupts())
        session = _Session(run, config, plan, corpus, state, costs, interrupts, observers)
        for event in news:
            session.emit(event)
        session.announce()
        reason = session.train(reader)
        release_memory()
        heldout = None
        if reason == "budget":
            heldout = session.evaluate_all()
            session.write_sample()
        (interrupted,) = state.any(interrupts.seen)
        reason = "interrupted" if interrupted else reason
        session.emit(RunFinished(step=state.progress.steps, reason=reason))
    summary = session.summary(heldout)
    if not state.leads:
        return summary
    with contextlib.suppress(OSError):  # a full disk; whoever waits gets the summary all the same
        summary.write(run.summary_path)
        write_curves(list(run.events()), run.curves_path, title=run.name)
    return summary


@dataclass
class _Session:
    """One process's part of a run: what happens around the loop."""

    run: RunDirectory
    config: RunConfig
    plan: RankPlan
    corpus: Corpus
    state: AnyState
    costs: Costs
    interrupts: Interrupts
    observers: Sequence[Observer]

    def __post_init__(self) -> None:
        # The state at the start is on the disk, or follows from the configuration.
        self._saved_step = self.state.progress.steps

    def emit(self, event: Event) -> None:
        for observer in self.observers:
            observer(event)

    def announce(self) -> None:
        progress = self.state.progress
        # What start-up has used counts against a budget of CPU time; what preparing the corpus has used does not.
        used = time.process_time() - self.costs.preparation_cpu_s
        self.state.progress = self.state.agree(replace(progress, cpu_seconds=progress.cpu_seconds + used))
        if progress.steps == 0:
            for what, why in self.plan.reasons.items():
                self.emit(Decision(what=what, choice=str(getattr(self.plan, what)), reason=why))
        if not self.corpus.heldout_tokens:
            why = "no document is held out; raise data.heldout_fraction, or add documents"
            self.emit(Decision(what="evaluation", choice="none", reason=why))
        self.emit(
            RunStarted(
                first_step=progress.steps,
                num_params=self.config.model.num_params(),
                host=os.uname().nodename,
                process_id=os.getpid(),
            )
        )

    def train(self, reader: BatchReader) -> str:
        """Trains to the end of the budget or an interrupt, and saves; why it ended."""
        config, state = self.config, self.state
        use_float32_library(self.plan.machine.float32_library)
        if self.plan.compile:
            state.compile()
        reason = "budget"
        with state.saver(self.run.checkpoints_path, config) as saver:
            saving = _Rhythm(config.checkpoints.every, state.progress)
            evaluating = _Rhythm(config.evaluation.every, state.progress)
            try:
                for report in train(config, state, reader):
                    self.emit(report)
                    self._report(saver.poll())
                    interrupted, busy = state.any(self.interrupts.seen, saver.busy)
                    if interrupted:
                        reason = "interrupted"
                        break
                    if not busy and saving.due(state.progress):
                        self._save(saver)
                    if evaluating.due(state.progress):
                        self._evaluate(config.evaluation.max_tokens)
            except TrainingDiverged:
                self._report(saver.wait())
                self.emit(RunFinished(step=state.progress.steps, reason="diverged"))
                raise
            self._report(saver.wait())
            # Ranks that write nothing, holding copies, do not learn what was saved: the first one knows.
            (unsaved,) = state.any(state.leads and self._saved_step != state.progress.steps)
            if unsaved:
                self._save(saver)
                self._report(saver.wait())
        if self.plan.compile:
            _note_compiled(config)
        return reason

    def _save(self, saver: Saver) -> None:
        saver.save(self.state.progress.steps, self.state.tensors(), self.state.facts())

    def _report(self, results: Sequence[Saved | SaveFailed]) -> None:
        for result in results:
            if isinstance(result, Saved):
                self._saved_step = result.step
                path, size = str(result.path), result.num_bytes
                self.emit(
                    CheckpointSaved(step=result.step, path=path, num_bytes=size, seconds=result.seconds)
                )
            else:
                self.emit(CheckpointFailed(step=result.step, reason=result.reason))

    def evaluate_all(self) -> Evaluated | None:
        """The closing figure: over all held-out text. None where there is none, or Ctrl-C came before its end."""
        if self.corpus.heldout_tokens:
            step, num_tokens = self.state.progress.steps, self.corpus.heldout_tokens
            self.emit(EvaluationStarted(step=step, num_heldout_tokens=num_tokens))
        return self._evaluate(None, stop=lambda: self.interrupts.seen)

    def _evaluate(self, max_tokens: int | None, stop: Callable[[], bool] | None = None) -> Evaluated | None:
        if not self.corpus.heldout_tokens:
            return None
        cpu_s, started = time.process_time(), time.perf_counter()
        result = self.state.heldout(self.corpus, self.plan, max_tokens=max_tokens, stop=stop)
        self.costs.evaluation_cpu_s += time.process_time() - cpu_s
        if result is None:
            return None
        event = Evaluated(
            step=self.state.progress.steps,
            tokens=self.state.progress.tokens,
            loss=result.loss,
            bits_per_byte=result.bits_per_byte,
            num_heldout_tokens=result.num_tokens,
            seconds=time.perf_counter() - started,
        )
        self.emit(event)
        return event

    def write_sample(self) -> None:
        """A text of the model's own, from nothing but the mark that opens a document."""
        text = self.state.sample(self.corpus.tokenizer, self.config.seed)
        if text is None:
            return
        with contextlib.suppress(OSError):
            self.run.sample_path.write_text(text + "\n", encoding="utf-8")

    def summary(self, heldout: Evaluated | None) -> Summary:
        told, progress = history(self.run.events()), self.state.progress
        steps = told.steps
        rate = statistics.median(step.tokens_per_s for step in steps) if steps else 0.0
        flops = self.config.model.flops_per_token(self.config.batch.sequence_tokens)
        compile_s = 0.0
        if self.plan.compile and steps:
            # The first step of a process is as much longer as compiling takes.
            firsts = {start.first_step for start in told.starts}
            typical_s = statistics.median(step.step_time_s for step in steps)
            compile_s = sum(max(0.0, s.step_time_s - typical_s) for s in steps if s.step in firsts)
        return Summary(
            run_dir=str(self.run.path),
            steps=progress.steps,
            tokens=progress.tokens,
            num_params=self.config.model.num_params(),
            wall_s=time.perf_counter() - self.costs.started_s,
            cpu_s=progress.cpu_seconds,
            tokens_per_s=rate,
            mfu=rate * flops / self.plan.layout.num_ranks / self.plan.machine.matmul_flops[self.plan.dtype],
            train_loss=smooth(step.loss for step in steps)[-1] if steps else None,
            heldout_bits_per_byte=None if heldout is None else heldout.bits_per_byte,
            peak_rss_bytes=peak_rss_bytes(),
            predicted_memory_bytes=self.plan.estimate.memory.total_bytes,
            preparation_cpu_s=self.costs.preparation_cpu_s,
            compile_s=compile_s,
            evaluation_cpu_s=self.costs.evaluation_cpu_s,
            device_kind=self.plan.machine.kind,
            peak_memory_bytes_by_rank=self.state.each(peak_memory_bytes(self.plan.machine.kind)),
        )


class _Rhythm:
    """What is due every so often of a run's progress, however long it was put off."""

    def __init__(self, every: Duration, now: RunProgress) -> None:
        self._every = every
        self._passed = every.times_passed(now)

    def due(self, now: RunProgress) -> bool:
        """Whether another span has passed since this last said so."""
        before, self._passed = self._passed, self._every.times_passed(now)
        return self._passed > before


def _note_compiled(config: RunConfig) -> None:
    """For the next plan: this model's kernels are in torch's cache now."""
    marker = compile_marker(config)
    with contextlib.suppress(OSError):
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
