"""What one rank wrote of a checkpoint that many ranks write: `part-00003.json`.

Its `tensors` and `boxes` announce what the rank holds; they are the same at every save of a run, and
`layout_xxh3_128`, at a fixed place before the file's end, is their hash. So whoever puts the parts together reads
all of them once, and from then on 110 bytes of each.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import xxhash

from colossus.checkpoint.payload import HASHED_BYTES, TensorType
from colossus.checkpoint.pieces import (
    PayloadEntry,
    Piece,
    TensorEntry,
    check_file_name,
    check_piece,
    chunks_to_json,
    dtype_from_json,
    dtype_to_json,
    payloads_to_json,
    sealed,
    to_json,
    to_lines,
    unsealed,
)
from colossus.checkpoint.shard import Box
from colossus.errors import CheckpointError

PART_FORMAT = "colossus-checkpoint-part"
_TAIL = re.compile(rb',\n"layout_xxh3_128": "([0-9a-f]{32})",\n"xxh3_128": "([0-9a-f]{32})"\n}\n')
TAIL_BYTES = 2 * 32 + len(',\n"layout_xxh3_128": "",\n"xxh3_128": ""\n}\n')


def part_name(rank: int) -> str:
    """3 → `"part-00003.json"`."""
    return f"part-{rank:05d}.json"


@dataclass(frozen=True, slots=True)
class Part:
    """`tensors` names all that the rank announced, `pieces` where its boxes lie; an empty box has none."""

    step: int
    rank: int
    boxes: Mapping[str, Box]
    payloads: Mapping[str, PayloadEntry]
    pieces: Mapping[str, Piece]

    def encode(self) -> bytes:
        """JSON; `boxes` are the offsets and then the lengths of each tensor's box, all in one row of numbers, which
        is quick to read where there are thousands of parts."""
        tensors = [
            [name, dtype_to_json(box.dtype), list(box.global_shape)] for name, box in self.boxes.items()
        ]
        numbers = [number for box in self.boxes.values() for number in (*box.offsets, *box.shape)]
        payload_bytes = {name: entry.num_bytes for name, entry in self.payloads.items()}
        layout = [to_json(tensors), to_json(numbers), to_json(payload_bytes)]
        places = {name: [p.payload, p.start, p.xxh3_128] for name, p in self.pieces.items()}
        chunks = chunks_to_json({name: [piece] for name, piece in self.pieces.items()})
        return sealed(
            (
                f'{{\n"format": {to_json(PART_FORMAT)},\n"version": 2,\n"step": {self.step},\n"rank": {self.rank},\n'
                f'"tensors": {layout[0]},\n"boxes": {layout[1]},\n"payload_bytes": {layout[2]},\n'
                f'"payloads": {to_lines(payloads_to_json(self.payloads))},\n"places": {to_lines(places)}'
                + (f',\n"chunks": {chunks}' if chunks else "")
                + f',\n"layout_xxh3_128": "{_layout_hash(*(line.encode() for line in layout))}"'
            ).encode()
        )

    @classmethod
    def decode(cls, name: str, data: bytes, expected: str) -> Self:
        """Raises CheckpointError where this is not, in every bit, the part whose hash is `expected`."""
        record = unsealed(name, data, expected)
        try:
            if record["format"] != PART_FORMAT:
                raise ValueError(f"the format is {record['format']!r}")
            boxes = _boxes(record["tensors"], record["boxes"])
            payloads = {key: PayloadEntry(**entry) for key, entry in record["payloads"].items()}
            pieces = _pieces(boxes, record["places"], record.get("chunks"))
            for payload in payloads:
                check_file_name(payload)
            for tensor, piece in pieces.items():
                entry = TensorEntry(boxes[tensor].dtype, boxes[tensor].global_shape, ())
                check_piece(tensor, entry, piece, payloads)
            return cls(int(record["step"]), int(record["rank"]), boxes, payloads, pieces)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{name} is not a checkpoint's: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Announcement:
    """What of a part the planning needs. `tensors` is JSON, and the same text for ranks that split alike."""

    rank: int
    tensors: bytes
    boxes: npt.NDArray[np.int64]
    payload_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a part: the hash of its layout, its own, and its size."""

    layout_xxh3_128: str
    xxh3_128: str
    num_bytes: int


def read_tail(path: Path) -> Tail:
    """Raises OSError, CheckpointError if this is no part."""
    with path.open("rb", buffering=0) as file:
        num_bytes = file.seek(0, 2)
        file.seek(max(0, num_bytes - TAIL_BYTES))
        match = _TAIL.fullmatch(file.read(TAIL_BYTES))
    if not match:
        raise CheckpointError(f"{path.name} does not end as a part does")
    return Tail(match[1].decode(), match[2].decode(), num_bytes)


def read_announcement(path: Path, rank: int) -> Announcement:
    """The three lines of a part that say its layout. Raises OSError, CheckpointError if they are not as written."""
    data = path.read_bytes()
    match = _TAIL.fullmatch(data[-TAIL_BYTES:])
    lines = [line.removesuffix(b",").partition(b": ")[2] for line in data.split(b"\n", 8)[5:8]]
    if not match or len(lines) != 3 or _layout_hash(*lines) != match[1].decode():
        raise CheckpointError(f"{path.name} is damaged: its layout does not match its hash")
    numbers = np.fromstring(lines[1].strip(b"[]").decode(), dtype=np.int64, sep=",")
    return Announcement(rank, lines[0], numbers, json.loads(lines[2]))


def parse_tensors(tensors: bytes) -> dict[str, TensorType]:
    """Of an announcement: name → dtype and global shape, in the order of its boxes."""
    return {
        name: TensorType(dtype_from_json(dtype), tuple(shape)) for name, dtype, shape in json.loads(tensors)
    }


def _layout_hash(*lines: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(b"\n".join(lines))


def _boxes(tensors: Sequence[Any], numbers: Sequence[int]) -> dict[str, Box]:
    boxes = {}
    position = 0
    for name, dtype, shape in tensors:
        num_dims = len(shape)
        row = tuple(numbers[position : position + 2 * num_dims])
        boxes[name] = Box(tuple(shape), row[:num_dims], row[num_dims:], dtype_from_json(dtype))
        position += 2 * num_dims
    return boxes


def _pieces(
    boxes: Mapping[str, Box], places: Mapping[str, Any], chunks: Mapping[str, Any] | None
) -> dict[str, Piece]:
    table = chunks["xxh3_128"] if chunks else {}
    chunk_bytes = chunks["num_bytes"] if chunks else HASHED_BYTES
    pieces = {}
    for name, (payload, start, digest) in places.items():
        box = boxes[name]
        (hashes,) = table.get(name, ((),))
        pieces[name] = Piece(
            box.offsets, box.shape, payload, start, box.num_bytes, digest, tuple(hashes), chunk_bytes
        )
    return pieces
