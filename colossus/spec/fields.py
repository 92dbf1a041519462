"""The types behind the keys of a configuration: what may stand where, read off the models' fields."""

import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel


def choices(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, without None and Annotated's wrapping; any other type is its own choice."""
    if get_origin(annotation) is Annotated:
        return choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(
            c for member in get_args(annotation) if member is not types.NoneType for c in choices(member)
        )
    if get_origin(annotation) is Literal:
        return tuple({type(value) for value in get_args(annotation)})
    return (annotation,)


def may_be_none(annotation: Any) -> bool:
    """Whether absence is one of its choices."""
    if get_origin(annotation) is Annotated:
        return may_be_none(get_args(annotation)[0])
    return get_origin(annotation) in (Union, types.UnionType) and types.NoneType in get_args(annotation)


def models(annotation: Any) -> list[type[BaseModel]]:
    """Those of its choices that are models."""
    return [c for c in choices(annotation) if isinstance(c, type) and issubclass(c, BaseModel)]


def kind_of(model: type[BaseModel]) -> Any:
    """The word that marks it among the kinds of a union."""
    return model.model_fields["kind"].default


def model_of(annotation: Any, value: Mapping[str, Any]) -> type[BaseModel] | None:
    """The model that a table is written for: the only one, or the one of its `kind`; the first where it has none."""
    found = models(annotation)
    if len(found) > 1:
        kind = value.get("kind", kind_of(found[0]))
        found = [model for model in found if kind_of(model) == kind]
    return found[0] if found else None


def item_type(annotation: Any) -> Any:
    """What a tuple, list or dict holds."""
    for choice in choices(annotation):
        if get_origin(choice) in (tuple, list):
            return get_args(choice)[0]
        if get_origin(choice) is dict:
            return get_args(choice)[1]
    return Any


def child(annotation: Any, holder: Any, part: str) -> Any:
    """The type of what `part` names inside `holder`, a table or a list."""
    if isinstance(holder, dict) and (model := model_of(annotation, holder)) is not None:
        return model.model_fields[part].annotation if part in model.model_fields else Any
    return item_type(annotation)


def models_at(path: Iterable[Any], root: type[BaseModel]) -> list[type[BaseModel]]:
    """The models that may stand at a place: the kinds of a union, or the one."""
    annotation: Any = root
    for part in path:
        inner = [m.model_fields[part].annotation for m in models(annotation) if part in m.model_fields]
        annotation = inner[0] if inner else item_type(annotation)
    return models(annotation)


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that a configuration can have, of all kinds of its unions."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in models(field.annotation):
            yield from all_keys(inner, f"{prefix}{name}.")


def resolve(location: Sequence[Any], model: type[BaseModel]) -> tuple[tuple[Any, ...], type[BaseModel]]:
    """Pydantic's location without the union tags that it puts in, and the innermost model on the way."""
    path: list[Any] = []
    annotation: Any = model
    owner = model
    for i, part in enumerate(location):
        here = models(annotation)
        tagged = [choice for choice in here if len(here) > 1 and kind_of(choice) == part]
        if tagged:
            annotation = owner = tagged[0]
            continue
        path.append(part)
        owner = here[0] if here else owner
        if i + 1 < len(location):
            fields = owner.model_fields if here else {}
            annotation = fields[part].annotation if part in fields else item_type(annotation)
    return tuple(path), owner
