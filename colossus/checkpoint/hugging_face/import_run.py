"""A run that starts from the weights of a Hugging Face directory."""

from functools import partial
from pathlib import Path

from colossus.checkpoint.hugging_face.read import Directory
from colossus.checkpoint.hugging_face.tokenizer_files import keep_companions
from colossus.checkpoint.new_run import run_from_weights
from colossus.data.progress import Progress
from colossus.errors import ConfigError
from colossus.observe.run_directory import RunDirectory
from colossus.spec.run import RunConfig


def import_run(
    source: Directory,
    config: RunConfig,
    *,
    runs_directory: Path | str,
    name: str,
    origin: str | None = None,
    tokenizer: Path | None = None,
    progress: Progress | None = None,
) -> RunDirectory:
    """Make a run directory whose checkpoint of step 0 holds the weights, for `colossus train --resume`.

    `config.model` has the parameters of `source.model`; the tokenizer is the directory's, or the file `tokenizer`.
    Memory holds one parameter and one stored tensor. Raises ConfigError for a configuration that is not of this
    model, CheckpointError, DataError or RunError for what cannot be read or written; nothing is left then.
    """
    _check_parameters(source, config)
    return run_from_weights(
        config,
        source.parameters(),
        tokenizer=_tokenizer(source, tokenizer),
        keep_companions=partial(keep_companions, source.path) if tokenizer is None else None,
        origin=origin or source.path.resolve().name,
        runs_directory=runs_directory,
        name=name,
        progress=progress,
    )


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
