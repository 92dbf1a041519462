"""What a machine was measured to do: the rates that the estimate uses for a chip in place of fitted constants.

`colossus doctor --calibrate` writes these into a fleet's file. All times are those of one rank, taken while as many
ranks as `num_ranks` did the same: ranks of one machine share its caches and its memory.
"""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from colossus.spec.base import Frozen, Positive, PositiveFloat
from colossus.spec.parts import Activation

MeasuredDtype = Literal["float32", "bfloat16"]
Product = Literal["forward", "input_gradient", "weight_gradient"]
"""The three products of a linear layer: input · weightᵀ, gradient · weight, gradientᵀ · input."""
Operation = (
    Literal[
        "norm", "layer_norm", "rotation", "add", "cast", "accumulate", "head_gradient",
        "embedding", "loss", "visibility", "optimizer",
    ]
    | Activation
)  # fmt: skip
"""What passes over elements, forward and backward: a norm, a rotation of queries or keys, an activation (elements of
one of its inputs), a sum of two tensors (forward only), a weight's cast to the matmuls' dtype and its gradient's cast
back, a gradient's addition to those of earlier micro-batches, a head's gradient's (in the matmuls' dtype) to
those of earlier chunks of the loss, a look-up of embeddings, the loss without its matmuls
(elements: logits), who sees whom (query-key pairs), a step of AdamW and the gradient's norm (elements: weights)."""
CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]

Curve = Annotated[tuple[PositiveFloat, ...], Field(strict=False, min_length=1)]
Sizes = Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)]


class _OverSizes(Frozen):
    """Seconds by size, sizes from small to large."""

    sizes: Sizes
    seconds: Curve

    @model_validator(mode="after")
    def _one_time_for_each_size(self) -> Self:
        if len(self.sizes) != len(self.seconds):
            raise ValueError(f"{len(self.sizes)} sizes, and {len(self.seconds)} times")
        if list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"sizes must grow, but are {', '.join(map(str, self.sizes))}")
        return self


class MeasuredMatmul(Frozen):
    """One product of a linear layer of `outputs` × `inputs` weights with `tokens` rows."""

    dtype: MeasuredDtype
    product: Product
    tokens: Positive
    outputs: Positive
    inputs: Positive
    seconds: PositiveFloat

    @property
    def flops(self) -> float:
        return 2.0 * self.tokens * self.outputs * self.inputs


class MeasuredOperation(_OverSizes):
    """Forward and backward, by number of elements."""

    name: Operation
    dtype: MeasuredDtype


class MeasuredAttention(_OverSizes):
    """Causal attention by number of heads, sequences times heads of each: forward (`seconds`) and backward."""

    dtype: MeasuredDtype
    sequence_tokens: Positive
    head_dim: Positive
    backward_seconds: Curve

    @model_validator(mode="after")
    def _both_passes(self) -> Self:
        if len(self.backward_seconds) != len(self.seconds):
            raise ValueError(f"{len(self.seconds)} times forward, and {len(self.backward_seconds)} backward")
        return self


class MeasuredCollective(_OverSizes):
    """By bytes of the whole tensor: of what is summed, of what is there once all is gathered, of what is to be
    scattered, of what one rank trades or sends."""

    kind: CollectiveKind
    backend: Literal["gloo", "nccl"]
    num_ranks: Annotated[int, Field(gt=1)]


class Measured(Frozen):
    """The curves of one chip."""

    source: str
    num_ranks: Positive
    """Ranks that were busy at the same time."""
    num_threads: Positive
    """Of each rank."""
    float32_library: str
    spread: Annotated[float, Field(ge=0)]
    """Median over all measurements of their interquartile range over their median."""
    matmuls: Annotated[tuple[MeasuredMatmul, ...], Field(strict=False, min_length=1)]
    attention: Annotated[tuple[MeasuredAttention, ...], Field(strict=False, min_length=1)]
    operations: Annotated[tuple[MeasuredOperation, ...], Field(strict=False, min_length=1)]
    collectives: Annotated[tuple[MeasuredCollective, ...], Field(strict=False)] = ()
    disk_write_bytes_per_s: PositiveFloat | None = None
    disk_read_bytes_per_s: PositiveFloat | None = None

    @model_validator(mode="after")
    def _all_that_a_step_needs(self) -> Self:
        """Every dtype with matmuls has all that a step in it takes."""
        for dtype in sorted({point.dtype for point in self.matmuls}):
            products = {point.product for point in self.matmuls if point.dtype == dtype}
            missing = [name for name in get_args(Product) if name not in products]
            there = {curve.name for curve in self.operations if curve.dtype == dtype}
            missing += [name for name in NEEDED if name not in there]
            missing += [] if any(a.dtype == dtype for a in self.attention) else ["attention"]
            if missing:
                raise ValueError(
                    f"{dtype} has matmuls, but no {', '.join(missing)}; an older version measured this: run "
                    f"colossus doctor --calibrate again"
                )
        return self


NEEDED: tuple[Operation, ...] = (
    "norm", "layer_norm", "rotation", "add", "cast", "accumulate", "head_gradient",
    "embedding", "loss", "visibility", "optimizer",
    "swiglu", "geglu", "gelu", "squared_relu", "clamped_swiglu",
)  # fmt: skip
"""Operations that must be measured for each dtype."""
