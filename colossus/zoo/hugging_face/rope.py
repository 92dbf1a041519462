"""Rotary positions in a config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`."""

import math
from typing import Any, Literal

from colossus.errors import ConfigError
from colossus.spec.positions import Llama3Scaling, RopeSpec, YarnScaling
from colossus.zoo.hugging_face.fields import Fields, shown

Yarn = Literal["rotations", "scores"]
"""Where an architecture applies YaRN's magnitude. `rotations`: queries and keys are multiplied by it, each, as
they turn. `scores`: DeepSeek's; heads also have channels that do not turn, so all scores are multiplied by
its square."""


def read_rope(fields: Fields, yarn: Yarn = "rotations", default_base: float = 10_000.0) -> RopeSpec:
    """The rotary positions of a configuration, those of whole heads.

    Raises ConfigError for a scaling that a ModelSpec does not have, and for two that contradict each other."""
    table = _table(fields)
    if table is None:
        return RopeSpec(base=_base(fields, default_base))
    outside = _base(fields, default_base)
    base = _base(table, outside)
    if base != outside and fields.has("rope_theta"):
        raise ConfigError(f"{table.where}rope_theta is {base:g}, but rope_theta outside it is {outside:g}")
    _whole_heads(table)
    _whole_heads(fields)
    kind = table.text("rope_type", table.text("type", "default"))
    if kind == "default":
        return RopeSpec(base=base)
    if kind == "llama3":
        return RopeSpec(base=base, scaling=_llama3(table))
    if kind == "yarn":
        return RopeSpec(base=base, scaling=_yarn(table, fields, yarn))
    raise ConfigError(
        f"{table.where}rope_type is {shown(kind)}; Colossus stretches rotary positions by 'llama3' and 'yarn', or not "
        f"at all ('default')"
    )


def write_rope(rope: RopeSpec, yarn: Yarn = "rotations") -> dict[str, Any]:
    """The fields that say so, in both forms, of which each release of transformers reads its own."""
    scaling = _written(rope, yarn)
    return {
        "rope_theta": rope.base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": rope.base, **(scaling or {"rope_type": "default"})},
    }


# --- reading ---


def _table(fields: Fields) -> Fields | None:
    """The one table of the two; if both are there they must agree."""
    new, old = fields.table("rope_parameters"), fields.table("rope_scaling")
    if new is None or old is None:
        return new or old
    shared = new.values.keys() & old.values.keys()
    differing = sorted(key for key in shared if new.values[key] != old.values[key])
    if differing:
        key = differing[0]
        raise ConfigError(
            f"rope_parameters.{key} is {shown(new.values[key])}, but rope_scaling.{key} is {shown(old.values[key])}; "
            f"they must agree, or one of the two tables must go"
        )
    return Fields({**old.values, **new.values}, new.where)


def _base(fields: Fields, default: float) -> float:
    base = fields.number("rope_theta", default)
    if base <= 1:
        raise fields.wrong("rope_theta", "a number above 1")
    return base


def _whole_heads(fields: Fields) -> None:
    if fields.number("partial_rotary_factor", 1.0) != 1:
        raise ConfigError(
            f"{fields.where}partial_rotary_factor is {shown(fields.values['partial_rotary_factor'])}; "
            f"this architecture rotates whole heads, which is 1"
        )


def _factor(table: Fields, default: float | None = None) -> float:
    factor = table.number("factor", default)
    if factor < 1:
        raise table.wrong("factor", "a number of at least 1")
    return factor


def _llama3(table: Fields) -> Llama3Scaling:
    low, high = table.positive("low_freq_factor"), table.positive("high_freq_factor")
    if high <= low:
        raise ConfigError(
            f"{table.where}high_freq_factor is {high:g}, but low_freq_factor is {low:g}; it must be above that"
        )
    return Llama3Scaling(
        factor=_factor(table),
        original_context_tokens=table.integer("original_max_position_embeddings"),
        low_frequency_factor=low,
        high_frequency_factor=high,
    )


def _yarn(table: Fields, fields: Fields, yarn: Yarn) -> YarnScaling:
    context = fields.integer("max_position_embeddings")
    original = table.integer("original_max_position_embeddings", context)
    factor = _factor(table, context / original)
    return YarnScaling(
        factor=factor,
        original_context_tokens=original,
        beta_fast=table.positive("beta_fast", 32.0),
        beta_slow=table.positive("beta_slow", 1.0),
        magnitude=_magnitude_of_scores(table) if yarn == "scores" else _magnitude_of_rotations(table, factor),
        whole_channels=table.truth("truncate", True),
    )


def _magnitude_of_rotations(table: Fields, factor: float) -> float:
    """Rotations grow by `attention_factor`; where it is not given, by a ratio of two magnitudes, or by 1's."""
    whole = 0.1 * math.log(factor)
    scale, all_dims = table.number("mscale", 0.0), table.number("mscale_all_dim", 0.0)
    attention_factor = table.number("attention_factor", 0.0)
    if not table.has("attention_factor"):
        if not (scale and all_dims):
            return 1.0
        attention_factor = (whole * scale + 1) / (whole * all_dims + 1)
    if attention_factor < 1 or (attention_factor != 1 and whole == 0):
        raise ConfigError(
            f"{table.where[:-1]} multiplies rotations by {attention_factor:g}; with factor {factor:g}, YaRN's "
            f"magnitude makes it 0.1 · magnitude · ln(factor) + 1"
        )
    return float(f"{(attention_factor - 1) / whole:.12g}") if whole else 1.0


def _magnitude_of_scores(table: Fields) -> float:
    """`mscale_all_dim` multiplies all scores; rotations must not grow beside it, as they would unless `mscale` is
    the same."""
    scale, all_dims = table.number("mscale", 0.0), table.number("mscale_all_dim", 0.0)
    rotations_stay = (
        table.number("attention_factor", 0.0) == 1 if table.has("attention_factor") else bool(scale)
    )
    if scale != all_dims or not rotations_stay or all_dims < 0:
        raise ConfigError(
            f"{table.where}mscale is {scale:g} and mscale_all_dim {all_dims:g}; Colossus needs two equal ones above "
            f"0, or 0 both with attention_factor 1, so that all channels' scores grow alike"
        )
    return all_dims


# --- writing ---


def _written(rope: RopeSpec, yarn: Yarn) -> dict[str, Any] | None:
    scaling = rope.scaling
    if scaling is None:
        return None
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_context_tokens,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
        }
    written: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context_tokens,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.whole_channels,
    }
    if yarn == "scores":
        written["mscale"] = written["mscale_all_dim"] = scaling.magnitude
        if scaling.magnitude == 0:
            written["attention_factor"] = 1.0
    elif scaling.magnitude != 1:
        written["attention_factor"] = 0.1 * scaling.magnitude * math.log(scaling.factor) + 1
    return written
