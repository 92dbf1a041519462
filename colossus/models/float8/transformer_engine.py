"""Transformer Engine's FP8 matmuls for our weights, for machines that have it. Imported only when a recipe names it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from colossus.errors import ConfigError
from colossus.models.float8.recipe import WHOLE, Float8Recipe, Splits


def multipliers(recipe: Float8Recipe, device: torch.device) -> Callable[[nn.Module, Splits], "EngineMatmul"]:
    """How to make what one map multiplies with."""
    if device.type != "cuda":
        raise ConfigError(
            f"Transformer Engine runs on CUDA, and this is {device.type}: use the recipe's torch backend."
        )
    if recipe.emulate or recipe.scaling != "tensorwise":
        asked = "emulation" if recipe.emulate else f"{recipe.scaling} scales"
        raise ConfigError(f"Transformer Engine has no {asked}: use the recipe's torch backend.")
    try:
        import transformer_engine.pytorch as engine
        from transformer_engine.common.recipe import Float8CurrentScaling, Format
    except ImportError as error:
        raise ConfigError(
            "the recipe asks for Transformer Engine, which is not installed: "
            '`pip install --no-build-isolation "transformer_engine[pytorch]"`, or use the torch backend.'
        ) from error
    scaling = Float8CurrentScaling(fp8_format=Format.HYBRID if recipe.gradients == "e5m2" else Format.E4M3)

    def make(module: nn.Module, splits: Splits) -> EngineMatmul:
        if splits != WHOLE:
            raise ConfigError(
                "Transformer Engine takes scales of this rank's tensors alone: `splits` work with the torch backend."
            )
        outputs, inputs = module.weight.shape
        linear = engine.Linear(inputs, outputs, bias=False, params_dtype=torch.bfloat16, device="meta")
        return EngineMatmul(engine, scaling, linear)

    return make


class EngineMatmul:
    """What a `Linear` multiplies with in place of `F.linear`: their module, given our weight at each call."""

    def __init__(self, engine: Any, scaling: Any, linear: nn.Module) -> None:
        self.engine, self.scaling, self.linear = engine, scaling, linear

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        with self.engine.fp8_autocast(enabled=True, fp8_recipe=self.scaling):
            made = torch.func.functional_call(self.linear, {"weight": weight}, (x,))
        return made if bias is None else made + bias
