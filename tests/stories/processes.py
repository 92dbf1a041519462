"""Real runs in real processes: `colossus(...)` to the end, `running(...)` to do something to one on its way.

Configurations are small enough to train in a second.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from colossus.checkpoint import load_newest
from colossus.events import Event, read_events
from colossus.observe.history import history
from colossus.observe.run_directory import RunDirectory
from colossus.planner import plan_one_rank
from colossus.spec.config import override, to_toml
from colossus.spec.data import DataConfig, Source, TrainedTokenizer
from colossus.spec.duration import Duration
from colossus.spec.model import AttentionSpec, Dtype, MlpSpec, ModelSpec, NgramSpec, RecallSpec
from colossus.spec.rank import Machine
from colossus.spec.run import AdamW, Batch, Checkpoints, Evaluation, Fixed, Muon, RunConfig, WarmupStableDecay

PATIENCE_S = 300.0

PLAIN = ModelSpec(
    name="plain",
    vocab_size=300,
    context_tokens=32,
    num_layers=1,
    hidden_size=32,
    attention=AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=16),
    mlp=MlpSpec(intermediate_size=64),
)
SPARSE = PLAIN.model_copy(update={"name": "sparse", "ngrams": NgramSpec(num_rows=64), "recall": RecallSpec()})
MODELS = {"plain": PLAIN, "sparse": SPARSE}
MACHINE = Machine(
    chip="a CPU",
    kind="cpu",
    num_threads=1,
    memory_bytes=2**34,
    baseline_bytes=2**28,
    matmul_flops={"float32": 1e11, "bfloat16": 1e11},
    compiled_before=False,
)
OPTIMIZERS: dict[str, AdamW | Muon] = {"adamw": AdamW(), "muon": Muon()}


def write_corpus(directory: Path) -> Path:
    """60 short documents, no two alike; about 8 KB."""
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(60):
        (directory / f"{i:02}.txt").write_text(f"document {i}: " + " ".join(str(i * k) for k in range(1, 40)))
    return directory


def recipe(
    directory: Path,
    *settings: str,
    model: str = "plain",
    optimizer: str = "adamw",
    dtype: Dtype | None = "float32",
) -> str:
    """A configuration file in `directory`, its text beside it; 12 steps unless `settings` say otherwise.

    With a plan for `dtype`, whichever is faster here; None: without, so that the machine is measured first.
    """
    config = RunConfig(
        name="story",
        model=MODELS[model],
        data=DataConfig(
            sources=(Source(path=str(write_corpus(directory / "text"))),),
            heldout_fraction=0.1,
            tokenizer=TrainedTokenizer(vocab_size=300),
        ),
        batch=Batch(sequences=4, sequence_tokens=32),
        budget=Duration.parse("12 steps"),
        optimizer=OPTIMIZERS[optimizer],
        schedule=WarmupStableDecay(warmup_steps=3),
        checkpoints=Checkpoints(every=Duration.parse("4 steps")),
        evaluation=Evaluation(every=Duration.parse("5 steps"), max_tokens=200),
        fixed=Fixed(dtype=dtype),
    )
    config = override(config, list(settings))
    if dtype is not None:
        config = config.model_copy(update={"plan": plan_one_rank(config, MACHINE)})
    path = directory / "recipe.toml"
    path.write_text(to_toml(config))
    return str(path)


# --- processes ---

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["colossus.cli.train", "colossus.trainer.run", "torch._dynamo", "torch.distributed", "matplotlib.pyplot"]
)


@dataclass
class Process:
    """A command on its way."""

    arguments: tuple[str, ...]
    process: BaseProcess
    output: Path
    ends_s: float = field(default_factory=lambda: time.monotonic() + PATIENCE_S)

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def wait(self) -> int:
        """The exit status; negative for the signal that killed it."""
        self.process.join(max(0.0, self.ends_s - time.monotonic()))
        assert self.process.exitcode is not None, f"{self.arguments} goes on and on:\n{self.err}"
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Looks fifty times a second. Fails when the process ends first."""
        while not condition():
            alive = self.process.is_alive()
            assert alive or condition(), f"{self.arguments} ended too early:\n{self.err}"
            assert time.monotonic() < self.ends_s, f"{self.arguments} takes too long:\n{self.err}"
            time.sleep(0.02)

    @property
    def out(self) -> str:
        return (self.output / "out").read_text()

    @property
    def err(self) -> str:
        return (self.output / "err").read_text()


@contextmanager
def running(
    *arguments: str, before: Callable[[], None] | None = None, draws: bool = False
) -> Iterator[Process]:
    """`colossus <arguments>` in a new process, which first calls `before`; killed if it outlives the block.

    A fork server that has torch loaded makes it in milliseconds. One thread where it trains, and no curves unless
    it `draws`: they would take half of its time.
    """
    trains = arguments[:1] == ("train",) and "--resume" not in arguments
    arguments = (*arguments, "--threads", "1") if trains else arguments
    with tempfile.TemporaryDirectory() as output:
        process = _context.Process(target=_main, args=(arguments, Path(output), before, draws), daemon=True)
        process.start()
        try:
            yield Process(arguments, process, Path(output))
        finally:
            process.kill()
            process.join()


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        assert self.out.count("\n") == 1
        value: dict[str, Any] = json.loads(self.out)
        return value


def colossus(
    *arguments: str, before: Callable[[], None] | None = None, draws: bool = False, status: int = 0
) -> Done:
    """Runs to its end, and fails unless that is with `status`."""
    with running(*arguments, before=before, draws=draws) as process:
        done = Done(process.wait(), process.out, process.err)
    assert done.status == status, f"{arguments} ended with {done.status}:\n{done.out}\n{done.err}"
    return done


def _main(arguments: tuple[str, ...], output: Path, before: Callable[[], None] | None, draws: bool) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    from colossus.cli import main
    from colossus.trainer import session

    if not draws:
        session.write_curves = lambda *arguments, **named: None
    sys.argv = ["colossus", *arguments]
    if before is not None:
        before()
    main()


# --- what came of it ---


def events(run: RunDirectory) -> list[Event]:
    return list(read_events(run.events_path)) if run.events_path.is_file() else []


def kinds(run: RunDirectory) -> list[str]:
    return [type(event).__name__ for event in events(run)]


def steps_done(run: RunDirectory) -> int:
    """Steps in the log, those done twice counted twice."""
    return run.events_path.read_bytes().count(b'"StepDone"') if run.events_path.is_file() else 0


def losses(run: RunDirectory) -> list[str]:
    """Of the steps that were kept, to the last bit."""
    return [step.loss.hex() for step in history(run.events()).steps]


def same_course(one: RunDirectory, other: RunDirectory) -> None:
    """Fails unless both runs had the same losses and ended with the same weights and optimizer state."""
    assert losses(one) == losses(other)
    first, _ = load_newest(one.checkpoints_path)
    second, _ = load_newest(other.checkpoints_path)
    assert first.step == second.step
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert tensor.equal(second.tensors[name]), f"{name} differs"
