"""Whole runs as functions that return a RunConfig. `colossus recipes` lists them; a function's first line is its
description."""

from collections.abc import Callable

from colossus.spec.run import RunConfig
from recipes.families import small_grok, small_llama
from recipes.first_light import first_light, spark

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "first-light": first_light,
    "spark": spark,
    "small-llama": small_llama,
    "small-grok": small_grok,
}
"""Every recipe by the name that people type."""
