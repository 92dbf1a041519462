"""How text is cut and computed, where nothing else is asked for: as the model was trained."""

from dataclasses import dataclass
from typing import cast, get_args

import torch

from colossus.errors import ConfigError, did_you_mean
from colossus.evaluate.score import CHUNK_TOKENS
from colossus.evaluate.windows import check_stride
from colossus.generate import LoadedModel
from colossus.observe.run_directory import RunDirectory
from colossus.spec.model import Dtype

DIRECTORY_CONTEXT_TOKENS = 2048
"""Of a model that was not trained here, at most: many are made for contexts that no small machine can hold."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Windows of `context_tokens`, each `stride_tokens` on from the one before, `batch` at a time."""

    context_tokens: int
    stride_tokens: int
    batch: int
    dtype: Dtype
    chunk_tokens: int = CHUNK_TOKENS

    @property
    def torch_dtype(self) -> torch.dtype:
        """What matmuls run in."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    @property
    def windows(self) -> str:
        """A sentence without its full stop."""
        if self.stride_tokens == self.context_tokens:
            return f"Windows of {self.context_tokens:,} tokens that do not overlap, as in training"
        before = self.context_tokens - self.stride_tokens
        return (
            f"Windows of {self.context_tokens:,} tokens, one every {self.stride_tokens:,}: each token is predicted "
            f"with at least {before:,} before it, or all of its document"
        )


def is_run(loaded: LoadedModel) -> bool:
    """Whether the model was trained here, and not only its files are."""
    return (loaded.path / "config.toml").is_file()


def settings_of(
    loaded: LoadedModel,
    *,
    context_tokens: int | None = None,
    stride_tokens: int | None = None,
    dtype: str | None = None,
    batch: int = 8,
) -> Settings:
    """What is None is as in the run's training; for a directory, float32 and at most DIRECTORY_CONTEXT_TOKENS.

    Raises ConfigError for what cannot be.
    """
    most = loaded.model.spec.context_tokens
    usual, trained_in = min(most, DIRECTORY_CONTEXT_TOKENS), "float32"
    if is_run(loaded):
        config = RunDirectory(loaded.path).config()
        usual = config.batch.sequence_tokens
        trained_in = config.plan.dtype if config.plan is not None else trained_in
    context = usual if context_tokens is None else context_tokens
    if not 1 <= context <= most:
        raise ConfigError(f"a context of {context:,} tokens: {loaded.name} is made for 1 to {most:,}")
    stride = context if stride_tokens is None else stride_tokens
    check_stride(context, stride)
    chosen = trained_in if dtype is None else dtype
    if chosen not in get_args(Dtype):
        raise ConfigError(f"dtype is {chosen!r}.{did_you_mean(chosen, get_args(Dtype))}")
    return Settings(context, stride, batch, cast("Dtype", chosen))
