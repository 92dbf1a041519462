"""Rotary positions, as numbers, and how they are stretched beyond the context they were trained on."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from colossus.spec.base import Frozen, Positive, PositiveFloat


class Llama3Scaling(Frozen):
    """Llama 3.1's stretched rotations (`rope_type = "llama3"`): wavelengths above `original_context_tokens` /
    `low_frequency_factor` grow by `factor`, those below `original_context_tokens` / `high_frequency_factor` stay,
    and between the two it is interpolated."""

    kind: Literal["llama3"] = "llama3"
    factor: Annotated[float, Field(ge=1)]
    original_context_tokens: Positive
    low_frequency_factor: PositiveFloat = 1.0
    high_frequency_factor: PositiveFloat = 4.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"high_frequency_factor {self.high_frequency_factor:g} is not above low_frequency_factor "
                f"{self.low_frequency_factor:g}; what lies between the two is interpolated"
            )
        return self


class YarnScaling(Frozen):
    """YaRN (arXiv:2309.00071): channels that turn fewer than `beta_slow` times within `original_context_tokens`
    are slowed by `factor`, those that turn more than `beta_fast` times stay; scores q·k are multiplied by
    (0.1 · `magnitude` · ln(factor) + 1)²."""

    kind: Literal["yarn"] = "yarn"
    factor: Annotated[float, Field(ge=1)]
    original_context_tokens: Positive
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    magnitude: Annotated[float, Field(ge=0)] = 1.0
    whole_channels: bool = True
    """The channels from which and up to which it is interpolated are rounded outward to whole ones."""


class RopeSpec(Frozen):
    """Rotary positions (arXiv:2104.09864), rotating the two halves of each head."""

    base: Annotated[float, Field(gt=1)] = 10_000.0
    rotated_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of a head's channels that turn; the others carry no position."""
    scaling: Annotated[Llama3Scaling | YarnScaling, Field(discriminator="kind")] | None = None
    """How rotations are stretched to reach further than the training context."""
