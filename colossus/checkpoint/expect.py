"""Is this a checkpoint of this model? If not, what is different, by name and shape."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from colossus.checkpoint.index import Index
from colossus.checkpoint.manifest import Manifest
from colossus.spec.model import ModelSpec, ParameterSpec

MODEL_PREFIX = "model."
"""What the names of the model's parameters start with."""

Expect = ModelSpec | Iterable[ParameterSpec] | Mapping[str, Sequence[int]] | str | None
"""A model, its table of parameters (`ModelSpec.parameters()`, or name → shape without the prefix), its
fingerprint, or None for any."""


def model_differences(manifest: Manifest | Index, expect: Expect) -> list[str]:
    """What sets the checkpoint's model apart from the expected one, a phrase each; nothing if none."""
    if expect is None:
        return []
    if isinstance(expect, str):
        if manifest.model_fingerprint == expect:
            return []
        return [f"fingerprint {expect} is expected, the checkpoint has {manifest.model_fingerprint}"]
    if isinstance(expect, ModelSpec):
        table = _table(expect.parameters())
        return _table_differences(manifest, table) or _spec_differences(manifest, expect)
    return _table_differences(manifest, _table(expect))


def stored_model(manifest: Manifest | Index) -> ModelSpec | None:
    """The ModelSpec that was saved; None if there was none, or this version cannot read it."""
    if manifest.model_spec is None:
        return None
    try:
        return ModelSpec.model_validate_json(json.dumps(manifest.model_spec))
    except ValidationError:
        return None


def _table(parameters: Iterable[ParameterSpec] | Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    if isinstance(parameters, Mapping):
        return {name: tuple(shape) for name, shape in parameters.items()}
    return {parameter.name: parameter.shape for parameter in parameters}


def _table_differences(manifest: Manifest | Index, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    stored = {
        name.removeprefix(MODEL_PREFIX): entry.shape
        for name, entry in manifest.tensors.items()
        if name.startswith(MODEL_PREFIX)
    }
    different = [
        f"{name} is {list(shape)} in the model and {list(stored[name])} in the checkpoint"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    missing = [
        f"{name} {list(shape)} is not in the checkpoint"
        for name, shape in expected.items()
        if name not in stored
    ]
    extra = [
        f"{name} {list(shape)} is not in the model" for name, shape in stored.items() if name not in expected
    ]
    return different + missing + extra


def _spec_differences(manifest: Manifest | Index, expected: ModelSpec) -> list[str]:
    """Shapes agree; what else makes it another model (heads, rotary base, activation …), field by field."""
    if manifest.model_spec is None:
        return []
    stored = stored_model(manifest)
    # Through ModelSpec, so that a field added since has its default and is not a difference.
    theirs = _flat(stored.model_dump(mode="json") if stored else manifest.model_spec)
    ours = _flat(expected.model_dump(mode="json"))
    return [
        f"{field} is {ours.get(field)!r} in the model and {theirs.get(field)!r} in the checkpoint"
        for field in sorted(ours.keys() | theirs.keys())
        if field != "name" and ours.get(field) != theirs.get(field)
    ]


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
