"""A whole run: from a configuration to a trained model in a directory that explains itself."""

import contextlib
import os
import resource
import signal
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

import torch

from colossus.checkpoint import Saved, Saver, load_newest
from colossus.data import BatchReader, Corpus, Progress, corpus_directory, prepare
from colossus.errors import ConfigError, DataError, TrainingDiverged
from colossus.events import (
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    Decision,
    Evaluated,
    Event,
    EventLog,
    RunFinished,
    RunStarted,
    StepDone,
)
from colossus.generate import Sampling, generate
from colossus.observe import Observer
from colossus.observe.curves import write_curves
from colossus.observe.meters import smooth
from colossus.observe.run_directory import RunDirectory
from colossus.observe.summary import Summary
from colossus.planner import plan_one_rank
from colossus.spec.duration import Progress as RunProgress
from colossus.spec.run import RunConfig
from colossus.trainer.evaluate import evaluate
from colossus.trainer.loop import train
from colossus.trainer.machine import compile_marker, measure_machine, prepare_process
from colossus.trainer.precision import use_float32_library
from colossus.trainer.state import TrainState

SAMPLE_TOKENS = 200


def start(
    config: RunConfig,
    *,
    runs_directory: Path,
    name: str,
    observers: Sequence[Observer] = (),
    threads: int | None = None,
    progress: AbstractContextManager[Progress] | None = None,
) -> Summary:
    """Trains a new run in a new directory of `runs_directory`; prepares its corpus first where that is not done.

    Ctrl-C and SIGTERM end it after the step at hand, with a checkpoint; a second one ends the process at once.
    Raises ConfigError, DataError or RunError before anything is trained, TrainingDiverged after.
    """
    session = _Session(observers)
    prepare_process(threads)
    corpus = session.prepare(config, runs_directory, progress)
    reader = _check_corpus(config, corpus)
    if config.plan is None:
        config = config.model_copy(update={"plan": plan_one_rank(config, measure_machine(config))})
    run = RunDirectory.create(runs_directory, name)
    run.write_description(config)
    corpus.tokenizer.save(run.tokenizer_path)
    with run.lock():
        return session.train(run, config, corpus, reader, TrainState.new(config))


def resume(
    run: RunDirectory,
    *,
    observers: Sequence[Observer] = (),
    threads: int | None = None,
    progress: AbstractContextManager[Progress] | None = None,
) -> Summary:
    """Goes on with a run from its newest good checkpoint, exactly as if it had never stopped.

    Raises CheckpointError when there is no good one, RunError when another process trains in it.
    """
    session = _Session(observers)
    config = run.config()
    assert config.plan is not None, "a run's configuration holds its plan"
    planned = config.plan.machine.num_threads
    # Sums depend on how many threads share them, so the plan's number is part of what makes a resumed run exact.
    prepare_process(threads or planned)
    with run.lock():
        corpus = session.prepare(config, run.path.parent, progress)
        reader = _check_corpus(config, corpus)
        _check_tokenizer(run, corpus)
        state = TrainState.new(config)
        loaded, rejected = load_newest(run.checkpoints_path, expect=config.model)
        session.pending += [CheckpointRejected(path=str(one.path), reason=one.reason) for one in rejected]
        state.load(loaded.tensors, loaded.facts)
        return session.train(run, config, corpus, reader, state)


def _check_corpus(config: RunConfig, corpus: Corpus) -> BatchReader:
    """Raises ConfigError for a tokenizer that the model has too few rows for, DataError for too little text."""
    if corpus.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {corpus.vocab_size:,} entries, but model {config.model.name} has a vocabulary of "
            f"{config.model.vocab_size:,}; set model.vocab_size to {corpus.vocab_size} or more"
        )
    return BatchReader(corpus, config.seed, config.batch.sequence_tokens, config.batch.sequences)


def _check_tokenizer(run: RunDirectory, corpus: Corpus) -> None:
    from colossus.data import Tokenizer

    if Tokenizer.load(run.tokenizer_path).fingerprint != corpus.tokenizer.fingerprint:
        raise DataError(
            f"{run.path} was trained with another tokenizer than its corpus has now: the text or the tokenizer file "
            f"has changed since. Put the text back, or start a new run"
        )


@dataclass
class _Session:
    """One process's part of a run: where events go, and what it spent on what."""

    observers: Sequence[Observer]
    pending: list[Event] = field(default_factory=list)
    log: EventLog | None = None
    started_s: float = field(default_factory=time.perf_counter)
    preparation_cpu_s: float = 0.0
    evaluation_cpu_s: float = 0.0
    compile_s: float = 0.0

    def emit(self, event: Event) -> None:
        if self.log is not None:
            self.log.write(event)
        for observer in self.observers:
            observer(event)

    def prepare(
        self, config: RunConfig, runs_directory: Path, progress: AbstractContextManager[Progress] | None
    ) -> Corpus:
        before = time.process_time()
        with progress or contextlib.nullcontext() as shown:
            corpus = prepare(config.data, corpus_directory(config.data, runs_directory), progress=shown)
        self.preparation_cpu_s += time.process_time() - before
        return corpus

    def train(
        self, run: RunDirectory, config: RunConfig, corpus: Corpus, reader: BatchReader, state: TrainState
    ) -> Summary:
        assert config.plan is not None
        use_float32_library(config.plan.machine.float32_library)
        with EventLog(run.events_path) as self.log, _Interrupts() as interrupts:
            for event in self.pending:
                self.emit(event)
            self._announce(config, state)
            with Saver(run.checkpoints_path, keep=config.checkpoints, model=config.model) as saver:
                try:
                    reason = self._loop(config, corpus, reader, state, saver, interrupts)
                except TrainingDiverged:
                    self._finish_saving(saver)
                    self.emit(RunFinished(step=state.progress.steps, reason="diverged"))
                    raise
                self._save(saver, state)
                self._finish_saving(saver)
            heldout = None
            if reason == "budget":
                heldout = self._evaluate(config, corpus, state, max_tokens=None)
                self._write_sample(run, config, corpus, state)
            self.emit(RunFinished(step=state.progress.steps, reason=reason))
        summary = self._summary(run, config, state, heldout)
        summary.write(run.summary_path)
        write_curves(list(run.events()), run.curves_path, title=run.name)
        return summary

    def _loop(
        self,
        config: RunConfig,
        corpus: Corpus,
        reader: BatchReader,
        state: TrainState,
        saver: Saver,
        interrupts: "_Interrupts",
    ) -> str:
        """Trains to the end of the budget or an interrupt; why it ended."""
        assert config.plan is not None
        if config.plan.compile:
            for layer in state.model.layers:
                layer.compile(dynamic=False)
        saver.prepare(state.tensors())
        evaluated = saved = state.progress
        first = True
        for report in train(config, state, reader):
            self.emit(report)
            if first and config.plan.compile and isinstance(report, StepDone):
                self.compile_s = report.step_time_s
                with contextlib.suppress(OSError):
                    marker = compile_marker(config)
                    marker.parent.mkdir(parents=True, exist_ok=True)
                    marker.touch()
            first = False
            for result in saver.poll():
                self._report(result)
            if interrupts.seen:
                return "interrupted"
            if _due(config.checkpoints.every, saved, state.progress) and not saver.busy:
                self._save(saver, state)
                saved = state.progress
            if _due(config.evaluation.every, evaluated, state.progress):
                if corpus.heldout_tokens:
                    self._evaluate(config, corpus, state, max_tokens=config.evaluation.max_tokens)
                evaluated = state.progress
        return "budget"

    def _announce(self, config: RunConfig, state: TrainState) -> None:
        plan = config.plan
        assert plan is not None
        # What start-up has used counts against a budget of CPU time; what preparing the corpus has used does not.
        used = time.process_time() - self.preparation_cpu_s
        state.progress = replace(state.progress, cpu_seconds=state.progress.cpu_seconds + used)
        if state.progress.steps == 0:
            for what, why in plan.reasons.items():
                self.emit(Decision(what=what, choice=str(getattr(plan, what)), reason=why))
        self.emit(
            RunStarted(
                first_step=state.progress.steps,
                num_params=config.model.num_params(),
                host=os.uname().nodename,
                process_id=os.getpid(),
            )
        )

    def _evaluate(
        self, config: RunConfig, corpus: Corpus, state: TrainState, *, max_tokens: int | None
    ) -> Evaluated | None:
        assert config.plan is not None
        if not corpus.heldout_tokens:
            return None
        cpu_s, started = time.process_time(), time.perf_counter()
        result = evaluate(state.model, corpus, config.plan, max_tokens=max_tokens)
        self.evaluation_cpu_s += time.process_time() - cpu_s
        event = Evaluated(
            step=state.progress.steps,
            tokens=state.progress.tokens,
            loss=result.loss,
            bits_per_byte=result.bits_per_byte,
            num_heldout_tokens=result.num_tokens,
            seconds=time.perf_counter() - started,
        )
        self.emit(event)
        return event

    def _save(self, saver: Saver, state: TrainState) -> None:
        saver.save(state.progress.steps, state.tensors(), state.facts())

    def _finish_saving(self, saver: Saver) -> None:
        for result in saver.wait():
            self._report(result)

    def _report(self, result: object) -> None:
        if isinstance(result, Saved):
            self.emit(
                CheckpointSaved(
                    step=result.step, path=str(result.path), num_bytes=result.num_bytes, seconds=result.seconds
                )
            )
        else:
            self.emit(CheckpointFailed(step=result.step, reason=result.reason))  # type: ignore[attr-defined]

    def _write_sample(self, run: RunDirectory, config: RunConfig, corpus: Corpus, state: TrainState) -> None:
        """A text of the model's own, from nothing but the mark that opens a document."""
        sampling = Sampling(temperature=0.8, top_p=0.95, max_tokens=SAMPLE_TOKENS, seed=config.seed)
        text = "".join(generate(state.model, corpus.tokenizer, "", sampling))
        with contextlib.suppress(OSError):
            run.sample_path.write_text(text + "\n", encoding="utf-8")

    def _summary(
        self, run: RunDirectory, config: RunConfig, state: TrainState, heldout: Evaluated | None
    ) -> Summary:
        assert config.plan is not None
        steps = [event for event in run.events() if isinstance(event, StepDone)]
        rate = statistics.median(step.tokens_per_s for step in steps) if steps else 0.0
        flops = config.model.flops_per_token(config.batch.sequence_tokens)
        return Summary(
            run_dir=str(run.path),
            steps=state.progress.steps,
            tokens=state.progress.tokens,
            num_params=config.model.num_params(),
            wall_s=time.perf_counter() - self.started_s,
            cpu_s=state.progress.cpu_seconds,
            tokens_per_s=rate,
            mfu=rate * flops / config.plan.machine.matmul_flops[config.plan.dtype],
            train_loss=smooth(step.loss for step in steps)[-1] if steps else None,
            heldout_bits_per_byte=None if heldout is None else heldout.bits_per_byte,
            peak_rss_bytes=peak_rss_bytes(),
            predicted_memory_bytes=config.plan.estimate.memory.total_bytes,
            preparation_cpu_s=self.preparation_cpu_s,
            compile_s=self.compile_s,
            evaluation_cpu_s=self.evaluation_cpu_s,
        )


def _due(every: object, last: RunProgress, now: RunProgress) -> bool:
    from colossus.spec.duration import Duration

    assert isinstance(every, Duration)
    return every.times_passed(now) > every.times_passed(last)


def peak_rss_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Interrupts:
    """While entered, the first SIGINT or SIGTERM is only noted; a second one ends the process at once."""

    def __init__(self) -> None:
        self.seen = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "_Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            os._exit(128 + number)
        self.seen = True
