"""Matmuls in FP8, as a plan can choose them: `use_float8(model, recipe)`."""

from colossus.models.float8.convert import LATENT_DOWN, Float8Use, end_layers, use_float8
from colossus.models.float8.recipe import ROWWISE, TENSORWISE, Float8Recipe, Splits, recipe_of

__all__ = [
    "LATENT_DOWN",
    "ROWWISE",
    "TENSORWISE",
    "Float8Recipe",
    "Float8Use",
    "Splits",
    "end_layers",
    "recipe_of",
    "use_float8",
]
