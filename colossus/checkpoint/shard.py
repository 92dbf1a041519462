"""Boxes of tensors: what one rank holds of each, under any layout."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch

from colossus.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Box:
    """A dense, axis-aligned box of a tensor of `global_shape`: `shape` elements from `offsets`; may be empty."""

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        _check_bounds(self.global_shape, self.offsets, self.shape)

    @classmethod
    def whole(cls, shape: tuple[int, ...], dtype: torch.dtype) -> Self:
        """All of a tensor."""
        return cls(shape, (0,) * len(shape), shape, dtype)

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """The values of a box of a tensor of `global_shape`: those of `tensor`, from `offsets` on; may be empty."""

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: torch.Tensor

    def __post_init__(self) -> None:
        _check_bounds(self.global_shape, self.offsets, tuple(self.tensor.shape))

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> Self:
        """All of a tensor, on one rank: a scalar, a counter, what is not split."""
        return cls(tuple(tensor.shape), (0,) * tensor.dim(), tensor)

    @property
    def box(self) -> Box:
        return Box(self.global_shape, self.offsets, tuple(self.tensor.shape), self.tensor.dtype)


def as_shards(tensors: "Mapping[str, torch.Tensor | Shard]") -> dict[str, Shard]:
    """Plain tensors are whole ones."""
    return {
        name: value if isinstance(value, Shard) else Shard.whole(value) for name, value in tensors.items()
    }


def overlap(
    offsets: tuple[int, ...], shape: tuple[int, ...], other_offsets: tuple[int, ...], other: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Offsets (in the whole tensor) and shape of what two boxes share; None if that is nothing."""
    start = tuple(map(max, offsets, other_offsets))
    size = tuple(
        min(a + a_size, b + b_size) - begin
        for a, a_size, b, b_size, begin in zip(offsets, shape, other_offsets, other, start, strict=True)
    )
    return (start, size) if all(length > 0 for length in size) else None


def slices(offsets: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """A box as an index of the tensor that it is in."""
    return tuple(slice(start, start + length) for start, length in zip(offsets, shape, strict=True))


def relative(offsets: tuple[int, ...], origin: tuple[int, ...]) -> tuple[int, ...]:
    """Offsets in a tensor as offsets in a box of it that begins at `origin`."""
    return tuple(offset - start for offset, start in zip(offsets, origin, strict=True))


def _check_bounds(global_shape: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if len(offsets) != len(global_shape) or len(shape) != len(global_shape):
        raise CheckpointError(
            f"a box of {len(shape)} dims at {len(offsets)} offsets is none of a tensor of {list(global_shape)}; "
            f"give one offset and one length for each of its {len(global_shape)} dims"
        )
    if any(
        start < 0 or start + length > size
        for start, length, size in zip(offsets, shape, global_shape, strict=True)
    ):
        raise CheckpointError(
            f"a box of {list(shape)} at {list(offsets)} goes beyond a tensor of {list(global_shape)}"
        )
