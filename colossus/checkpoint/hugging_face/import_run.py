"""A run that starts from the weights of a Hugging Face directory."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from colossus.checkpoint.hugging_face.export_run import ORIGIN_NAME
from colossus.checkpoint.hugging_face.new_directory import write_synced
from colossus.checkpoint.hugging_face.read import Directory
from colossus.checkpoint.hugging_face.tokenizer_files import keep_companions
from colossus.checkpoint.payload import TensorType
from colossus.checkpoint.save import save_streamed
from colossus.data.progress import Progress as ShownProgress
from colossus.data.progress import SilentProgress
from colossus.data.tokenizer import Tokenizer
from colossus.errors import CheckpointError, ConfigError, RunError
from colossus.observe.run_directory import RunDirectory, check_name
from colossus.spec.data import LoadedTokenizer
from colossus.spec.duration import Progress
from colossus.spec.run import RunConfig


def import_run(
    source: Directory,
    config: RunConfig,
    *,
    runs_directory: Path | str,
    name: str,
    origin: str | None = None,
    tokenizer: Path | None = None,
    progress: ShownProgress | None = None,
) -> RunDirectory:
    """Make a run directory whose checkpoint of step 0 holds the weights, for `colossus train --resume`.

    `config.model` has the parameters of `source.model`; its tokenizer is set to the run's own copy of the
    directory's, or of the file `tokenizer`; it has no plan: the machine that trains makes it. `origin` is what the
    card calls the model. Memory holds one parameter and one stored tensor.

    Raises ConfigError for a configuration that is not of this model, CheckpointError, DataError or RunError for what
    cannot be read or written; nothing is left then.
    """
    check_name(name)
    _check_parameters(source, config)
    chosen = Tokenizer.load(_tokenizer(source, tokenizer))
    if chosen.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {chosen.vocab_size:,} entries and the model a vocabulary of "
            f"{config.model.vocab_size:,}; give the model's own with --tokenizer"
        )
    run = RunDirectory.create(runs_directory, name)
    try:
        kept = chosen.save(run.tokenizer_path).resolve()
        if tokenizer is None:
            keep_companions(source.path, run.tokenizer_path)
        data = config.data.model_copy(update={"tokenizer": LoadedTokenizer(path=str(kept))})
        config = config.model_copy(update={"data": data, "plan": None})
        _save(source, config, run, progress or SilentProgress())
        write_synced(run.path / ORIGIN_NAME, f"{origin or source.path.resolve().name}\n")
        run.write_description(config)  # last: a directory with a config.toml can be resumed
    except OSError as error:
        shutil.rmtree(run.path, ignore_errors=True)
        raise RunError(f"cannot write to {run.path}: {error.strerror or error}") from None
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run


def _save(source: Directory, config: RunConfig, run: RunDirectory, progress: ShownProgress) -> None:
    # The state before the first step: weights, and an optimizer that has seen nothing.
    facts = {"progress": asdict(Progress()), "skipped_in_a_row": 0}
    types = {
        f"model.{parameter.name}": TensorType(torch.float32, parameter.shape)
        for parameter in config.model.parameters()
    }
    progress.stage(f"reading {source.path}", sum(kind.num_bytes for kind in types.values()))
    parameters = source.parameters()

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


def _check_parameters(source: Directory, config: RunConfig) -> None:
    """Settings may change what the model computes, not what its weights are."""
    theirs = {parameter.name: parameter.shape for parameter in source.model.parameters()}
    ours = {parameter.name: parameter.shape for parameter in config.model.parameters()}
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if different:
        first = different[0]
        raise ConfigError(
            f"the settings make another model than {source.path} holds: {first} would be "
            f"{_shape(ours.get(first))} and is {_shape(theirs.get(first))}"
            f"{f'; and {len(different) - 1:,} more' if len(different) > 1 else ''}. Leave model.* as it is"
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _tokenizer(source: Directory, given: Path | None) -> Path:
    found = given or source.tokenizer
    if found is None:
        raise ConfigError(
            f"{source.path} has no tokenizer.json or tokenizer.model; give the model's tokenizer with --tokenizer FILE"
        )
    return found
