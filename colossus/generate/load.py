"""A trained model, ready to write: from a run, or from a Hugging Face directory."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colossus.checkpoint import Rejected, load_newest
from colossus.data import Tokenizer
from colossus.errors import CheckpointError, ConfigError, DataError, RunError
from colossus.models import Decoder, reset_buffers
from colossus.observe.run_directory import DEFAULT_RUNS, RunDirectory
from colossus.spec.model import ModelSpec

_MOST_CONFIG_BYTES = 16_000_000


@dataclass(frozen=True, slots=True)
class Borders:
    """Which tokens open a text, and which end what a model writes."""

    opening: tuple[int, ...]
    ends: frozenset[int]

    @classmethod
    def of_run(cls, tokenizer: Tokenizer) -> "Borders":
        """Those of a model trained here: END opens every document and closes the one before."""
        return cls((tokenizer.end_of_document,), frozenset((tokenizer.end_of_document,)))


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model whose parameters ask for no gradients, and what belongs to it."""

    model: Decoder
    tokenizer: Tokenizer
    name: str
    path: Path
    chat_template: str | None
    """The directory's own, in Jinja: someone else's program, only for a sandbox."""
    rejected: tuple[Rejected, ...]
    """Checkpoints that were passed over as damaged."""
    borders: Borders
    special_tokens: Mapping[str, str]
    """Spellings by role (`bos_token`, `eos_token`), for chat templates."""


def load_model(name_or_path: str | Path, runs: Path | str = DEFAULT_RUNS) -> LoadedModel:
    """The model of a run (its directory, its name under `runs`, or 'latest') or of a Hugging Face directory.

    Raises RunError, CheckpointError, DataError or ConfigError, naming what is missing, damaged or unknown.
    """
    path = Path(name_or_path)
    if (path / "config.json").is_file() and not (path / "config.toml").is_file():
        return _from_hugging_face(path)
    try:
        run = RunDirectory.open(name_or_path, runs)
    except RunError as error:
        if not path.is_dir():
            raise
        raise RunError(
            f"{path} is neither a run nor a Hugging Face model: there is no config.toml and no config.json in it"
        ) from error
    return _from_run(run)


def load_run(run: RunDirectory) -> tuple[Decoder, Tokenizer, tuple[Rejected, ...]]:
    """The model of a run with its newest good weights, its tokenizer, and the checkpoints passed over as damaged.

    Raises RunError, CheckpointError or DataError where a part is missing or damaged, ConfigError where the
    tokenizer has more entries than the model.
    """
    loaded = _from_run(run)
    return loaded.model, loaded.tokenizer, loaded.rejected


def _from_run(run: RunDirectory) -> LoadedModel:
    config = run.config()
    tokenizer = Tokenizer.load(run.tokenizer_path)
    _check_sizes(run.path, tokenizer, config.model)
    loaded, rejected = load_newest(run.checkpoints_path, expect=config.model, prefix="model.")
    parameters = (
        (parameter.name, loaded.tensors[f"model.{parameter.name}"]) for parameter in config.model.parameters()
    )
    model = _filled(config.model, parameters)
    # What came with the tokenizer of an imported run, which goes on as it began; there is nothing in other runs.
    beside = run.tokenizer_path
    described = _read_json(beside / "tokenizer_config.json")
    borders = Borders.of_run(tokenizer)
    ends = borders.ends | _ids(tokenizer, _read_json(beside / "generation_config.json").get("eos_token_id"))
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=run.name,
        path=run.path,
        chat_template=_chat_template(beside, described),
        rejected=rejected,
        borders=Borders(tokenizer.opening if described else borders.opening, ends),
        special_tokens=_special_tokens(described, tokenizer),
    )


def _from_hugging_face(path: Path) -> LoadedModel:
    from colossus.checkpoint.hugging_face import open_directory

    directory = open_directory(path)
    if directory.tokenizer is None:
        raise DataError(f"{path} has no tokenizer.json or tokenizer.model; put the model's own there")
    tokenizer = Tokenizer.load(directory.tokenizer)
    _check_sizes(path, tokenizer, directory.model)
    described = _read_json(path / "tokenizer_config.json")
    generation = _read_json(path / "generation_config.json")
    end_ids = (directory.config.get("eos_token_id"), generation.get("eos_token_id"))
    ends = frozenset((tokenizer.end_of_document,)).union(*(_ids(tokenizer, ids) for ids in end_ids))
    return LoadedModel(
        model=_filled(directory.model, directory.parameters()),
        tokenizer=tokenizer,
        name=path.resolve().name,
        path=path,
        chat_template=directory.chat_template,
        rejected=(),
        borders=Borders(tokenizer.opening, ends),
        special_tokens=_special_tokens(described, tokenizer),
    )


def _check_sizes(where: Path, tokenizer: Tokenizer, model: ModelSpec) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{where}: the tokenizer has {tokenizer.vocab_size:,} entries and the model a vocabulary of "
            f"{model.vocab_size:,}; they do not belong together"
        )


@torch.no_grad()
def _filled(spec: ModelSpec, parameters: Iterable[tuple[str, Tensor]]) -> Decoder:
    """A model with these weights, copied one by one: beside the model, memory holds one of them."""
    model = unfilled(spec)
    places = dict(model.named_parameters())
    for name, values in parameters:
        places.pop(name).copy_(values)
    if places:
        raise CheckpointError(f"{spec.name}: there are no values for {', '.join(sorted(places)[:5])}")
    return model.requires_grad_(False).eval()


def unfilled(spec: ModelSpec) -> Decoder:
    """A model on the CPU, its weights still anything, laid out for a few rows at a time.

    A matrix that has at least as many outputs as inputs lies input by input: a single row is then multiplied up to 1.7
    times as fast, and more rows as fast as ever (benchmarks/generation.md). Shapes and names are the usual ones.
    """
    with torch.device("meta"):
        model = Decoder(spec)
    model.to_empty(device="cpu")
    reset_buffers(model)
    with torch.no_grad():
        for parameter in spec.parameters():
            if parameter.role in ("matrix", "head") and parameter.shape[-2] >= parameter.shape[-1]:
                *experts, outputs, inputs = parameter.shape
                matrix = torch.empty(*experts, inputs, outputs).transpose(-1, -2)
                model.get_parameter(parameter.name).data = matrix
    return model


# --- what tokenizer files say ---


def _ids(tokenizer: Tokenizer, value: Any) -> frozenset[int]:
    """An id, or a list of them, as configurations have it; what is no id of the tokenizer does not count."""
    values = value if isinstance(value, list) else [value]
    return frozenset(one for one in values if type(one) is int and 0 <= one < tokenizer.vocab_size)


def _special_tokens(described: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    end = tokenizer.decode([tokenizer.end_of_document])
    found = {"bos_token": end, "eos_token": end} if not described else {"eos_token": end}
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = described.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[role] = token
    return found


def _chat_template(beside: Path, described: Mapping[str, Any]) -> str | None:
    file = beside / "chat_template.jinja"
    try:
        if file.is_file() and file.stat().st_size <= _MOST_CONFIG_BYTES:
            return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the chat template {file}: {error}") from None
    template = described.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """The table in a file; nothing where there is no file. Raises DataError for what is no table."""
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{path} is not a table of settings")
    return record
