"""A trained model from its run directory."""

import torch

from colossus.checkpoint import Rejected, load_newest
from colossus.data import Tokenizer
from colossus.errors import ConfigError
from colossus.models import Decoder, build
from colossus.observe.run_directory import RunDirectory


def load_run(run: RunDirectory) -> tuple[Decoder, Tokenizer, tuple[Rejected, ...]]:
    """The model with its newest good weights, its tokenizer, and the checkpoints passed over as damaged.

    Raises RunError, CheckpointError or DataError where a part is missing or damaged, ConfigError where the
    tokenizer has more entries than the model.
    """
    config = run.config()
    tokenizer = Tokenizer.load(run.tokenizer_path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{run.path}: the tokenizer has {tokenizer.vocab_size:,} entries and the model a vocabulary of "
            f"{config.model.vocab_size:,}; they do not belong together"
        )
    loaded, rejected = load_newest(run.checkpoints_path, expect=config.model, prefix="model.")
    model = build(config.model, seed=config.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(loaded.tensors[f"model.{name}"])
            parameter.requires_grad_(False)
    return model, tokenizer, rejected
