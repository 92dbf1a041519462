"""Do the boxes of all ranks make up every tensor, each element once? And who has which?

Most tensors are cut into a grid: every dim at a few places, each cell on one rank. Then the cuts and a list of ranks
say all, tensors that are split alike share them, and what overlaps a box is found by bisection. Other tilings are
kept as lists of boxes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from colossus.checkpoint.part import Announcement, parse_tensors
from colossus.checkpoint.payload import TensorType
from colossus.errors import CheckpointError

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Where each dim is cut (first at 0), and the rank of each cell in row-major order."""

    starts: tuple[Integers, ...]
    ranks: Integers

    def overlapping(self, offsets: Sequence[int], shape: Sequence[int]) -> list[int]:
        """Ranks that hold something of a box that is not empty, each once."""
        cells = self.ranks.reshape([len(starts) for starts in self.starts])
        touched = tuple(
            slice(
                int(np.searchsorted(starts, begin, "right")) - 1, int(np.searchsorted(starts, begin + length))
            )
            for starts, begin, length in zip(self.starts, offsets, shape, strict=True)
        )
        return np.unique(cells[touched]).tolist()


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """Any other tiling: the box of `ranks[i]` is `sizes[i]` from `offsets[i]`, both [boxes, dims]."""

    ranks: Integers
    offsets: Integers
    sizes: Integers

    def overlapping(self, offsets: Sequence[int], shape: Sequence[int]) -> list[int]:
        """Ranks that hold something of a box that is not empty, each once."""
        begin, end = np.array(offsets, np.int64), np.array(offsets, np.int64) + np.array(shape, np.int64)
        touched = ((self.offsets < end) & (self.offsets + self.sizes > begin)).all(axis=1)
        return np.unique(self.ranks[touched]).tolist()


Placement = Grid | Boxes


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor and who holds which box of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    placement: Placement


def place(announcements: Iterable[Announcement]) -> dict[str, Placed]:
    """Every tensor's placement, in the order of first mention; tensors that are split alike share theirs.

    Raises CheckpointError, naming the tensor, where ranks differ on what it is, or their boxes leave gaps, overlap or
    lie outside.
    """
    alike: dict[bytes, list[Announcement]] = {}
    for announcement in announcements:
        alike.setdefault(announcement.tensors, []).append(announcement)
    kinds: dict[str, TensorType] = {}
    held: dict[str, list[tuple[Integers, Integers]]] = {}
    for text, group in alike.items():
        tensors = parse_tensors(text)
        ranks = np.array([one.rank for one in group], np.int64)
        numbers = np.stack([one.boxes for one in group])
        position = 0
        for name, kind in tensors.items():
            if kinds.setdefault(name, kind) != kind:
                raise CheckpointError(
                    f"{name} is {kind.dtype} {list(kind.shape)} on rank {group[0].rank} and "
                    f"{kinds[name].dtype} {list(kinds[name].shape)} on others; all ranks must mean one tensor"
                )
            width = 2 * len(kind.shape)
            held.setdefault(name, []).append((ranks, numbers[:, position : position + width]))
            position += width
    known: dict[tuple[object, ...], Placement] = {}
    placed = {}
    for name, kind in kinds.items():
        ranks = np.concatenate([ranks for ranks, _ in held[name]])
        numbers = np.concatenate([numbers for _, numbers in held[name]])
        key = (kind.shape, ranks.tobytes(), numbers.tobytes())
        if key not in known:
            known[key] = _placement(name, kind.shape, ranks, numbers)
        placed[name] = Placed(kind.dtype, kind.shape, known[key])
    return placed


def _placement(name: str, shape: tuple[int, ...], ranks: Integers, numbers: Integers) -> Placement:
    """Boxes inside, as many elements as the tensor has, and none that overlap: then they tile it."""
    num_dims = len(shape)
    offsets, sizes = numbers[:, :num_dims], numbers[:, num_dims:]
    outside = (
        (offsets < 0).any(axis=1) | (sizes < 0).any(axis=1) | (offsets + sizes > np.array(shape)).any(axis=1)
    )
    if outside.any():
        i = int(outside.argmax())
        raise CheckpointError(f"{_box(name, ranks, offsets, sizes, i)} lies outside its shape {list(shape)}")
    filled = (sizes > 0).all(axis=1)
    ranks, offsets, sizes = ranks[filled], offsets[filled], sizes[filled]
    grid = _grid(offsets, sizes, ranks, shape)
    if grid is not None:
        return grid
    pair = _overlapping_pair(offsets, sizes)
    if pair is not None:
        first, second = (_box(name, ranks, offsets, sizes, i) for i in pair)
        raise CheckpointError(f"{first} and {second} overlap; every element is written by one rank")
    num_elements = sum(math.prod(row) for row in sizes.tolist())
    if num_elements != math.prod(shape):
        raise CheckpointError(
            f"the boxes of {name} on all ranks have {num_elements:,} of its {math.prod(shape):,} elements "
            f"{list(shape)}; every element must be written by some rank"
        )
    return Boxes(ranks, offsets, sizes)


def _grid(offsets: Integers, sizes: Integers, ranks: Integers, shape: tuple[int, ...]) -> Grid | None:
    """The grid that the boxes fill, each cell once; None if they do not."""
    starts = []
    cells = np.zeros(len(ranks), np.int64)
    for dim, size in enumerate(shape):
        cuts, cell = np.unique(offsets[:, dim], return_inverse=True)
        ends = np.append(cuts[1:], size)
        if len(cuts) == 0 or cuts[0] != 0 or (offsets[:, dim] + sizes[:, dim] != ends[cell]).any():
            return None
        starts.append(cuts)
        cells = cells * len(cuts) + cell
    num_cells = math.prod(len(cuts) for cuts in starts)
    if len(ranks) != num_cells or len(np.unique(cells)) != num_cells:
        return None
    by_cell = np.empty(num_cells, np.int64)
    by_cell[cells] = ranks
    return Grid(tuple(starts), by_cell)


def _overlapping_pair(offsets: Integers, sizes: Integers) -> tuple[int, int] | None:
    """Two boxes that share an element. A sweep along the dim with most cuts: a box meets those not yet passed."""
    num_boxes, num_dims = offsets.shape
    if num_dims == 0:
        return (0, 1) if num_boxes > 1 else None
    ends = offsets + sizes
    sweep = max(range(num_dims), key=lambda dim: len(np.unique(offsets[:, dim])))
    order = np.argsort(offsets[:, sweep], kind="stable")
    open_ = order[:0]
    for i in order:
        open_ = open_[ends[open_, sweep] > offsets[i, sweep]]
        shared = ((offsets[open_] < ends[i]) & (ends[open_] > offsets[i])).all(axis=1)
        if shared.any():
            return int(open_[shared.argmax()]), int(i)
        open_ = np.append(open_, i)
    return None


def _box(name: str, ranks: Integers, offsets: Integers, sizes: Integers, i: int) -> str:
    return f"the box of {name} on rank {ranks[i]}, {sizes[i].tolist()} at {offsets[i].tolist()},"
