"""A number and how sure it is."""

from typing import Self

from pydantic import model_validator

from colossus.spec.base import Frozen


class Ranged(Frozen):
    """A likely value between a low and a high one; together they hold the truth about four times in five."""

    low: float
    likely: float
    high: float

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.low <= self.likely <= self.high:
            raise ValueError(f"low {self.low}, likely {self.likely}, high {self.high} are not in order")
        return self

    @classmethod
    def exactly(cls, value: float) -> Self:
        return cls(low=value, likely=value, high=value)

    def __mul__(self, factor: "float | Ranged") -> "Ranged":
        """Ends with ends: both factors low together and high together, which errs on the wide side."""
        other = factor if isinstance(factor, Ranged) else Ranged.exactly(factor)
        return Ranged(
            low=self.low * other.low, likely=self.likely * other.likely, high=self.high * other.high
        )

    def __add__(self, other: "Ranged") -> "Ranged":
        return Ranged(
            low=self.low + other.low, likely=self.likely + other.likely, high=self.high + other.high
        )
