"""The manifest of a checkpoint that many ranks wrote: names their parts, and says who holds which box.

What grows with ranks is one entry per part and one list per way of splitting; what grows with tensors is one line
per tensor. A rank that loads reads this and the few parts that hold something of its boxes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from colossus.checkpoint.part import Part, part_name
from colossus.checkpoint.pieces import (
    check_file_name,
    dtype_from_json,
    dtype_to_json,
    read_bytes,
    sealed,
    to_json,
    to_lines,
)
from colossus.checkpoint.tiling import Boxes, Grid, Placed, Placement
from colossus.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class PartEntry:
    """A part's manifest, by size and hash, and the sizes of the payloads that it describes."""

    num_bytes: int
    xxh3_128: str
    payload_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Index:
    """`parts` by rank. `model_spec` and `model_fingerprint` as in a Manifest."""

    step: int
    model_fingerprint: str | None
    model_spec: dict[str, Any] | None
    facts: dict[str, Any]
    parts: Mapping[int, PartEntry]
    tensors: Mapping[str, Placed]

    def encode(self, tables: str | None = None) -> bytes:
        """JSON. `tables` is `encode_tables(self.tensors)`, if that is known already. Raises TypeError or ValueError if
        `facts` are not JSON-able."""
        model = {"fingerprint": self.model_fingerprint, "spec": self.model_spec}
        parts = {
            part_name(rank): [part.num_bytes, part.xxh3_128, part.payload_bytes]
            for rank, part in self.parts.items()
        }
        return sealed(
            (
                f'{{\n"format": "colossus-checkpoint",\n"version": 2,\n"step": {self.step},\n'
                f'"model": {to_json(model)},\n"facts": {to_json(self.facts)},\n"parts": {to_lines(parts)},\n'
                f"{encode_tables(self.tensors) if tables is None else tables}"
            ).encode()
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Raises CheckpointError for what is no index."""
        try:
            placements = [_placement_from_json(one) for one in record["placements"]]
            parts = {}
            for name, (num_bytes, digest, payload_bytes) in record["parts"].items():
                for payload in payload_bytes:
                    check_file_name(payload)
                parts[int(name.removeprefix("part-").removesuffix(".json"))] = PartEntry(
                    num_bytes, digest, payload_bytes
                )
            return cls(
                step=int(record["step"]),
                model_fingerprint=record["model"]["fingerprint"],
                model_spec=record["model"]["spec"],
                facts=record["facts"],
                parts=parts,
                tensors={
                    name: Placed(dtype_from_json(dtype), tuple(shape), placements[i])
                    for name, (dtype, shape, i) in record["tensors"].items()
                },
            )
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise CheckpointError(f"manifest.json is not a checkpoint's: {error!r}") from error

    def file_bytes(self) -> dict[str, int]:
        """Size of every file but the index itself."""
        sizes: dict[str, int] = {}
        for rank, part in self.parts.items():
            sizes |= {part_name(rank): part.num_bytes, **part.payload_bytes}
        return sizes


def read_part(path: Path, rank: int, index: Index) -> Part:
    """A part of the checkpoint at `path`. Raises CheckpointError if it is missing or not what was written."""
    name = part_name(rank)
    if rank not in index.parts:
        raise CheckpointError(
            f"manifest.json is not a checkpoint's: it speaks of {name}, which is no part of it"
        )
    part = Part.decode(name, read_bytes(path, name), index.parts[rank].xxh3_128)
    if (part.step, part.rank) != (index.step, rank) or not part.boxes.keys() <= index.tensors.keys():
        raise CheckpointError(f"{name} is the part of another checkpoint")
    return part


def encode_tables(tensors: Mapping[str, Placed]) -> str:
    """The lines for `placements` and `tensors`; they stay the same from save to save of a run."""
    numbers: dict[int, int] = {}
    lines = []
    for placed in tensors.values():
        if numbers.setdefault(id(placed.placement), len(numbers)) == len(lines):
            lines.append(to_json(_placement_to_json(placed.placement)))
    table = {
        name: [dtype_to_json(one.dtype), list(one.shape), numbers[id(one.placement)]]
        for name, one in tensors.items()
    }
    return '"placements": [\n' + ",\n".join(lines) + f'\n],\n"tensors": {to_lines(table)}'


def _placement_to_json(placement: Placement) -> dict[str, Any]:
    if isinstance(placement, Grid):
        return {"starts": [starts.tolist() for starts in placement.starts], "ranks": placement.ranks.tolist()}
    return {
        "ranks": placement.ranks.tolist(),
        "offsets": placement.offsets.tolist(),
        "sizes": placement.sizes.tolist(),
    }


def _placement_from_json(record: Mapping[str, Any]) -> Placement:
    ranks = np.array(record["ranks"], np.int64)
    if "starts" in record:
        grid = Grid(tuple(np.array(starts, np.int64) for starts in record["starts"]), ranks)
        if len(ranks) != np.prod([len(starts) for starts in grid.starts], dtype=np.int64):
            raise ValueError("a grid has not as many ranks as cells")
        return grid
    num_boxes = len(ranks)
    offsets = (
        np.array(record["offsets"], np.int64).reshape(num_boxes, -1)
        if num_boxes
        else np.empty((0, 0), np.int64)
    )
    sizes = np.array(record["sizes"], np.int64).reshape(offsets.shape)
    return Boxes(ranks, offsets, sizes)
