"""All that a run is at one instant: weights, optimizer state, how far it has come; as tensors and facts."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from colossus.checkpoint import Saver
from colossus.data import BatchReader, Corpus, Tokenizer
from colossus.errors import CheckpointError
from colossus.generate import Sampling, generate
from colossus.models import Decoder, build
from colossus.optim import Optimizers, optimizers_of
from colossus.spec.duration import Progress
from colossus.spec.rank import RankPlan
from colossus.spec.run import RunConfig
from colossus.trainer.evaluate import HeldOut, evaluate
from colossus.trainer.execute import Executor, OneProcess
from colossus.trainer.precision import DTYPES, use_float32_library

SAMPLE_TOKENS = 200


class AnyState(Protocol):
    """What the loop changes, of one process or of one rank of many. `progress.steps` is the number of the next step."""

    progress: Progress
    skipped_in_a_row: int

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes logs and speaks to people."""
        ...

    def executor(self, config: RunConfig, reader: BatchReader) -> Executor:
        """Who trains it."""
        ...

    def agree(self, progress: Progress) -> Progress:
        """The first rank's, on all: only one clock decides."""
        ...

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each, whether it is so on any rank."""
        ...

    def each(self, number: int) -> tuple[int, ...]:
        """A number that every process has its own of: all of them, by rank."""
        ...

    def compile(self) -> None: ...

    def saver(self, directory: Path, config: RunConfig) -> Saver: ...

    def tensors(self) -> Mapping[str, Any]:
        """What this process writes to a checkpoint: `model.<parameter>` and `optimizer.<parameter>.<what>`."""
        ...

    def facts(self) -> dict[str, Any]: ...

    def heldout(
        self, corpus: Corpus, plan: RankPlan, *, max_tokens: int | None, stop: Callable[[], bool] | None
    ) -> HeldOut | None:
        """As `trainer.evaluate.evaluate`."""
        ...

    def sample(self, tokenizer: Tokenizer, seed: int) -> str | None:
        """A text of the model's own; None where no process has the whole model."""
        ...


@dataclass
class TrainState:
    """What the loop changes, and a checkpoint holds, in one process."""

    model: Decoder
    optimizers: Optimizers
    progress: Progress = field(default_factory=Progress)
    skipped_in_a_row: int = 0
    leads = True

    @classmethod
    def new(cls, config: RunConfig) -> "TrainState":
        """The state before the first step: a function of the configuration alone."""
        assert config.plan is not None
        model = build(config.model, seed=config.seed, device=config.plan.machine.kind)
        dtype = DTYPES[config.plan.dtype]
        optimizers = optimizers_of(
            model, config.model, config.optimizer, balancing_step=config.routing.balancing_step, dtype=dtype
        )
        return cls(model, optimizers)

    def executor(self, config: RunConfig, reader: BatchReader) -> Executor:
        return OneProcess(config, self.model, self.optimizers, reader)

    def agree(self, progress: Progress) -> Progress:
        return progress

    def any(self, *flags: bool) -> tuple[bool, ...]:
        return flags

    def each(self, number: int) -> tuple[int, ...]:
        return (number,)

    def compile(self) -> None:
        for layer in self.model.layers:
            layer.compile(dynamic=False)

    def saver(self, directory: Path, config: RunConfig) -> Saver:
        return Saver(directory, keep=config.checkpoints, model=config.model)

    def heldout(
        self, corpus: Corpus, plan: RankPlan, *, max_tokens: int | None, stop: Callable[[], bool] | None
    ) -> HeldOut | None:
        return evaluate(self.model, corpus, plan, max_tokens=max_tokens, stop=stop)

    def sample(self, tokenizer: Tokenizer, seed: int) -> str | None:
        # Each token's attention has a shape of its own, and oneDNN would keep a kernel for each: 180 MB in all.
        use_float32_library("default")
        sampling = Sampling(temperature=0.8, top_p=0.95, max_tokens=SAMPLE_TOKENS, seed=seed)
        return "".join(generate(self.model, tokenizer, "", sampling))

    def tensors(self) -> dict[str, Tensor]:
        """By flat name: `model.<parameter>` and `optimizer.<parameter>.<what>`. Views, not copies."""
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        for name, state in self._optimizer_states().items():
            for key, value in state.items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def facts(self) -> dict[str, Any]:
        return {"progress": asdict(self.progress), "skipped_in_a_row": self.skipped_in_a_row}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Takes over what a checkpoint holds. Raises CheckpointError for names that are not those here."""
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            if f"model.{name}" not in tensors:
                raise CheckpointError(f"the checkpoint has no tensor model.{name}")
            parameter.copy_(tensors[f"model.{name}"])
        owner = {
            p: optimizer for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]
        }
        for full_name, tensor in tensors.items():
            if not full_name.startswith("optimizer."):
                continue
            name, _, key = full_name.removeprefix("optimizer.").rpartition(".")
            if name not in parameters:
                raise CheckpointError(f"the checkpoint has {full_name}, of a parameter that is not here")
            parameter = parameters[name]
            owner[parameter].state[parameter][key] = tensor.to(parameter.device).clone()
        self.progress = Progress(**facts["progress"])
        self.skipped_in_a_row = facts["skipped_in_a_row"]

    def _optimizer_states(self) -> dict[str, dict[str, Tensor]]:
        states = {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}
        return {name: states[p] for name, p in self.model.named_parameters() if p in states}
