"""A run of many ranks: what the process does that starts it, and what each rank does.

    colossus train --plan plan.json ─► start: corpus, run directory with plan.json ─► launch ─► main, on every rank

Under a cluster's launcher every rank calls `main` itself (`python -m colossus.trainer.run_ranks RUN`).
"""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from colossus.checkpoint import ProcessGroupRanks, list_checkpoints, load_newest_shards
from colossus.data import corpus_directory, prepare
from colossus.errors import ConfigError, RankFailed, RunError
from colossus.events import CheckpointRejected, Decision, Event, RunFinished
from colossus.launch.environment import place
from colossus.launch.failure import log_failure, report_failure
from colossus.launch.local import Ending, rank_processes, run_ranks
from colossus.observe import Observer
from colossus.observe.run_directory import RunDirectory
from colossus.observe.summary import Summary
from colossus.parallel.mesh import Mesh
from colossus.planner.one_rank.plan import loss_chunk_tokens
from colossus.spec.compose import ZERO_BUBBLE, check_job
from colossus.spec.config import check_optimizer, with_plan
from colossus.spec.duration import Duration
from colossus.spec.job import Job
from colossus.spec.plan import Plan
from colossus.spec.rank import Machine, Memory, RankEstimate, RankPlan
from colossus.spec.run import RunConfig
from colossus.trainer.machine import (
    device_kind,
    measure_machine,
    prepare_process,
    rank_environment,
    usable_cores,
)
from colossus.trainer.ranks import RankState
from colossus.trainer.run import ShownProgress, check_tokenizer, open_reader, prepare_corpus, rebudget
from colossus.trainer.session import Costs, run_session, writing

FINGERPRINT = "COLOSSUS_PLAN"
"""The environment variable in which the launcher tells every rank which plan it is to execute."""
THREADS = "OMP_NUM_THREADS"


# --- the process that starts them ---


def start_ranks(
    config: RunConfig,
    plan: Plan,
    *,
    runs_directory: Path,
    name: str,
    threads: int | None = None,
    progress: ShownProgress = None,
) -> RunDirectory:
    """Trains a new run by `plan`, all of its ranks on this machine; returns when they have ended.

    Raises ConfigError before anything is trained, RankFailed
    when a rank failed.
    """
    check_machine(plan)
    check_job(plan.model, Job.of(plan), compiled=bool(config.fixed.compile))
    config = with_plan(config, plan)
    corpus = prepare_corpus(config, runs_directory, progress, Costs())
    open_reader(config, corpus)
    run = RunDirectory.create(runs_directory, name)
    with writing(run):
        corpus.tokenizer.save(run.tokenizer_path)
        run.write_plan(plan)
        run.write_description(config)  # last: a directory with a config.toml can be resumed
    _launch(run, plan, threads)
    return run


def resume_ranks(
    run: RunDirectory,
    *,
    budget: Duration | None = None,
    plan: Plan | None = None,
    threads: int | None = None,
) -> RunDirectory:
    """Goes on with a run from its newest good checkpoint, under its own plan or another one of the same
    model and batch. A run that one process began can go on under a plan, too.
    """
    config = run.config()
    asked = plan or run.plan()
    check_machine(asked)
    check_job(asked.model, Job.of(asked), compiled=bool(config.fixed.compile))
    _check_same_run(run, config, asked)
    with (
        run.lock(),
        writing(run),
    ):  # refused here while others train in it: their plan and logs are left alone
        if plan is not None:
            run.write_plan(plan)
            run.write_config(with_plan(config, plan))
    _launch(run, asked, threads, budget)
    return run


def _check_same_run(run: RunDirectory, config: RunConfig, plan: Plan) -> None:
    """Raises ConfigError for a plan that does not go on with what the run has trained."""
    if plan.model != config.model:
        raise ConfigError(f"the plan is for {plan.model.name}, and {run.path} trains {config.model.name}")
    check_optimizer(config, plan)
    planned = (plan.global_batch_sequences, plan.sequence_tokens)
    if planned != (config.batch.sequences, config.batch.sequence_tokens):
        # The step number says which samples come next: with another batch, some would come twice or never.
        raise ConfigError(
            f"the plan trains on {planned[0]:,} sequences of {planned[1]:,} tokens a step, and {run.path} on "
            f"{config.batch.sequences:,} of {config.batch.sequence_tokens:,}: a run keeps its batch; plan with "
            f"that one, or start a new run"
        )


def check_machine(plan: Plan) -> None:
    """Raises ConfigError where this machine cannot run all ranks of the plan."""
    num_ranks = plan.layout.num_ranks
    if device_kind() == "cuda":
        there = torch.cuda.device_count()
        if num_ranks > there:
            raise ConfigError(
                f"the plan has {num_ranks:,} ranks, one for each GPU, and this machine has {there}; start it with the "
                f"cluster's launcher (python -m colossus.trainer.run_ranks RUN on every rank), or plan for this machine"
            )
        return
    most = 8 * usable_cores()
    if num_ranks > most:
        raise ConfigError(
            f"the plan has {num_ranks:,} ranks, and this machine has {usable_cores()} CPU cores and no GPU: it runs up "
            f"to {most} at once; `colossus plan --prove` shows what each rank would do without running them"
        )


def _launch(run: RunDirectory, plan: Plan, threads: int | None, budget: Duration | None = None) -> None:
    argv = [sys.executable, "-m", "colossus.trainer.run_ranks", str(run.path)]
    if budget is not None:
        argv += ["--budget", repr(budget.amount), budget.unit]
    processes = rank_processes(
        argv,
        plan.layout.num_ranks,
        run.path / "logs",
        environment={FINGERPRINT: plan.fingerprint(), **rank_environment(device_kind())},
        num_threads=threads,
    )
    started_s = time.time()
    try:
        ending = run_ranks(processes)
    except RankFailed as failed:
        if not list_checkpoints(run.checkpoints_path):
            raise
        how = f"its checkpoints are whole; to go on: colossus train --resume {run.path}"
        raise RankFailed(f"{failed}\n{how}", failed.ranks) from None
    if ending is Ending.KILLED or (ending is Ending.STOPPED and not _has_ended_since(started_s, run)):
        raise KeyboardInterrupt


def _has_ended_since(time_s: float, run: RunDirectory) -> bool:
    """Whether ranks ended in good order: asked to before they train, they just end, and have nothing to sum up."""
    return any(isinstance(event, RunFinished) and event.time_s >= time_s for event in run.events())


# --- each rank ---


def main(arguments: Sequence[str]) -> None:
    """This process's part of the run in a directory: `RUN [--budget AMOUNT UNIT]`."""
    run = RunDirectory(Path(arguments[0]))
    budget = None
    if arguments[1:2] == ["--budget"]:
        budget = Duration(amount=float(arguments[2]), unit=arguments[3])  # type: ignore[arg-type]
    here = place()
    if here is None:
        raise RunError("this process was started by no launcher: RANK and WORLD_SIZE are not set")
    plan = run.plan()
    _check_plan(plan, here.num_ranks)
    threads = int(os.environ.get(THREADS, 0)) or max(1, usable_cores() // here.num_ranks)
    prepare_process(threads)
    device = device_kind()
    if device == "cuda":
        torch.cuda.set_device(here.local_rank)
    os.environ.update(here.variables())
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        with contextlib.ExitStack() as stack:
            if here.rank == 0:
                stack.enter_context(run.lock())
            _train(run, plan, budget, device)
    finally:
        dist.destroy_process_group()


def _check_plan(plan: Plan, num_ranks: int) -> None:
    """Raises ConfigError where this process does not execute what was started."""
    told, mine = os.environ.get(FINGERPRINT), plan.fingerprint()
    if told is not None and told != mine:
        raise ConfigError(
            f"the run was started with plan {told}, and plan.json has {mine}: it was changed in between; start it again"
        )
    if plan.layout.num_ranks != num_ranks:
        raise ConfigError(
            f"the plan has {plan.layout.num_ranks:,} ranks, and {num_ranks:,} were started; start as many as it has"
        )


def _train(run: RunDirectory, plan: Plan, budget: Duration | None, device: str) -> Summary:
    costs = Costs()
    config = run.config()
    corpus = prepare(config.data, corpus_directory(config.data, run.path.parent))
    reader = open_reader(config, corpus)
    check_tokenizer(run, corpus)
    job = Job.of(plan)
    mesh = Mesh(job.layout, job.expert_tp, device=device)
    everyone = ProcessGroupRanks()
    if everyone.broadcast(plan.fingerprint()) != plan.fingerprint():
        raise ConfigError("ranks read different plans: does every host see the same run directory?")
    # One machine's measurements for all, so that all of them compute alike.
    machine = everyone.broadcast(_machine(run, config) if mesh.rank == 0 else None)
    rank_plan = rank_plan_of(config, plan, job, mesh.rank, machine)
    state = RankState(config, job, rank_plan, mesh)
    executed = Decision(
        what="plan", choice=plan.fingerprint(), reason=f"plan.json, on {plan.layout.num_ranks:,} ranks"
    )
    news: list[Event] = [executed, *_decisions(plan)]
    if list_checkpoints(run.checkpoints_path):
        loaded, rejected = load_newest_shards(
            run.checkpoints_path, state.wanted(), everyone, expect=config.model, optional=("optimizer.",)
        )
        state.load(loaded.tensors, loaded.facts)
        news = [
            executed,
            *(CheckpointRejected(path=str(one.path), reason=one.reason) for one in rejected),
        ]
    if budget is not None and budget != config.budget:
        news.append(rebudget(config.budget, budget, state.progress))
        config = config.model_copy(update={"budget": budget})
        state.config = config
        if state.leads:
            with writing(run):
                run.write_config(config)
    observers: tuple[Observer, ...] = ()
    if state.leads:
        from colossus.observe.lines import Lines

        observers = (Lines(config, lambda line: print(line, flush=True)),)
    return run_session(run, config, rank_plan, corpus, reader, state, costs, observers, news)


def _machine(run: RunDirectory, config: RunConfig) -> Machine:
    """As it was measured when the run began, where it still is that machine: which library multiplies is chosen by the
    clock, and another one rounds otherwise, so that a resumed run would not be exact."""
    measured, kept = measure_machine(config), run.machine()
    if kept and (kept.chip, kept.kind, kept.num_threads) == (
        measured.chip,
        measured.kind,
        measured.num_threads,
    ):
        return kept
    with writing(run):
        run.write_machine(measured)
    return measured


def _decisions(plan: Plan) -> list[Event]:
    """What was chosen and why; what differs by pool, for each."""

    def chosen(what: str) -> str:
        for holder in (plan, plan.layout):
            if what in type(holder).model_fields:
                return str(getattr(holder, what))
        field = "micro_batch_sequences" if what == "micro_batch" else what
        values = [str(getattr(pool, field)) for pool in plan.pools]
        return values[0] if len(set(values)) == 1 else ", ".join(values)

    return [Decision(what=what, choice=chosen(what), reason=why) for what, why in plan.reasons.items()]


def rank_plan_of(config: RunConfig, plan: Plan, job: Job, rank: int, machine: Machine) -> RankPlan:
    """How `rank` does its part on `machine`."""
    share = job.share(rank)
    pool = plan.pools[job.shares.index(share)]
    dtype = "float32" if plan.precision == "float32" else "bfloat16"
    tokens = share.micro_batch_sequences * plan.sequence_tokens // plan.layout.cp
    held = pool.memory_bytes
    known = ("weights", "gradients", "optimizer", "activations", "loss")
    memory = Memory(
        # Beside the model: the plan knows what a GPU's context takes, and the process what it holds itself.
        baseline_bytes=held.get("context", 0) if machine.kind == "cuda" else machine.baseline_bytes,
        weight_bytes=held.get("weights", 0),
        gradient_bytes=held.get("gradients", 0),
        optimizer_bytes=held.get("optimizer", 0),
        activation_bytes=held.get("activations", 0),
        loss_bytes=held.get("loss", 0),
        workspace_bytes=sum(size for name, size in held.items() if name not in (*known, "context")),
    )
    flops = config.model.flops_per_token(plan.sequence_tokens) * plan.step_tokens / plan.layout.num_ranks
    return RankPlan(
        layout=plan.layout,
        machine=machine,
        micro_batch_sequences=share.micro_batch_sequences,
        num_micro_batches=share.num_micro_batches,
        sequence_tokens=plan.sequence_tokens,
        dtype=dtype,
        compile=_compiled(config, job, machine),
        loss_chunk_tokens=loss_chunk_tokens(config.model, tokens, machine.kind, tp=plan.layout.tp),
        estimate=RankEstimate(
            memory=memory, flops_per_step=flops, step_time_s=plan.estimate.step_time_s.likely
        ),
        reasons={},
    )


def _compiled(config: RunConfig, job: Job, machine: Machine) -> bool:
    """On GPUs, but where weight gradients are put off."""
    if config.fixed.compile is not None:
        return config.fixed.compile
    return machine.kind == "cuda" and job.schedule not in ZERO_BUBBLE


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Exception as error:
        report_failure(error)
        log_failure(error)
        sys.exit(1)
