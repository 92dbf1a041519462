"""The zoo by name: finding a model as people write it, and reading one from a file."""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from colossus.errors import ConfigError
from colossus.spec.config import validated
from colossus.spec.model import ModelSpec
from colossus.zoo import deepseek, gpt, gpt_oss, grok, llama, mixtral, nemotron, olmo, qwen
from colossus.zoo.entry import Entry
from colossus.zoo.hugging_face import model_of, read_config
from colossus.zoo.ladder import RUNGS, ladder

ENTRIES: Mapping[str, Entry] = {
    **{name: Entry("ladder", "Colossus, zoo/ladder.py", partial(ladder, name)) for name in RUNGS},
    **gpt.ENTRIES,
    **llama.ENTRIES,
    **qwen.ENTRIES,
    **olmo.ENTRIES,
    **nemotron.ENTRIES,
    **mixtral.ENTRIES,
    **gpt_oss.ENTRIES,
    **deepseek.ENTRIES,
    **grok.ENTRIES,
}
"""Every model, small ones of a family before large ones."""

ALIASES = {
    "gpt2-small": "gpt2",
    "gpt2-124m": "gpt2",
    "gpt2-355m": "gpt2-medium",
    "gpt2-774m": "gpt2-large",
    "gpt2-1.5b": "gpt2-xl",
    "gpt3": "gpt3-175b",
    "mt-nlg-530b": "gpt3-530b",
    "llama3-405b": "llama3.1-405b",
    "llama3-1b": "llama3.2-1b",
    "llama3-3b": "llama3.2-3b",
    "mistral": "mistral-7b",
    "mistral-7b-v0.1": "mistral-7b",
    "mixtral": "mixtral-8x7b",
    "mixtral-8x7b-v0.1": "mixtral-8x7b",
    "mixtral-8x22b-v0.1": "mixtral-8x22b",
    "deepseek-v3-671b": "deepseek-v3",
    "deepseek-r1": "deepseek-v3",
    "nemotron-340b": "nemotron4-340b",
    "nemotron-15b": "nemotron4-15b",
    "grok-1-314b": "grok-1",
}
"""Other names that people use. Upper case, spaces and dashes make no difference to any name."""


def names() -> tuple[str, ...]:
    """The names of all models."""
    return tuple(ENTRIES)


def find(name: str) -> ModelSpec:
    """The model of this name: `llama3.1-8b`, `GPT-3 175B`. Raises ConfigError, with the nearest names, if none is."""
    return _build(_canonical(name))


def source(name: str) -> str:
    """Where the model's numbers are from. Raises ConfigError for an unknown name."""
    return ENTRIES[_canonical(name)].source


def family(name: str) -> str:
    """The family that the model belongs to. Raises ConfigError for an unknown name."""
    return ENTRIES[_canonical(name)].family


def load(name_or_path: str | Path) -> ModelSpec:
    """A model of the zoo, or the one in a .toml or .json file: a ModelSpec's fields at the top, or in a table
    `model`, as in a run's configuration; or the one of a Hugging Face config.json, or of a directory that has one.
    Raises ConfigError, one line for each thing that is wrong."""
    path = Path(name_or_path)
    if (path / "config.json").is_file():
        return _hugging_face(path / "config.json", read_config(path))
    if path.suffix.lower() in (".toml", ".json"):
        return _read(path)
    try:
        return find(str(name_or_path))
    except ConfigError as error:
        if path.exists():
            what = (
                "a directory without config.json" if path.is_dir() else "its name must end in .toml or .json"
            )
            raise ConfigError(f"{path} is not a model's file: {what}") from None
        raise ConfigError(f"{error} A file of your own must be a .toml or .json.") from None


# --- names ---


def _compact(name: str) -> str:
    """`GPT-3 175B` and `gpt3-175b` are one name."""
    return re.sub(r"[^a-z0-9.]", "", name.lower())


@lru_cache(maxsize=1)
def _by_compact_name() -> Mapping[str, str]:
    known = {_compact(name): name for name in ENTRIES}
    return {_compact(alias): name for alias, name in ALIASES.items()} | known


def _canonical(name: str) -> str:
    known = _by_compact_name()
    found = known.get(_compact(name)) or known.get(_compact(name.rpartition("/")[2]))
    if found is None:
        raise ConfigError(f"no model {name!r} in the zoo.{_nearest(name)}")
    return found


def _nearest(name: str) -> str:
    known = _by_compact_name()
    close = difflib.get_close_matches(_compact(name), known, n=6, cutoff=0.6)
    nearest = list(dict.fromkeys(known[match] for match in close))[:3]
    if not nearest:
        return " `colossus models` lists all."
    return f" Nearest: {', '.join(nearest)}. `colossus models` lists all."


@lru_cache(maxsize=128)
def _build(name: str) -> ModelSpec:
    return ENTRIES[name].build()


# --- files ---


def _read(path: Path) -> ModelSpec:
    try:
        text = path.read_text(encoding="utf-8")
        plain = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read model {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read model {path}: not UTF-8 text, from byte {error.start} on") from None
    except ValueError as error:  # no such file, or a number of too many digits
        raise ConfigError(f"{path} is not a {path.suffix[1:].upper()} file: {error}") from None
    except RecursionError:
        raise ConfigError(f"cannot read model {path}: nested too deeply") from None
    if isinstance(plain, dict) and "architectures" in plain:
        return _hugging_face(path, plain)
    try:
        return validated(ModelSpec, _model_in(plain))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if "\n" not in str(error) else f"{path}:\n{error}") from None


def _hugging_face(path: Path, config: Mapping[str, Any]) -> ModelSpec:
    try:
        return model_of(config, path.resolve().parent.name)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _model_in(plain: Any) -> dict[str, Any]:
    if not isinstance(plain, dict):
        raise ConfigError("a model is a table of its fields")
    inner = plain.get("model")
    return inner if isinstance(inner, dict) else plain
