"""Small training runs without a corpus."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from colossus.data import IGNORED
from colossus.data import Batch as Arrays
from colossus.events import StepDone, StepSkipped
from colossus.spec.data import DataConfig, LoadedTokenizer
from colossus.spec.duration import Duration
from colossus.spec.model import ModelSpec, NgramSpec
from colossus.spec.run import AdamW, Batch, Muon, RunConfig, WarmupStableDecay
from colossus.trainer.loop import train
from colossus.trainer.state import TrainState
from tests.helpers import tiny
from tests.spec.configs import plan_for

SEQUENCES, TOKENS = 5, 12
MODEL = tiny(ngrams=NgramSpec(orders=(2,), num_rows=11))


def random_batch(step: int, spec: ModelSpec = MODEL, ignored: bool = False) -> Arrays:
    """Two documents in each row; with `ignored`, padding of every length, one row nothing else."""
    random = np.random.default_rng(step)
    rows = random.integers(spec.vocab_size, size=(SEQUENCES, TOKENS + 1))
    documents = np.zeros((SEQUENCES, TOKENS), np.int32)
    for row, border in enumerate(random.integers(1, TOKENS, size=SEQUENCES)):
        documents[row, border:] = 1
    targets = rows[:, 1:].copy()
    if ignored:
        for row, length in enumerate((3, 0, TOKENS, 1, 7)):
            targets[row, TOKENS - length :] = IGNORED
    samples = np.arange(step * SEQUENCES, (step + 1) * SEQUENCES)
    return Arrays(rows[:, :-1], targets, documents, samples)


class Reader:
    """Random batches, a function of the step; remembers which it gave last."""

    step = -1

    def read(self, step: int) -> Arrays:
        self.step = step
        return random_batch(step)


def small_run(micro_batch_sequences: int = 2, **changes: Any) -> RunConfig:
    batch = Batch(sequences=SEQUENCES, sequence_tokens=TOKENS)
    plan = plan_for(batch).model_copy(
        update={"micro_batch_sequences": micro_batch_sequences, "loss_chunk_tokens": 7}
    )
    parts: dict[str, Any] = {
        "name": "small",
        "model": MODEL,
        "data": DataConfig(tokenizer=LoadedTokenizer(path="nowhere")),
        "batch": batch,
        "budget": Duration(amount=8, unit="steps"),
        "optimizer": Muon(rest=AdamW(learning_rate=0.01)),
        "schedule": WarmupStableDecay(warmup_steps=3),
    }
    # Five sequences do not split evenly, which a plan of the planner's would refuse; the loop must not care.
    return RunConfig(**{**parts, **changes}).model_copy(update={"plan": plan})


def steps(
    config: RunConfig, state: TrainState, reader: Reader | None = None
) -> Iterator[StepDone | StepSkipped]:
    return train(config, state, reader or Reader())  # type: ignore[arg-type]


def bits(state: TrainState) -> dict[str, Tensor]:
    """Weights and optimizer state at this instant."""
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def poisoned(state: TrainState, reader: Reader, where: str, value: float, at: set[int]) -> Iterator[None]:
    """At the steps `at` the loss (`where` is "loss"), or the gradient of that parameter, is times `value`."""

    def poison(tensor: Tensor) -> Tensor:
        return tensor * value if reader.step in at else tensor

    if where == "loss":
        handle = state.model.final_norm.register_forward_hook(lambda _module, _inputs, x: poison(x))
    else:
        handle = state.model.get_parameter(where).register_hook(poison)
    try:
        yield
    finally:
        handle.remove()
