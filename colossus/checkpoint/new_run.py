"""A run that starts from weights that are there already, in place of random ones."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from colossus.checkpoint.payload import TensorType
from colossus.checkpoint.save import save_streamed
from colossus.data.progress import Progress as ShownProgress
from colossus.data.progress import SilentProgress
from colossus.data.tokenizer import Tokenizer
from colossus.errors import CheckpointError, ConfigError, RunError
from colossus.observe.run_directory import ORIGIN_NAME, RunDirectory, check_name
from colossus.spec.data import LoadedTokenizer
from colossus.spec.duration import Progress
from colossus.spec.run import RunConfig

"""In a run's directory: the model that it started from, for the card of what it becomes."""


def run_from_weights(
    config: RunConfig,
    parameters: Iterator[tuple[str, Tensor]],
    *,
    tokenizer: Path,
    origin: str,
    runs_directory: Path | str,
    name: str,
    keep_companions: Callable[[Path], None] | None = None,
    progress: ShownProgress | None = None,
) -> RunDirectory:
    """Make a run directory whose checkpoint of step 0 holds the weights, for `colossus train --resume`.

    `parameters` are those of `config.model`, in the order of its table, one at a time: memory holds no more. The run
    has its own copy of `tokenizer` (a file, or a directory with one), beside which `keep_companions` puts what belongs
    to it; it has no plan: the machine that trains makes it. `origin` is what the card calls the weights.

    Raises ConfigError, CheckpointError, DataError or RunError for what cannot be read or written; nothing is left
    then.
    """
    check_name(name)
    chosen = Tokenizer.load(tokenizer)
    if chosen.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {chosen.vocab_size:,} entries and the model a vocabulary of "
            f"{config.model.vocab_size:,}; give the model's own with --tokenizer"
        )
    run = RunDirectory.create(runs_directory, name)
    try:
        kept = chosen.save(run.tokenizer_path).resolve()
        if keep_companions is not None:
            keep_companions(run.tokenizer_path)
        data = config.data.model_copy(update={"tokenizer": LoadedTokenizer(path=str(kept))})
        config = config.model_copy(update={"data": data, "plan": None})
        _save(config, parameters, run, progress or SilentProgress())
        (run.path / ORIGIN_NAME).write_text(f"{origin}\n", encoding="utf-8")
        run.write_description(config)  # last: a directory with a config.toml can be resumed
    except OSError as error:
        shutil.rmtree(run.path, ignore_errors=True)
        raise RunError(f"cannot write to {run.path}: {error.strerror or error}") from None
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run


def _save(
    config: RunConfig, parameters: Iterator[tuple[str, Tensor]], run: RunDirectory, progress: ShownProgress
) -> None:
    # The state before the first step: weights, and an optimizer that has seen nothing.
    facts = {"progress": asdict(Progress()), "skipped_in_a_row": 0}
    types = {
        f"model.{parameter.name}": TensorType(torch.float32, parameter.shape)
        for parameter in config.model.parameters()
    }
    progress.stage("writing weights", sum(kind.num_bytes for kind in types.values()))

    def tensor(name: str) -> Tensor:
        return _next(parameters, name, progress)

    save_streamed(run.checkpoints_path, 0, types, tensor, facts, model=config.model)


def _next(parameters: Iterator[tuple[str, Tensor]], name: str, progress: ShownProgress) -> Tensor:
    """The next parameter, which must be the one that is asked for: both go in the order of the model's table."""
    found, values = next(parameters, ("none", None))
    if values is None or f"model.{found}" != name:
        raise CheckpointError(f"{name} was expected, and {found} comes next")
    progress.advance(values.nbytes)
    return values
