"""Real runs in real processes: `colossus(...)` to the end, `running(...)` to do something to one on its way.

Processes are ended by their id in any case. Configurations are small enough to train in a second or two.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from colossus.checkpoint import load_newest
from colossus.events import Event, StepDone, read_events
from colossus.observe.history import history
from colossus.observe.run_directory import RunDirectory
from colossus.spec.config import from_toml, override, to_toml
from colossus.spec.data import DataConfig, Source, TrainedTokenizer
from colossus.spec.duration import Duration
from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec, NgramSpec, RecallSpec
from colossus.spec.run import AdamW, Batch, Checkpoints, Evaluation, Muon, RunConfig, WarmupStableDecay

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0

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
OPTIMIZERS: dict[str, AdamW | Muon] = {"adamw": AdamW(), "muon": Muon()}


def write_corpus(directory: Path) -> Path:
    """60 short documents, no two alike; about 8 KB."""
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(60):
        (directory / f"{i:02}.txt").write_text(f"document {i}: " + " ".join(str(i * k) for k in range(1, 40)))
    return directory


def recipe(directory: Path, *settings: str, model: str = "plain", optimizer: str = "adamw") -> str:
    """A configuration file in `directory`, its text beside it; 12 steps unless `settings` say otherwise."""
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
    )
    path = directory / "recipe.toml"
    path.write_text(to_toml(override(config, list(settings))))
    return str(path)


def planned(path: str, runs: Path, *settings: str, dtype: str | None = None) -> str:
    """The configuration with the plan that a run of it has, and the dtype that is asked for, as a file beside it."""
    colossus("train", path, "--runs", str(runs), "--steps", "1", "--name", "planning")
    plan = RunDirectory.open("planning-001", runs).config().plan
    assert plan is not None
    config = override(from_toml(Path(path).read_text()), list(settings))
    config = config.model_copy(update={"plan": plan.model_copy(update={"dtype": dtype or plan.dtype})})
    target = Path(path).with_name(f"planned-{plan.dtype}.toml")
    target.write_text(to_toml(config))
    return str(target)


# --- processes ---


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(*arguments: str, script: str = "") -> list[str]:
    """The command line, after `script` has done to its modules what the story needs."""
    if not script:
        return [sys.executable, "-m", "colossus.cli", *arguments]
    main = f"import sys; sys.argv = {['colossus', *arguments]!r}\n{script}\nfrom colossus.cli import main; main()"
    return [sys.executable, "-c", main]


def colossus(*arguments: str, script: str = "", status: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs to its end; `--threads 1` where it trains. Fails unless it ends with `status`."""
    arguments = _with_threads(arguments)
    done = subprocess.run(
        command(*arguments, script=script), capture_output=True, text=True, env=environment(), timeout=PATIENCE_S
    )
    assert done.returncode == status, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


@contextmanager
def running(*arguments: str, script: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process on its way; killed at the end of the block if it is still there."""
    process = subprocess.Popen(
        command(*_with_threads(arguments), script=script),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


def _with_threads(arguments: tuple[str, ...]) -> tuple[str, ...]:
    trains = arguments[:1] == ("train",) and "--resume" not in arguments and "--threads" not in arguments
    return (*arguments, "--threads", "1") if trains else arguments


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Looks a hundred times a second. Fails when the process ends first, or patience does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            assert process.stdout is not None
            raise AssertionError(f"ended with {process.returncode} too early:\n{process.stdout.read()}")
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


# --- what came of it ---


def events(run: RunDirectory) -> list[Event]:
    return list(read_events(run.events_path)) if run.events_path.is_file() else []


def kinds(run: RunDirectory) -> list[str]:
    return [type(event).__name__ for event in events(run)]


def steps_done(run: RunDirectory) -> int:
    return sum(isinstance(event, StepDone) for event in events(run))


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


def the_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one object on stdout."""
    assert done.stdout.count("\n") == 1
    value: dict[str, Any] = json.loads(done.stdout)
    return value
