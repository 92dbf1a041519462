"""A whole run: from a configuration to a trained model in a directory that explains itself."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from colossus.checkpoint import Saved, SaveFailed, Saver, list_checkpoints, load_newest
from colossus.data import BatchReader, Corpus, Progress, Tokenizer, corpus_directory, prepare
from colossus.errors import ConfigError, DataError, RunError, TrainingDiverged
from colossus.events import (
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    Decision,
    Evaluated,
    EvaluationStarted,
    Event,
    EventLog,
    RunFinished,
    RunStarted,
)
from colossus.generate import Sampling, generate
from colossus.observe import Observer
from colossus.observe.curves import write_curves
from colossus.observe.history import history
from colossus.observe.meters import smooth
from colossus.observe.run_directory import RunDirectory
from colossus.observe.summary import Summary
from colossus.planner import plan_one_rank
from colossus.spec.duration import Duration
from colossus.spec.duration import Progress as RunProgress
from colossus.spec.rank import RankPlan
from colossus.spec.run import RunConfig
from colossus.trainer.evaluate import evaluate
from colossus.trainer.interrupts import Interrupts
from colossus.trainer.loop import train
from colossus.trainer.machine import (
    compile_marker,
    device_kind,
    measure_machine,
    peak_rss_bytes,
    prepare_process,
    release_memory,
)
from colossus.trainer.precision import use_float32_library
from colossus.trainer.state import TrainState

SAMPLE_TOKENS = 200

ShownProgress = AbstractContextManager[Progress] | None


def start(
    config: RunConfig,
    *,
    runs_directory: Path,
    name: str,
    observers: Sequence[Observer] = (),
    threads: int | None = None,
    progress: ShownProgress = None,
) -> Summary:
    """Trains a new run in a new directory of `runs_directory`; prepares its corpus first where that is not done.

    A configuration that has a plan is trained by that plan. Ctrl-C and SIGTERM end it after the step at hand, with
    a checkpoint; a second one ends the process at once. Raises ConfigError, DataError or RunError before anything
    is trained, TrainingDiverged after.
    """
    costs = _Costs()
    corpus = _prepare(config, runs_directory, progress, costs)
    reader = _reader(config, corpus)
    prepare_process(threads or (config.plan.machine.num_threads if config.plan else None))
    config = _planned(config) if config.plan is None else config
    _check_plan(_plan_of(config))
    run = RunDirectory.create(runs_directory, name)
    with run.lock():
        with _writing(run):
            corpus.tokenizer.save(run.tokenizer_path)
            run.write_description(config)  # last: a directory with a config.toml can be resumed
        return _train(run, config, corpus, reader, TrainState.new(config), costs, observers)


def resume(
    run: RunDirectory,
    *,
    budget: Duration | None = None,
    observers: Sequence[Observer] = (),
    threads: int | None = None,
    progress: ShownProgress = None,
) -> Summary:
    """Goes on with a run from its newest good checkpoint, exactly as if it had never stopped.

    One that was killed before its first checkpoint begins again. With `budget` the run is given another length in
    all, which its schedule then ends with. Raises CheckpointError when no checkpoint is good, RunError when another
    process trains in it, ConfigError when the new budget is used up already.
    """
    costs = _Costs()
    with run.lock():
        config = run.config()
        if config.plan is None and any(isinstance(event, RunStarted) for event in run.events()):
            raise RunError(
                f"{run.path}: its config.toml has no [plan], which says how it was trained; put it back"
            )
        if config.plan is not None:
            _check_plan(config.plan)
        corpus = _prepare(config, run.path.parent, progress, costs)
        reader = _reader(config, corpus)
        _check_tokenizer(run, corpus)
        # Sums depend on how many threads share them: the plan's number is part of what makes a resumed run exact.
        prepare_process(threads or (config.plan.machine.num_threads if config.plan else None))
        if config.plan is None:  # an imported model, of which nothing has been trained here yet
            config = _planned(config)
            with _writing(run):
                run.write_config(config)
        state = TrainState.new(config)
        news = _load(run, config, state)
        if budget is not None and budget != config.budget:
            news.append(_rebudget(config.budget, budget, state.progress))
            config = config.model_copy(update={"budget": budget})
            with _writing(run):
                run.write_config(config)
        return _train(run, config, corpus, reader, state, costs, observers, news)


# --- before training ---


@dataclass
class _Costs:
    """What this process spent beside training."""

    started_s: float = field(default_factory=time.perf_counter)
    preparation_cpu_s: float = 0.0
    evaluation_cpu_s: float = 0.0


def _prepare(config: RunConfig, runs_directory: Path, progress: ShownProgress, costs: _Costs) -> Corpus:
    before = time.process_time()
    with progress or contextlib.nullcontext() as shown:
        corpus = prepare(config.data, corpus_directory(config.data, runs_directory), progress=shown)
    costs.preparation_cpu_s = time.process_time() - before
    return corpus


def _reader(config: RunConfig, corpus: Corpus) -> BatchReader:
    """Raises ConfigError for a tokenizer that the model has too few rows for, DataError for too little text."""
    if corpus.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {corpus.vocab_size:,} entries, but model {config.model.name} has a vocabulary of "
            f"{config.model.vocab_size:,}; set model.vocab_size to {corpus.vocab_size} or more"
        )
    return BatchReader(corpus, config.seed, config.batch.sequence_tokens, config.batch.sequences)


def _planned(config: RunConfig) -> RunConfig:
    """With a plan for the machine at hand."""
    return config.model_copy(update={"plan": plan_one_rank(config, measure_machine(config))})


def _plan_of(config: RunConfig) -> RankPlan:
    assert config.plan is not None
    return config.plan


def _check_plan(plan: RankPlan) -> None:
    kind = device_kind()
    if plan.machine.kind == "cuda" and kind != "cuda":
        raise ConfigError(
            f"the plan is for {plan.machine.chip}, and there is no GPU here; remove [plan] from the configuration "
            f"to have it planned for this machine"
        )


def _check_tokenizer(run: RunDirectory, corpus: Corpus) -> None:
    if Tokenizer.load(run.tokenizer_path).fingerprint != corpus.tokenizer.fingerprint:
        raise DataError(
            f"{run.path} was trained with another tokenizer than its corpus has now: the text or the tokenizer file "
            f"has changed since. Put the text back, or start a new run"
        )


def _load(run: RunDirectory, config: RunConfig, state: TrainState) -> list[Event]:
    """The newest good checkpoint into `state`; what there is to tell about it.

    Its files are mapped, and let go when this returns: their pages would count as this process's memory.
    """
    if not list_checkpoints(run.checkpoints_path):
        reason = "there is no checkpoint yet, and the first step's state follows from the configuration"
        return [Decision(what="resume", choice="from the beginning", reason=reason)]
    loaded, rejected = load_newest(run.checkpoints_path, expect=config.model)
    state.load(loaded.tensors, loaded.facts)
    return [CheckpointRejected(path=str(one.path), reason=one.reason) for one in rejected]


def _rebudget(before: Duration, budget: Duration, progress: RunProgress) -> Decision:
    """Raises ConfigError for a budget that leaves nothing to train."""
    if budget.done(progress) >= 1:
        raise ConfigError(
            f"the run has trained {progress.steps:,} steps ({progress.tokens:,} tokens, {progress.seconds:.0f} s, "
            f"{progress.cpu_seconds:.0f} s of CPU time) already, so nothing is left of {budget.describe()} in all"
        )
    return Decision(
        what="budget",
        choice=budget.describe(),
        reason=f"asked for on resuming, in place of {before.describe()}; the schedule now ends with it",
    )


@contextlib.contextmanager
def _writing(run: RunDirectory) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write to {run.path}: {error.strerror or error}") from None


# --- training ---


def _train(
    run: RunDirectory,
    config: RunConfig,
    corpus: Corpus,
    reader: BatchReader,
    state: TrainState,
    costs: _Costs,
    observers: Sequence[Observer],
    news: Sequence[Event] = (),
) -> Summary:
    with _writing(run):
        log = EventLog(run.events_path)
    with log, Interrupts() as interrupts:
        session = _Session(run, config, corpus, state, costs, interrupts, (log.write, *observers))
        for event in news:
            session.emit(event)
        session.announce()
        reason = session.train(reader)
        release_memory()
        heldout = None
        if reason == "budget":
            heldout = session.evaluate_all()
            session.write_sample()
        reason = "interrupted" if interrupts.seen else reason
        session.emit(RunFinished(step=state.progress.steps, reason=reason))
    summary = session.summary(heldout)
    with contextlib.suppress(OSError):  # a full disk; whoever waits gets the summary all the same
        summary.write(run.summary_path)
        write_curves(list(run.events()), run.curves_path, title=run.name)
    return summary


@dataclass
class _Session:
    """One process's part of a run: what happens around the loop."""

    run: RunDirectory
    config: RunConfig
    corpus: Corpus
    state: TrainState
    costs: _Costs
    interrupts: Interrupts
    observers: Sequence[Observer]

    def __post_init__(self) -> None:
        self.plan = _plan_of(self.config)
        # The state at the start is on the disk, or follows from the configuration.
        self._saved_step = self.state.progress.steps

    def emit(self, event: Event) -> None:
        for observer in self.observers:
            observer(event)

    def announce(self) -> None:
        progress = self.state.progress
        # What start-up has used counts against a budget of CPU time; what preparing the corpus has used does not.
        used = time.process_time() - self.costs.preparation_cpu_s
        self.state.progress = replace(progress, cpu_seconds=progress.cpu_seconds + used)
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
            for layer in state.model.layers:
                layer.compile(dynamic=False)
        reason = "budget"
        with Saver(self.run.checkpoints_path, keep=config.checkpoints, model=config.model) as saver:
            saving = _Rhythm(config.checkpoints.every, state.progress)
            evaluating = _Rhythm(config.evaluation.every, state.progress)
            try:
                for report in train(config, state, reader):
                    self.emit(report)
                    self._report(saver.poll())
                    if self.interrupts.seen:
                        reason = "interrupted"
                        break
                    if not saver.busy and saving.due(state.progress):
                        self._save(saver)
                    if evaluating.due(state.progress):
                        self._evaluate(config.evaluation.max_tokens)
            except TrainingDiverged:
                self._report(saver.wait())
                self.emit(RunFinished(step=state.progress.steps, reason="diverged"))
                raise
            self._report(saver.wait())
            if self._saved_step != state.progress.steps:
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
        result = evaluate(self.state.model, self.corpus, self.plan, max_tokens=max_tokens, stop=stop)
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
        # Each token's attention has a shape of its own, and oneDNN would keep a kernel for each: 180 MB in all.
        use_float32_library("default")
        sampling = Sampling(temperature=0.8, top_p=0.95, max_tokens=SAMPLE_TOKENS, seed=self.config.seed)
        text = "".join(generate(self.state.model, self.corpus.tokenizer, "", sampling))
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
            mfu=rate * flops / self.plan.machine.matmul_flops[self.plan.dtype],
            train_loss=smooth(step.loss for step in steps)[-1] if steps else None,
            heldout_bits_per_byte=None if heldout is None else heldout.bits_per_byte,
            peak_rss_bytes=peak_rss_bytes(),
            predicted_memory_bytes=self.plan.estimate.memory.total_bytes,
            preparation_cpu_s=self.costs.preparation_cpu_s,
            compile_s=compile_s,
            evaluation_cpu_s=self.costs.evaluation_cpu_s,
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
