"""How a model's matmuls run in FP8: what a plan may say, and along what a matmul may be split over ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from colossus.errors import ConfigError
from colossus.spec.base import Frozen
from colossus.spec.fleet import Precision
from colossus.spec.plan import Float8

E4M3: Final = torch.float8_e4m3fn
"""3 bits of mantissa, largest value 448."""
E5M2: Final = torch.float8_e5m2
"""2 bits of mantissa, largest value 57,344: a wider range, for gradients."""

MULTIPLE: Final = 16
"""FP8 matmuls want each dim of a weight to be a multiple of this: their rows start at multiples of 16 bytes."""


class Float8Recipe(Frozen):
    """Inputs and weights are e4m3. Scales are those of the very tensors that are multiplied, found anew each time."""

    scaling: Literal["tensorwise", "rowwise"] = "tensorwise"
    """`tensorwise`: one scale for each tensor, the fastest. `rowwise`: one for each row of the left operand and each
    column of the right one, rounded down to powers of two: an outlier costs its own row its small values, not all."""
    gradients: Literal["e4m3", "e5m2"] = "e5m2"
    """What gradients of outputs are cast to. Under one scale they need e5m2's range; row by row e4m3 holds them."""
    backend: Literal["torch", "transformer_engine"] = "torch"
    emulate: bool = False
    """Cast to FP8 and back, and multiply in float32: the same numbers up to the order of sums, on any device."""


TENSORWISE: Final = Float8Recipe()
ROWWISE: Final = Float8Recipe(scaling="rowwise", gradients="e4m3")


RECIPES: Final[dict[Float8, Float8Recipe]] = {
    # Row by row, scales hardly depend on what other ranks hold: any layout computes alike, with nothing exchanged.
    "rowwise": ROWWISE,
    "tensorwise": TENSORWISE,
    "transformer_engine": Float8Recipe(backend="transformer_engine"),
}


def recipe_of(precision: Precision, float8: Float8 = "rowwise") -> Float8Recipe | None:
    """What a plan's precision and recipe ask for; None where matmuls run in the model's own dtype."""
    if precision in ("mxfp8", "nvfp4"):
        raise ConfigError(
            f"precision {precision!r} is one of Blackwell's block-scaled formats: the planner prices them, the "
            "trainer does not run them yet. What runs: fp8 (tensorwise or rowwise scales, Hopper and later), "
            "bfloat16, float32."
        )
    return RECIPES[float8] if precision == "fp8" else None


Largest = Callable[[Tensor], Tensor]
"""Of each entry, the largest that any rank of some group has. All ranks of it call it alike; it has no gradient, and
compiles without a break if it is an operator or a functional collective."""


@dataclass(frozen=True)
class Splits:
    """Which dims of a matmul are split over ranks, and how the largest of such a dim is found; None: not split.

    A scale comes from the largest magnitude of a tensor (tensorwise) or of each of its rows (rowwise). Where a dim that
    this is taken along is split, it must be taken over the ranks too, or the result is not that of a single process:

                       tensorwise                        rowwise
        y  = x · Wᵀ    x: tokens, inputs                 x, W: inputs
                       W: outputs, inputs
        dx = g · W     g: tokens, outputs;  W as above   g, W: outputs
        dW = gᵀ · x    g, x as above                     g, x: tokens

    So one says what is split, and not which tensor's scale to correct: the same weight needs it in one matmul and not
    in the other. A column-parallel map has `outputs` split over tp, a row-parallel one `inputs`. Sequence parallelism
    adds nothing to these (tokens are gathered before the one and scattered after the other), but a map that is whole
    on each rank and sees the rank's own tokens, as those down to latents do, has `tokens` split. So has, over cp, every
    map under context parallelism. Without these, scales are finer, which is no less accurate: only not the same. With
    rowwise's powers of two hardly even that: other scales change only numbers that are too small for the format.
    """

    tokens: Largest | None = None
    inputs: Largest | None = None
    outputs: Largest | None = None


WHOLE: Final = Splits()
