"""What our distributed trainer costs beside plainer code that does the same, in one run, turn by turn.

    python benchmarks/parallel_overhead.py [--only one two] [--repetitions 12]

Prints Markdown. Two comparisons, each of whole optimizer steps (batch, forward, backward, norm, clipping, optimizer):

    one     on one process, the trainer's loop over a rank of many (a world of one rank) against the same loop over one
            process. Target: at most 2 % more CPU time.
    two     on two processes, the trainer's loop against FSDP2 by hand: `fully_shard` on each layer of the same decoder,
            torch's AdamW on its DTensors, torch's clipping, the same loss. Target: at least 0.9 of its tokens/s.

Each side lives in processes of its own, with one thread each, and they take steps by turns, another one first each
time; of each round the ratio is taken, so that what else runs on the machine counts for all. All train from the same
weights on the same batches: that their losses agree is checked after every round.

The ranks of `two` have the environment that `colossus train` gives to ranks (what `rank_environment` says to glibc), so
that the ratio is of the code alone; a third side is FSDP2 by hand with glibc as it comes.
"""

import argparse
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from colossus.data import Batch
from colossus.models import build, chunked_cross_entropy
from colossus.optim import multiplier, optimizers_of
from colossus.parallel.mesh import Mesh
from colossus.planner.one_rank.plan import loss_chunk_tokens
from colossus.spec import run as spec
from colossus.spec.duration import Duration
from colossus.spec.job import Job, Share
from colossus.spec.layout import Layout
from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec
from colossus.spec.plan import Sharding
from colossus.spec.rank import Machine, Memory, RankEstimate, RankPlan
from colossus.trainer.loop import train
from colossus.trainer.machine import peak_rss_bytes, prepare_process, rank_environment
from colossus.trainer.ranks import RankState
from colossus.trainer.state import AnyState, TrainState

SEQUENCE_TOKENS = 128
"""Short: what a step costs beside its arithmetic then shows most."""
MOST_STEPS = 10_000
WARM_UP_STEPS = 6
"""Of every side, for the heap to find its size."""
AGREE = 1e-4
"""Relative difference of losses that the order of sums may make within a few tens of steps."""


def model(name: str, layers: int, hidden: int, vocab: int) -> ModelSpec:
    heads = hidden // 64
    return ModelSpec(
        name=name,
        vocab_size=vocab,
        context_tokens=SEQUENCE_TOKENS,
        num_layers=layers,
        hidden_size=hidden,
        attention=AttentionSpec(num_heads=heads, num_kv_heads=heads, head_dim=64),
        mlp=MlpSpec(intermediate_size=8 * hidden // 3 // 16 * 16),
    )


SIZES = (model("small", 4, 256, 4096), model("middle", 8, 448, 8192), model("large", 12, 576, 8192))
MICRO_BATCHES = (1, 4)
"""Of one sequence each, in a step."""
SHARDINGS: tuple[Sharding, ...] = ("weights", "gradients", "optimizer")
"""All of them with the smallest model, where what is not arithmetic counts most; the first with the others."""


@dataclass(frozen=True)
class Step:
    """One step of one side, on all ranks."""

    wall_s: float
    """Of the slowest rank."""
    cpu_s: float
    """Of all ranks."""
    memory_bytes: int
    """The most that a rank's process has held until then."""
    loss: float


Side = Callable[[], float]
"""Takes a step and returns its loss per token."""


class RandomText:
    """A reader whose sample `n` is the same tokens for whoever asks."""

    def __init__(self, model: ModelSpec, sequences: int) -> None:
        self._vocab, self._sequences = model.vocab_size, sequences

    def read(self, step: int) -> Batch:
        return self.read_samples(step * self._sequences, self._sequences)

    def read_samples(self, first: int, count: int) -> Batch:
        samples = np.arange(first, first + count)
        rows = np.stack(
            [
                np.random.default_rng(int(n)).integers(0, self._vocab, SEQUENCE_TOKENS + 1)
                for n in samples.tolist()
            ]
        )
        return Batch(rows[:, :-1], rows[:, 1:], np.zeros((count, SEQUENCE_TOKENS), np.int32), samples)


def job_of(model: ModelSpec, micro_batches: int, *, ranks: int = 1, sharding: Sharding = "none") -> Job:
    return Job(
        layout=Layout(shard=ranks),
        sharding=sharding,
        stage_layers=(model.num_layers,),
        sequence_tokens=SEQUENCE_TOKENS,
        shares=(Share(micro_batch_sequences=1, num_micro_batches=micro_batches),),
    )


def config_of(model: ModelSpec, job: Job) -> spec.RunConfig:
    """In float32. The figures about the machine are only there to be filled in: nothing here is planned by them."""
    machine = Machine(
        chip="cpu", kind="cpu", num_threads=1, memory_bytes=2**34, baseline_bytes=0,
        matmul_flops={"float32": 1e11, "bfloat16": 1e11}, compiled_before=False,
    )  # fmt: skip
    nothing = Memory(**dict.fromkeys([n for n in Memory.model_fields if n.endswith("_bytes")], 0))
    plan = RankPlan(
        layout=Layout(replica=job.layout.num_ranks),
        machine=machine,
        micro_batch_sequences=1,
        num_micro_batches=job.shares[0].num_micro_batches,
        sequence_tokens=SEQUENCE_TOKENS,
        dtype="float32",
        compile=False,
        loss_chunk_tokens=loss_chunk_tokens(model, SEQUENCE_TOKENS, "cpu"),
        estimate=RankEstimate(memory=nothing, flops_per_step=1.0, step_time_s=1.0),
        reasons={},
    )
    return spec.RunConfig(
        name="overhead",
        model=model,
        batch=spec.Batch(sequences=job.global_batch_sequences, sequence_tokens=SEQUENCE_TOKENS),
        budget=Duration(amount=float(MOST_STEPS), unit="steps"),
        optimizer=spec.AdamW(learning_rate=3e-4),
        plan=plan,
    )


# --- the sides ---


def ours(config: spec.RunConfig, state: AnyState) -> Side:
    """The trainer's own loop, whoever does its arithmetic."""
    reader: Any = RandomText(config.model, config.batch.sequences)
    steps = train(config, state, reader)
    return lambda: next(steps).loss or math.nan  # a step without a loss was skipped


def by_hand(config: spec.RunConfig, job: Job) -> Side:
    """FSDP2 as its documentation has it, under the same decoder: gathers, scatters, norms and updates are torch's."""
    ranks, kind = job.layout.num_ranks, job.sharding
    decoder = build(config.model, seed=config.seed)
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=kind == "weights")
    fully_shard(decoder, mesh=mesh, reshard_after_forward=False)
    for module in decoder.modules():
        if hasattr(module, "set_gradient_divide_factor"):  # sums: the loss is divided by the step's tokens
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    optimizers = optimizers_of(decoder, config.model, config.optimizer)
    reader = RandomText(config.model, config.batch.sequences)
    first, count = job.samples(dist.get_rank())
    assert config.plan is not None
    chunk_tokens, clip = config.plan.loss_chunk_tokens, config.gradient_clip
    assert clip is not None

    def steps() -> Iterator[float]:
        for step in range(MOST_STEPS):
            rate = multiplier(config.schedule, step=step, done=step / MOST_STEPS)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * rate
            batch = reader.read_samples(step * job.global_batch_sequences + first, count)
            tokens, targets, documents = (
                torch.from_numpy(array) for array in (batch.tokens, batch.targets, batch.documents)
            )
            total = torch.zeros(())
            for number in range(count):
                last, here = number == count - 1, slice(number, number + 1)
                decoder.set_is_last_backward(last)
                decoder.set_requires_gradient_sync(last or kind != "optimizer")
                decoder.set_reshard_after_backward(last or kind == "weights")
                hidden = decoder(tokens[here], documents[here]).flatten(0, 1)
                objective, loss = chunked_cross_entropy(
                    hidden, decoder.head_weight, targets[here].flatten(), chunk_tokens=chunk_tokens
                )
                (objective / job.step_tokens).backward()
                total += loss
            norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), clip)
            if isinstance(norm, DTensor):
                norm = norm.full_tensor()
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            dist.all_reduce(total)
            norm.item()
            yield total.item() / job.step_tokens

    made = steps()
    return lambda: next(made)


# --- turns ---


@dataclass(frozen=True)
class SideSpec:
    """A side in processes of its own: two sides in one process would share a heap, and one would find its pages where
    the other has left them."""

    made_by: Callable[[ModelSpec, int, Sharding], Side]
    environment: Mapping[str, str]
    """On top of ours."""


def one_of_many(model: ModelSpec, micro_batches: int, _: Sharding) -> Side:
    job = job_of(model, micro_batches)
    config = config_of(model, job)
    assert config.plan is not None
    return ours(config, RankState(config, job, config.plan, Mesh(job.layout)))


def alone(model: ModelSpec, micro_batches: int, _: Sharding) -> Side:
    config = config_of(model, job_of(model, micro_batches))
    return ours(config, TrainState.new(config))


def sharded(model: ModelSpec, micro_batches: int, sharding: Sharding) -> Side:
    job = job_of(model, micro_batches, ranks=2, sharding=sharding)
    config = config_of(model, job)
    assert config.plan is not None
    return ours(config, RankState(config, job, config.plan, Mesh(job.layout)))


def sharded_by_hand(model: ModelSpec, micro_batches: int, sharding: Sharding) -> Side:
    job = job_of(model, micro_batches, ranks=2, sharding=sharding)
    return by_hand(config_of(model, job), job)


ONE = (SideSpec(one_of_many, {}), SideSpec(alone, {}))
TWO = (
    SideSpec(sharded, rank_environment("cpu")),
    SideSpec(sharded_by_hand, rank_environment("cpu")),
    SideSpec(sharded_by_hand, {}),
)


def in_turns(
    sides: Sequence[SideSpec], num_ranks: int, repetitions: int, *job: Any
) -> list[tuple[Step, ...]]:
    """A step of each side in every repetition, after those that warm up; each time another side goes first."""
    rounds = []
    with ExitStack() as stack:
        started = [stack.enter_context(_started(side, num_ranks, *job)) for side in sides]
        for number in range(WARM_UP_STEPS + repetitions):
            order = [(number + i) % len(sides) for i in range(len(sides))]
            taken = {i: _step(started[i]) for i in order}
            steps = tuple(taken[i] for i in range(len(sides)))
            for step in steps[1:]:
                if not abs(steps[0].loss - step.loss) < AGREE * step.loss:
                    raise SystemExit(
                        f"step {number}: the losses are {steps[0].loss} and {step.loss}: not the same work"
                    )
            rounds.append(steps)
    return rounds[WARM_UP_STEPS:]


def _step(pipes: Sequence[Any]) -> Step:
    for pipe in pipes:
        pipe.send(None)
    try:
        steps = [pipe.recv() for pipe in pipes]
    except EOFError:
        raise SystemExit("a rank failed; its error is above") from None
    return Step(
        wall_s=max(step.wall_s for step in steps),
        cpu_s=sum(step.cpu_s for step in steps),
        memory_bytes=max(step.memory_bytes for step in steps),
        loss=steps[0].loss,
    )


@contextmanager
def _started(side: SideSpec, num_ranks: int, *job: Any) -> Iterator[list[Any]]:
    """Pipes to the ranks of a side, each of which takes a step for whatever comes through, and answers with it."""
    context = multiprocessing.get_context("spawn")
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        pipes, processes = [], []
        os.environ.update(side.environment)
        try:
            for rank in range(num_ranks):
                mine, theirs = context.Pipe()
                process = context.Process(
                    target=_on_rank, args=(rank, num_ranks, store, theirs, side.made_by, *job), daemon=True
                )
                process.start()
                theirs.close()
                pipes.append(mine)
                processes.append(process)
        finally:
            os.environ.clear()
            os.environ.update(before)
        try:
            yield pipes
        finally:
            for process in processes:
                process.kill()
                process.join()


def _on_rank(
    rank: int, num_ranks: int, store: str, pipe: Any, made_by: Callable[..., Side], *job: Any
) -> None:
    prepare_process(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
    side = made_by(*job)
    while True:
        pipe.recv()
        dist.barrier()
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        loss = side()
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        pipe.send(Step(wall_s, cpu_s, peak_rss_bytes(), loss))


# --- the report ---


def spread(values: Sequence[float], places: int = 3) -> str:
    """Median, and the middle half of all."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{places}f} ({low:.{places}f} to {high:.{places}f})"


def row(rounds: Sequence[tuple[Step, ...]], tokens: int) -> str:
    """The first side beside the second, and each side's own figures."""
    cpu = [steps[0].cpu_s / steps[1].cpu_s for steps in rounds]
    rates = [steps[1].wall_s / steps[0].wall_s for steps in rounds]
    sides = list(zip(*rounds, strict=True))
    speeds = [f"{tokens / statistics.median(step.wall_s for step in side):.0f}" for side in sides]
    memory = [f"{max(step.memory_bytes for step in side) / 1e6:.0f}" for side in sides]
    return " | ".join([spread(cpu), spread(rates), *speeds, *memory])


def header(names: Sequence[str], what: Sequence[str]) -> str:
    columns = [
        *what,
        f"CPU time, {names[0]} over {names[1]}",
        f"tokens/s, {names[0]} over {names[1]}",
        *(f"tokens/s, {name}" for name in names),
        *(f"peak MB, {name}" for name in names),
    ]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=["one", "two"], default=["one", "two"])
    parser.add_argument(
        "--sizes", nargs="+", choices=[m.name for m in SIZES], default=[m.name for m in SIZES]
    )
    parser.add_argument("--repetitions", type=int, default=12)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    models = [m for m in SIZES if m.name in arguments.sizes]
    load = os.getloadavg()[0]
    print(
        f"{date.today()}. {os.cpu_count()} cores at load {load:.0f}, Python {platform.python_version()}, "
        f"torch {torch.__version__}.\n{arguments.repetitions} repetitions; medians, and the middle half of all.\n"
    )
    if "one" in arguments.only:
        print(header(("a rank", "alone"), ("model", "weights", "micro-batches")))
        for m in models:
            for count in MICRO_BATCHES:
                rounds = in_turns(ONE, 1, arguments.repetitions, m, count, "none")
                tokens = count * SEQUENCE_TOKENS
                print(f"| {m.name} | {m.num_params() / 1e6:.1f} M | {count} | {row(rounds, tokens)} |")
                sys.stdout.flush()
        print()
    if "two" in arguments.only:
        print(
            header(
                ("ours", "by hand", "by hand, glibc as it comes"),
                ("model", "weights", "micro-batches", "sharded"),
            )
        )
        for m in models:
            for sharding in SHARDINGS if m is SIZES[0] else SHARDINGS[:1]:
                for count in MICRO_BATCHES:
                    rounds = in_turns(TWO, 2, arguments.repetitions, m, count, sharding)
                    tokens = 2 * count * SEQUENCE_TOKENS
                    size = f"{m.num_params() / 1e6:.1f} M"
                    print(f"| {m.name} | {size} | {count} | {sharding} | {row(rounds, tokens)} |")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
