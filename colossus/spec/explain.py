"""What is wrong with a configuration, in sentences: the key, what was given, what would be valid."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from colossus.errors import did_you_mean
from colossus.spec.duration import Duration
from colossus.spec.fields import all_keys, kind_of, models_at, resolve

_EXPECTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "finite_number": "a finite number", "string_type": "text", "bool_type": "true or false",
    "tuple_type": "a list", "list_type": "a list", "dict_type": "a table", "model_type": "a table",
    "model_attributes_type": "a table",
}  # fmt: skip
_BOUNDS = {
    "greater_than": ("above", "gt"), "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"), "less_than_equal": ("at most", "le"),
}  # fmt: skip


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One sentence for each problem that pydantic found in a `model`."""
    problems = error.errors(include_url=False)
    inside = {problem["loc"][:-2] for problem in problems}
    # An item that is refused also counts as absent: "it needs at least 1" would be a second, false problem.
    return [_sentence(p, model) for p in problems if not (p["type"] == "too_short" and p["loc"] in inside)]


def _sentence(problem: Any, model: type[BaseModel]) -> str:
    kind, given, context = problem["type"], problem["input"], problem.get("ctx", {})
    path, owner = resolve(problem["loc"], model)
    key = dotted(path)
    match kind:
        case "missing":
            return f"{key} is missing"
        case "extra_forbidden":
            return _unknown_key(path, owner, model)
        case "value_error":
            return f"{key}: {context['error']}" if key else str(context["error"])
        case "literal_error":
            options = _options(context["expected"])
            return f"{key} is {show(given)}; valid: {context['expected']}.{_suggest(given, options)}"
        case "union_tag_invalid":
            options = _options(context["expected_tags"])
            hint = _suggest(context["tag"], options)
            return f"{key}.kind is {context['tag']!r}; valid: {context['expected_tags']}.{hint}"
        case "union_tag_not_found":
            kinds = " or ".join(repr(kind_of(m)) for m in models_at(path, model))
            return f"{key}.kind is missing; write {kinds}, which decides what other keys {key} has"
        case "too_short":
            return f"{key} has {context['actual_length']} items; it needs at least {context['min_length']}"
        case "too_long":
            return f"{key} has {context['actual_length']} items; it takes at most {context['max_length']}"
    if kind in _BOUNDS:
        word, name = _BOUNDS[kind]
        return f"{key} is {show(given)}; it must be {word} {_show_bound(context[name])}"
    if kind == "model_type" and context["class_name"] == Duration.__name__:
        return f"{key} is {show(given)}; write for example '2000 steps', '10M tokens' or '3 minutes'"
    if kind in _EXPECTED:
        return f"{key} is {show(given)}; it must be {_EXPECTED[kind]}"
    return f"{key} is {show(given)}: {problem['msg']}"


def _unknown_key(path: tuple[Any, ...], owner: type[BaseModel], root: type[BaseModel]) -> str:
    """Names the nearest key: beside it, in another kind of the same part, or elsewhere."""
    word, prefix = str(path[-1]), "".join(f"{part}." for part in path[:-1])
    sentence = f"unknown key {prefix + word!r}."
    beside = did_you_mean(word, owner.model_fields)
    if "Did you mean" not in beside:
        for other in models_at(path[:-1], root):
            if word in other.model_fields:
                return f"{sentence} It belongs to {prefix}kind = {kind_of(other)!r}."
        elsewhere = sorted({known for known in all_keys(root) if known.rpartition(".")[2] == word})
        if elsewhere:
            return f"{sentence} Did you mean {' or '.join(map(repr, elsewhere))}?"
    return sentence + did_you_mean(prefix + word, [prefix + name for name in owner.model_fields])


def _options(expected: str) -> list[str]:
    """pydantic writes `'a', 'b' or 'c'`."""
    return [part.strip().strip("'") for part in expected.replace(" or ", ", ").split(",")]


def _suggest(given: Any, options: Iterable[str]) -> str:
    hint = did_you_mean(str(given), options)
    return hint if "Did you mean" in hint else ""


def _show_bound(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e6 else str(int(value))


def show(value: Any) -> str:
    """As it was written, shortened."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "false"
    if isinstance(value, dict):
        return "a table"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def dotted(path: Iterable[Any]) -> str:
    """The key as people write it."""
    return ".".join(map(str, path))
