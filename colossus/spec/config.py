"""A run's configuration as people write it: TOML files, `key=value` overrides, names of recipes.

    to_toml(config)                                     a RunConfig spelled out
    from_toml(text)                                     ... and read back, equal
    override(config, ["optimizer.learning_rate=0.01"])  one changed in places
    run_config("first-light", overrides)                a recipe's, or a file's, with overrides

TOML has no null. A key that is left out takes its default; where the default is something and nothing is
wanted, `false` says so (`gradient_clip = false`), in files and in overrides.

Whatever cannot be is refused with a ConfigError that has one sentence per problem: the key, what was given,
and what would be valid.
"""

import contextlib
import importlib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from colossus.errors import ConfigError, did_you_mean
from colossus.spec.explain import dotted, explain, show
from colossus.spec.fields import child, choices, item_type, may_be_none, model_of
from colossus.spec.plan import Plan
from colossus.spec.run import Batch, RunConfig

ConfigT = TypeVar("ConfigT", bound=BaseModel)

# --- TOML ---


def to_toml(config: RunConfig) -> str:
    """The configuration as TOML; `from_toml` gives back an equal one."""
    import tomli_w

    return tomli_w.dumps(_to_plain(config))


def from_toml(text: str) -> RunConfig:
    """Reads a configuration. Raises ConfigError, one line for each thing that is wrong."""
    try:
        plain = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits
        raise ConfigError(f"not a TOML file: {error}") from None
    return validated(RunConfig, plain)


def _to_plain(value: Any) -> Any:
    """What TOML can hold: tables without the keys that are None by default, `false` for the other Nones."""
    if isinstance(value, BaseModel):
        if (text := _as_text(value)) is not None:
            return text
        plain = {}
        for name, field in type(value).model_fields.items():
            item = getattr(value, name)
            if item is not None:
                plain[name] = _to_plain(item)
            elif field.is_required() or field.get_default(call_default_factory=True) is not None:
                plain[name] = False
        return plain
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    return value


def _as_text(value: BaseModel) -> str | None:
    """A Duration is one string; where that would lose a digit, it is a table like any other model."""
    text = value.model_dump(mode="json")
    if not isinstance(text, str):
        return None
    try:
        return text if type(value).model_validate(text) == value else None
    except ValidationError:
        return None


def _false_to_none(annotation: Any, value: Any) -> Any:
    """`false` becomes None wherever a value may be absent, all the way down."""
    if value is False and may_be_none(annotation) and bool not in choices(annotation):
        return None
    if isinstance(value, dict):
        model = model_of(annotation, value)
        if model is None:
            return value
        fields = model.model_fields
        return {
            key: _false_to_none(fields[key].annotation, item) if key in fields else item
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_false_to_none(item_type(annotation), item) for item in value]
    return value


# --- overrides ---


def override(config: ConfigT, settings: Sequence[str]) -> ConfigT:
    """The configuration (a whole one, or a part such as DataConfig) with some keys changed, validated anew.

    A setting is `dotted.key=value`: `"optimizer.learning_rate=0.01"`, `"budget=10M tokens"`,
    `"data.sources.0.weight=2"`, `"gradient_clip=false"`. The value is TOML, or else a bare string.
    Setting the `kind` of a part (`"optimizer.kind=adamw"`) changes to that kind with its defaults, whatever
    the order of the settings; the other settings then apply to it.
    """
    if not settings:
        return config
    parsed = [_parse_setting(setting) for setting in settings]
    parsed.sort(
        key=lambda setting: setting[0][-1] != "kind"
    )  # stable: kinds first, the rest in the order given
    plain = _to_plain(config)
    for path, text in parsed:
        _set(type(config), plain, path, text)
    return validated(type(config), plain)


def _parse_setting(setting: str) -> tuple[tuple[str, ...], str]:
    key, equals, text = setting.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(
            f"{setting!r} is not a setting; write key=value, for example optimizer.learning_rate=0.01"
        )
    return path, text.strip()


def _set(model: type[BaseModel], plain: dict[str, Any], path: tuple[str, ...], text: str) -> None:
    """Sets one key in place, in the plain form of a `model`."""
    holder: Any = plain
    annotation: Any = model
    for depth, part in enumerate(path[:-1]):
        inner = child(annotation, holder, part)
        holder = _enter(annotation, holder, path, depth)
        annotation = inner
    last = path[-1]
    if isinstance(holder, list):
        holder[_index(holder, path, len(path) - 1)] = _parse_value(child(annotation, holder, last), text)
    elif not isinstance(holder, dict):
        raise ConfigError(
            f"{dotted(path[:-1])} is {show(holder)} and has no keys inside, so there is no {dotted(path)}"
        )
    elif last == "kind" and holder.get("kind") != (kind := _parse_value(str, text)):
        holder.clear()  # the other kind's settings mean nothing to this one
        holder["kind"] = kind
    else:
        holder[last] = _parse_value(child(annotation, holder, last), text)


def _enter(annotation: Any, holder: Any, path: tuple[str, ...], depth: int) -> Any:
    """What `path[depth]` names inside `holder`."""
    part, here = path[depth], dotted(path[: depth + 1])
    if isinstance(holder, list):
        return holder[_index(holder, path, depth)]
    if not isinstance(holder, dict):
        raise ConfigError(
            f"{dotted(path[:depth])} is {show(holder)} and has no keys inside, so there is no {dotted(path)}"
        )
    owner = model_of(annotation, holder)
    if owner is not None and part not in owner.model_fields:
        prefix = "".join(f"{name}." for name in path[:depth])
        raise ConfigError(
            f"unknown key {here!r}.{did_you_mean(here, [prefix + name for name in owner.model_fields])}"
        )
    inner = child(annotation, holder, part)
    if holder.get(part) is None or (holder[part] is False and may_be_none(inner)):
        raise ConfigError(
            f"{here} is not set, so {dotted(path)} cannot be changed in it; set {here} as a whole"
        )
    return holder[part]


def _index(items: list[Any], path: tuple[str, ...], depth: int) -> int:
    if not path[depth].isdecimal() or int(path[depth]) >= len(items):
        raise ConfigError(
            f"{dotted(path[:depth])} is a list of {len(items)}: {dotted(path)} must name one by number, "
            f"from 0 to {len(items) - 1}"
        )
    return int(path[depth])


def _parse_value(annotation: Any, text: str) -> Any:
    """TOML where it is; a bare string else. A key that holds text takes it as it stands: `name=7` is "7"."""
    if text.lower() in ("none", "null") and may_be_none(annotation):
        return False
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # no TOML, or a number of thousands of digits
        return _number_or_text(annotation, text)
    if set(parsed) != {"value"} or (str in choices(annotation) and not isinstance(parsed["value"], str)):
        return text
    return parsed["value"]


def _number_or_text(annotation: Any, text: str) -> Any:
    """`.01` is a number everywhere but in TOML."""
    if float in choices(annotation):
        with contextlib.suppress(ValueError):
            return float(text)
    return text


# --- recipes and files ---


def run_config(name_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a recipe, or in a TOML file, with overrides.

    Raises ConfigError for a name that no recipe has, a missing file, and anything wrong in it.
    """
    path = Path(name_or_path)
    if path.is_dir() and (path / "config.toml").is_file():
        raise ConfigError(
            f"{name_or_path} is a run, not a recipe; continue it with --resume {name_or_path}, "
            f"or start a new one like it from {path / 'config.toml'}"
        )
    if path.suffix == ".toml":
        return override(_read(path), overrides)
    known = recipes()
    if name_or_path not in known:
        raise ConfigError(
            f"no recipe {name_or_path!r}, nor is it a .toml file.{did_you_mean(name_or_path, known)}"
        )
    return override(known[name_or_path](), overrides)


def with_plan(config: RunConfig, plan: Plan) -> RunConfig:
    """The configuration with what a plan decides: the model, and the batch; a tokenizer that is still to be trained
    gets no more entries than the model has rows. Raises ConfigError for another optimizer than the plan's."""
    check_optimizer(config, plan)
    batch = Batch(sequences=plan.global_batch_sequences, sequence_tokens=plan.sequence_tokens)
    plain = {**_to_plain(config), "model": _to_plain(plan.model), "batch": _to_plain(batch)}
    plain.pop("plan", None)
    tokenizer = config.data.tokenizer
    if tokenizer.kind == "bpe" and tokenizer.vocab_size > plan.model.vocab_size:
        plain["data"]["tokenizer"]["vocab_size"] = plan.model.vocab_size
    return validated(RunConfig, plain)


def check_optimizer(config: RunConfig, plan: Plan) -> None:
    """Raises ConfigError where the plan was made for another optimizer than the run has."""
    if config.optimizer.kind != plan.optimizer:
        raise ConfigError(
            f"the plan is for {plan.optimizer}, and the run trains with {config.optimizer.kind}, which takes other "
            f"memory, time and exchanges: plan with --fix optimizer={config.optimizer.kind}, or start a run with "
            f"--set optimizer.kind={plan.optimizer}"
        )


def recipes() -> Mapping[str, Callable[[], RunConfig]]:
    """All recipes by name."""
    registry: Mapping[str, Callable[[], RunConfig]] = importlib.import_module("recipes").RECIPES
    return registry


def _read(path: Path) -> RunConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"cannot read configuration {path}: {reason}") from None
    try:
        return from_toml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if "\n" not in str(error) else f"{path}:\n{error}") from None


def validated(model: type[ConfigT], plain: dict[str, Any]) -> ConfigT:
    """The value that a TOML or JSON table spells out. Raises ConfigError, one line for each thing that is wrong."""
    try:
        return model.model_validate(_false_to_none(model, plain))
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, model))) from None
