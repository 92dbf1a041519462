"""Which matmuls of a decoder run in FP8, and why the others do not."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
from torch import nn

from colossus.errors import ConfigError, did_you_mean
from colossus.models.decoder import Decoder
from colossus.models.float8.grouped import Float8Groups
from colossus.models.float8.matmul import Float8Matmul
from colossus.models.float8.recipe import MULTIPLE, WHOLE, Float8Recipe, Splits
from colossus.models.moe import Router, StackedLinear
from colossus.models.parts import Linear

LATENT_DOWN: Final = ("*.query_down", "*.key_value_down")
"""To exclude: the maps to latents of latent attention, narrow and seen by everything after them."""


def end_layers(num_layers: int, *, first: int = 0, last: int = 0) -> tuple[str, ...]:
    """To exclude: layers at the ends, which lose the most by rounding."""
    numbers = [*range(first), *range(num_layers - last, num_layers)]
    return tuple(f"layers.{number}.*" for number in sorted({*numbers}))


@dataclass(frozen=True)
class Float8Use:
    """What of a model runs in FP8."""

    converted: list[str]
    """Names of linear maps, and of the experts' stacks of them."""
    kept: dict[str, str]
    """Those that stay in the model's dtype, each with the reason."""

    def __str__(self) -> str:
        """One line for those in FP8, and one for each reason to stay out."""
        by_reason: dict[str, list[str]] = defaultdict(list)
        for name, reason in self.kept.items():
            by_reason[reason].append(name)
        total = len(self.converted) + len(self.kept)
        lines = [f"{len(self.converted)} of {total} linear maps in FP8"]
        for reason, names in by_reason.items():
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"not {names[0]}{others}: {reason}")
        return "\n".join(lines)


def use_float8(
    model: Decoder,
    recipe: Float8Recipe,
    *,
    exclude: Sequence[str] = (),
    splits: Callable[[str], Splits] = lambda name: WHOLE,
    device: str | torch.device | None = None,
) -> Float8Use:
    """Makes the model's linear maps multiply in FP8. Parameters stay what they are: names, dtypes, whoever shards them.

    `exclude`: patterns of names that stay out ("layers.0.*", "*.mlp.down"), beside what never runs in FP8. `splits`:
    by a map's name, what of it is split over ranks; sizes are looked at as they are, so call it when weights are this
    rank's. `device`: where it will run, for a model that is still on the meta device. Calling it again starts afresh.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    maps = dict(_maps(model))
    _require_known(exclude, maps)
    multipliers = _multipliers(recipe, device)
    no_groups = _why_no_groups(recipe, device)
    converted, kept = [], {}
    for name, module in maps.items():
        module.__dict__.pop("multiply", None)
        reason = _why_not(model, name, module, exclude)
        if reason is None and isinstance(module, StackedLinear):
            reason = no_groups
        if reason is not None:
            kept[name] = reason
            continue
        converted.append(name)
        if isinstance(module, StackedLinear):
            module.multiply = Float8Groups(recipe.emulate, splits(name))
        else:
            module.multiply = multipliers(module, splits(name))
    return Float8Use(converted, kept)


def _maps(model: Decoder) -> Iterator[tuple[str, Linear | StackedLinear]]:
    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, Linear | StackedLinear)
    )


def _require_known(exclude: Sequence[str], names: Mapping[str, Any]) -> None:
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"nothing to exclude from FP8 is called {pattern!r}.{did_you_mean(pattern, names)} "
                "`*` stands for any part of a name."
            )


def _why_not(model: Decoder, name: str, module: Linear | StackedLinear, exclude: Sequence[str]) -> str | None:
    if isinstance(module, Router):
        return "routers compute in float32: small differences decide where a token goes"
    if module is model.head:
        return "the loss makes the logits, chunk by chunk, in the model's dtype"
    for pattern in exclude:
        if fnmatchcase(name, pattern):
            return f"excluded by {pattern!r}"
    outputs, inputs = module.weight.shape[-2:]
    if outputs % MULTIPLE or inputs % MULTIPLE:
        return f"its {outputs} outputs and {inputs} inputs are not both multiples of {MULTIPLE}"
    return None


def _multipliers(recipe: Float8Recipe, device: torch.device) -> Callable[[nn.Module, Splits], Any]:
    """How to make what one map multiplies with; refuses what cannot run on the device."""
    if recipe.backend == "transformer_engine":
        from colossus.models.float8 import transformer_engine  # an optional library, for CUDA alone

        return transformer_engine.multipliers(recipe, device)
    if device.type == "meta":
        raise ConfigError("a model on the meta device does not say where it will run: name the `device`.")
    if device.type == "cuda" and not recipe.emulate and _capability(device) < (8, 9):
        major, minor = _capability(device)
        raise ConfigError(
            f"{device} has compute capability {major}.{minor}, and FP8 matmuls need 8.9 (Ada, Hopper and later). "
            "Train in bfloat16, or look at the numbers alone with a recipe that emulates."
        )
    return lambda module, splits: Float8Matmul.of(recipe, splits)


def _why_no_groups(recipe: Float8Recipe, device: torch.device) -> str | None:
    if recipe.emulate:
        return None
    if device.type != "cuda":
        return f"torch has no FP8 matmul for groups of rows on {device.type}"
    if not hasattr(torch, "_scaled_grouped_mm"):
        return f"torch {torch.__version__} has no FP8 matmul for groups of rows"
    if _capability(device) != (9, 0):
        major, minor = _capability(device)
        here = f"{device} has compute capability {major}.{minor}"
        return f"the FP8 matmul for groups of rows is Hopper's (9.0), and {here}"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
