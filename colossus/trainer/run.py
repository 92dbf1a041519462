"""A whole run: from a configuration to a trained model in a directory that explains itself."""

import contextlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from colossus.checkpoint import list_checkpoints, load_newest
from colossus.data import BatchReader, Corpus, Progress, Tokenizer, corpus_directory, prepare
from colossus.errors import ConfigError, DataError, RunError
from colossus.events import CheckpointRejected, Decision, Event, RunStarted
from colossus.observe import Observer
from colossus.observe.run_directory import RunDirectory
from colossus.observe.summary import Summary
from colossus.planner import plan_one_rank
from colossus.spec.duration import Duration
from colossus.spec.duration import Progress as RunProgress
from colossus.spec.rank import RankPlan
from colossus.spec.run import RunConfig
from colossus.trainer.machine import device_kind, measure_machine, prepare_process
from colossus.trainer.session import Costs, run_session, writing
from colossus.trainer.state import TrainState

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
    costs = Costs()
    corpus = prepare_corpus(config, runs_directory, progress, costs)
    reader = open_reader(config, corpus)
    prepare_process(threads or (config.plan.machine.num_threads if config.plan else None))
    config = _planned(config) if config.plan is None else config
    _check_plan(_plan_of(config))
    run = RunDirectory.create(runs_directory, name)
    with run.lock():
        with writing(run):
            corpus.tokenizer.save(run.tokenizer_path)
            run.write_description(config)  # last: a directory with a config.toml can be resumed
        return run_session(
            run, config, _plan_of(config), corpus, reader, TrainState.new(config), costs, observers
        )


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
    costs = Costs()
    with run.lock():
        config = run.config()
        if config.plan is None and any(isinstance(event, RunStarted) for event in run.events()):
            raise RunError(
                f"{run.path}: its config.toml has no [plan], which says how it was trained; put it back"
            )
        if config.plan is not None:
            _check_plan(config.plan)
        corpus = prepare_corpus(config, run.path.parent, progress, costs)
        reader = open_reader(config, corpus)
        check_tokenizer(run, corpus)
        # Sums depend on how many threads share them: the plan's number is part of what makes a resumed run exact.
        prepare_process(threads or (config.plan.machine.num_threads if config.plan else None))
        if config.plan is None:  # an imported model, of which nothing has been trained here yet
            config = _planned(config)
            with writing(run):
                run.write_config(config)
        state = TrainState.new(config)
        news = _load(run, config, state)
        if budget is not None and budget != config.budget:
            news.append(rebudget(config.budget, budget, state.progress))
            config = config.model_copy(update={"budget": budget})
            with writing(run):
                run.write_config(config)
        return run_session(run, config, _plan_of(config), corpus, reader, state, costs, observers, news)


# --- before training ---


def prepare_corpus(config: RunConfig, runs_directory: Path, progress: ShownProgress, costs: Costs) -> Corpus:
    before = time.process_time()
    with progress or contextlib.nullcontext() as shown:
        corpus = prepare(config.data, corpus_directory(config.data, runs_directory), progress=shown)
    costs.preparation_cpu_s = time.process_time() - before
    return corpus


def open_reader(config: RunConfig, corpus: Corpus) -> BatchReader:
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


def check_tokenizer(run: RunDirectory, corpus: Corpus) -> None:
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


def rebudget(before: Duration, budget: Duration, progress: RunProgress) -> Decision:
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
