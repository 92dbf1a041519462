"""Many candidates at once: frozen records whose fields are arrays of one length, or scalars that all share."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
"""Float64: one entry for each candidate, or one for all (shape ())."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Base of records of arrays. Everything that takes them works elementwise and broadcasts."""

    def take(self, rows: npt.NDArray[Any]) -> Self:
        """The chosen rows; a field that all rows share stays as it is."""
        return replace(
            self,
            **{
                field.name: value[rows] if np.ndim(value := getattr(self, field.name)) else value
                for field in fields(self)
            },
        )

    @classmethod
    def stack(cls, records: "list[Self]") -> Self:
        """One record of scalars after the other; what is no number is the first one's, and shared."""
        return cls(
            **{
                field.name: np.array([float(getattr(record, field.name)) for record in records])
                if isinstance(value := getattr(records[0], field.name), (np.ndarray, np.generic, float, int))
                else value
                for field in fields(cls)
            }
        )


def soft_max(a: Array, b: Array, sharpness: float = 4.0) -> Array:
    """Two things that overlap, imperfectly: a little over the longer one, never more than their sum.

    (a^s + b^s)^(1/s): with sharpness 4 two equal parts take 1.19 times one of them.
    """
    longer, shorter = np.maximum(a, b), np.minimum(a, b)
    share = shorter / np.maximum(longer, 1e-30)
    return np.asarray(longer * (1.0 + share**sharpness) ** (1 / sharpness))
