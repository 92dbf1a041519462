"""All that a run is at one instant: weights, optimizer state, how far it has come; as tensors and facts."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from colossus.errors import CheckpointError
from colossus.models import Decoder, build
from colossus.optim import Optimizers, build_optimizers
from colossus.spec.duration import Progress
from colossus.spec.run import RunConfig
from colossus.trainer.precision import DTYPES


@dataclass
class TrainState:
    """What the loop changes, and a checkpoint holds. `progress.steps` is the number of the next step."""

    model: Decoder
    optimizers: Optimizers
    progress: Progress = field(default_factory=Progress)
    skipped_in_a_row: int = 0

    @classmethod
    def new(cls, config: RunConfig) -> "TrainState":
        """The state before the first step: a function of the configuration alone."""
        assert config.plan is not None
        model = build(config.model, seed=config.seed, device=config.plan.machine.kind)
        dtype = DTYPES[config.plan.dtype]
        optimizers = build_optimizers(
            model, config.model, config.optimizer, balancing_step=config.routing.balancing_step, dtype=dtype
        )
        return cls(model, optimizers)

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
