"""Events as TensorBoard scalars, by tensorboard's own writer: no torch."""

import importlib
from pathlib import Path
from typing import Any

from colossus.errors import ConfigError
from colossus.events import Evaluated, Event, RunFinished, StepDone


class TensorBoard:
    """An observer that writes into `directory`; look at it with `tensorboard --logdir runs`."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError where tensorboard is not installed."""
        try:
            writer = importlib.import_module("tensorboard.summary").Writer
        except ImportError:
            raise ConfigError(
                "tensorboard is not installed; run `pip install 'colossus-llm[tensorboard]'`, "
                "or leave out --tensorboard"
            ) from None
        self._writer: Any = writer(str(directory))

    def __call__(self, event: Event) -> None:
        match event:
            case StepDone():
                self._step(event)
            case Evaluated():
                self._writer.add_scalar("heldout/bits_per_byte", event.bits_per_byte, event.step)
                self._writer.add_scalar("heldout/loss", event.loss, event.step)
            case RunFinished():
                self._writer.flush()

    def _step(self, event: StepDone) -> None:
        for tag, value in (
            ("train/loss", event.loss),
            ("train/gradient_norm", event.gradient_norm),
            ("train/learning_rate", event.learning_rate),
            ("speed/tokens_per_s", event.tokens_per_s),
            ("speed/mfu", event.mfu),
            ("speed/memory_bytes", event.memory_bytes),
        ):
            self._writer.add_scalar(tag, value, event.step + 1)
        if event.busiest_expert is not None:
            self._writer.add_scalar("experts/busiest_over_mean", event.busiest_expert, event.step + 1)
