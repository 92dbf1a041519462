"""Who does a step's arithmetic: one process all of it, or each of many ranks its part."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from colossus.data import BatchReader
from colossus.models import Decoder
from colossus.optim import Optimizers, gradient_norm, scale_gradients
from colossus.spec.rank import RankPlan
from colossus.spec.run import RunConfig
from colossus.trainer.step import Sums, accumulate_gradients, take_expert_loads


class Executor(Protocol):
    """What the loop asks of whoever does the arithmetic. Of many ranks, all are asked the same and get the same."""

    plan: RankPlan
    optimizers: Optimizers
    num_ranks: int

    def accumulate(self, step: int) -> Sums:
        """The gradient of the step's mean token loss; its loss and tokens, over all ranks."""
        ...

    def gradient_norm(self) -> Tensor: ...

    def scale_gradients(self, factor: Tensor) -> None: ...

    def clear_gradients(self) -> None: ...

    def take_expert_loads(self) -> float | None:
        """The busiest expert's tokens over the mean, since this was last asked; None where there are no experts."""
        ...

    @property
    def samples(self) -> Sequence[int]:
        """Those of the step at hand, by their global numbers."""
        ...


class OneProcess:
    """A whole model in this process."""

    num_ranks = 1

    def __init__(
        self, config: RunConfig, model: Decoder, optimizers: Optimizers, reader: BatchReader
    ) -> None:
        assert config.plan is not None
        self.plan, self.optimizers = config.plan, optimizers
        self._config, self._model, self._reader = config, model, reader
        self.samples: Sequence[int] = ()

    def accumulate(self, step: int) -> Sums:
        batch = self._reader.read(step)
        self.samples = batch.samples
        config = self._config
        return accumulate_gradients(
            self._model, batch, self.plan, z_loss=config.z_loss, routing=config.routing
        )

    def gradient_norm(self) -> Tensor:
        return gradient_norm(self._model)

    def scale_gradients(self, factor: Tensor) -> None:
        scale_gradients(self._model.parameters(), factor)

    def clear_gradients(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None

    def take_expert_loads(self) -> float | None:
        return take_expert_loads(self._model)
