"""Which architecture holds a model, and which model a config.json describes."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from colossus.errors import ConfigError, did_you_mean
from colossus.spec.model import ModelSpec
from colossus.zoo.hugging_face.architecture import Architecture
from colossus.zoo.hugging_face.common import OtherParts
from colossus.zoo.hugging_face.deepseek_v3 import DEEPSEEK_V3
from colossus.zoo.hugging_face.fields import Fields, shown
from colossus.zoo.hugging_face.gpt2 import GPT2
from colossus.zoo.hugging_face.gpt_oss import GPT_OSS
from colossus.zoo.hugging_face.grok import GROK_1, GROK_2, is_grok_2
from colossus.zoo.hugging_face.llama import LLAMA
from colossus.zoo.hugging_face.mistral import MISTRAL
from colossus.zoo.hugging_face.mixtral import MIXTRAL
from colossus.zoo.hugging_face.olmo2 import OLMO2
from colossus.zoo.hugging_face.qwen2 import QWEN2
from colossus.zoo.hugging_face.qwen3 import QWEN3, QWEN3_MOE

ARCHITECTURES = (
    GPT2,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    OLMO2,
    MIXTRAL,
    GPT_OSS,
    DEEPSEEK_V3,
    GROK_1,
    GROK_2,
)
"""All that Colossus reads and writes; where several can hold a model, the first is taken."""

UNREADABLE = {
    "NemotronForCausalLM": "it stores the weights of its norms less 1, which the table of tensors does not say",
    "DbrxForCausalLM": "it clamps queries, keys and values (clip_qkv), which a ModelSpec does not say",
}
"""Architectures of models in the zoo that are neither read nor written, and why."""

MAX_CONFIG_BYTES = 16_000_000
MAX_PARAMS = 10**15
UNHELD = {
    "ngrams": "n-gram embeddings",
    "recall": "recall embeddings",
    "embedding_norm": "a norm of the embeddings",
}
"""Parts that no architecture has: field, and what it is."""


# --- from a model ---


def architecture_of(model: ModelSpec) -> Architecture:
    """The architecture whose files hold all of a model: what it writes is read back as the same model, but for its
    name and how it is initialised.

    Raises ConfigError if none does, with what the nearest one lacks and what would work."""
    unheld = [field for field in UNHELD if getattr(model, field)]
    rest = model.model_copy(update={field: _without(field) for field in unheld})
    nearest: list[tuple[int, Architecture, str]] = []
    for architecture in ARCHITECTURES:
        try:
            read_back = model_of(architecture.write(rest), model.name)
        except ConfigError as error:
            why = str(error).removeprefix(f"{architecture.name}: ")
            nearest.append((99 if isinstance(error, OtherParts) else 9, architecture, f"there, {why}"))
            continue
        lacking = [_difference(*one) for one in _differences(_comparable(rest), _comparable(read_back))]
        if not lacking and not unheld:
            return architecture
        nearest.append((len(lacking), architecture, f"it would hold it with {', '.join(lacking)}"))
    lacks, best, how = min(nearest, key=lambda one: one[0])
    if not unheld:
        raise ConfigError(f"no Hugging Face architecture holds {model.name}. Nearest is {best.name}: {how}")
    parts = " and ".join(f"{UNHELD[field]} (model.{field})" for field in unheld)
    then = f"without, {best.name} would hold it" if not lacks else f"without, nearest is {best.name}: {how}"
    raise ConfigError(f"{model.name} has {parts}, which no Hugging Face architecture has; {then}")


def _without(field: str) -> Any:
    return ModelSpec.model_fields[field].default


def _comparable(model: ModelSpec) -> dict[str, Any]:
    return model.model_dump(exclude={"name", "zero_init_outputs"})


def _differences(ours: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.get("kind") == theirs.get("kind"):
        for key in ours:
            yield from _differences(ours[key], theirs.get(key), f"{path}.{key}" if path else key)
    elif ours != theirs:
        yield path, ours, theirs


def _difference(path: str, ours: Any, theirs: Any) -> str:
    return f"{path} = {_shown(theirs)} (here {_shown(ours)})"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return str(value.get("kind", "set"))
    return repr(value)


# --- from a config.json ---


def architecture_in(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json names. Raises ConfigError if Colossus does not know it."""
    named = config.get("architectures")
    model_type = config.get("model_type")
    if named is None and isinstance(model_type, str):
        found = [one for one in ARCHITECTURES if one.model_type == model_type]
        if found:
            return found[0]
        known = sorted({one.model_type for one in ARCHITECTURES})
        raise ConfigError(
            f"model_type is {shown(model_type)}, unknown to Colossus.{did_you_mean(model_type[:60], known)}"
        )
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise ConfigError(
            f"not a model's config.json: architectures must be a list of one name, like "
            f'["LlamaForCausalLM"], and is {shown(named)}'
        )
    if named[0] in UNREADABLE:
        raise ConfigError(f"Colossus does not read {named[0]}: {UNREADABLE[named[0]]}")
    found = [one for one in ARCHITECTURES if one.name == named[0]]
    if found and found[0] in (GROK_1, GROK_2):  # vLLM takes either name for both
        return GROK_2 if is_grok_2(Fields(config)) else GROK_1
    if not found:
        known = sorted({one.name for one in ARCHITECTURES})
        # By their common endings alone any two names are half alike.
        close = difflib.get_close_matches(named[0][:60], known, n=1, cutoff=0.85)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
        raise ConfigError(f"the architecture is {shown(named[0])}, unknown to Colossus. {hint}")
    return found[0]


def model_of(config: Mapping[str, Any], name: str) -> ModelSpec:
    """The model that a config.json describes, by the name given.

    Raises ConfigError for an unknown architecture, and for what a ModelSpec cannot say or no model can be: an
    unknown rope scaling, numbers that contradict each other, absurd sizes, wrong types."""
    architecture = architecture_in(config)
    try:
        model = architecture.read(config, safe_name(name))
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{architecture.name}: {f'{field}: ' if field else ''}{message}") from None
    except ConfigError as error:
        raise ConfigError(f"{architecture.name}: {error}") from None
    if model.num_params() > MAX_PARAMS:
        raise ConfigError(
            f"{architecture.name}: {model.num_params():,} parameters are more than any model has"
        )
    return model


def quantization_in(config: Mapping[str, Any]) -> str | None:
    """The method by which the stored weights are quantized (`fp8`, `mxfp4`); None if they are not.

    The table of tensors is that of weights which are not."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if isinstance(method, str) else "unknown"


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config.json, or of the one in a directory. Raises ConfigError if it cannot be read."""
    file = path / "config.json" if path.is_dir() else path
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{file} has {file.stat().st_size:,} bytes; no model's config.json is so long")
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {file}: not UTF-8 text, from byte {error.start} on") from None
    except RecursionError:
        raise ConfigError(f"cannot read {file}: nested too deeply") from None
    except ValueError as error:  # not JSON, or a number of too many digits
        raise ConfigError(f"{file} is not a JSON file: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is not a model's config.json: it must be a table of fields")
    return config


def safe_name(name: str) -> str:
    """A name that can be a directory's: letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:100] or "model"
