"""Safetensors files read with suspicion: the header by a strict parser, data by reads of known length.

The format (github.com/huggingface/safetensors): eight bytes with the header's length, little-endian; a JSON object
`{name: {dtype, shape, data_offsets: [start, end]}}`; the data, without gaps. Own parser: it names file and tensor in
what it refuses, and data are read, not mapped, so that a file that shrinks meanwhile is an error and not a SIGBUS.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colossus.checkpoint.payload import DTYPES
from colossus.errors import CheckpointError
from colossus.units import format_bytes

MOST_HEADER_BYTES = 100_000_000
"""What the safetensors library allows, too."""

_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_PICKLES = {b"PK\x03\x04": "a PyTorch archive", b"\x80": "a pickle"}


@dataclass(frozen=True, slots=True)
class Span:
    """Where one tensor's bytes lie: `num_bytes` from byte `start` of `file`."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own. Raises CheckpointError where the file has shrunk or cannot be read."""
        data = torch.empty(self.num_bytes, dtype=torch.uint8)
        view = memoryview(data.numpy())
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start)
                while view:
                    count = file.readinto(view[: 64 << 20])
                    if not count:
                        raise CheckpointError(f"{self.file} ends in the middle of {self.name}: it has shrunk")
                    view = view[count:]
        except OSError as error:
            raise CheckpointError(f"{self.name} cannot be read from {self.file}: {error.strerror}") from error
        return data.view(self.dtype).view(self.shape)


def read_header(path: Path) -> dict[str, Span]:
    """The tensors of a safetensors file, by name. Raises CheckpointError, saying what is wrong with the file."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(9)
            num_bytes = _header_bytes(path, start, file_bytes)
            text = start[8:] + file.read(num_bytes - 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        record = json.loads(text, object_pairs_hook=_without_repeats)
        if not isinstance(record, dict):
            raise ValueError("it is not a JSON object")
        record.pop("__metadata__", None)
        spans = {name: _span(path, name, entry, 8 + num_bytes) for name, entry in record.items()}
        _check_offsets(spans, 8 + num_bytes, file_bytes)
    except (ValueError, RecursionError) as error:
        reason = "its header is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{path} is not a good safetensors file: {reason}; get it again") from None
    return spans


def _header_bytes(path: Path, start: bytes, file_bytes: int) -> int:
    for magic, what in _PICKLES.items():
        # A header's length may begin with these bytes, too; then its first character follows.
        if start.startswith(magic) and start[8:] != b"{":
            raise CheckpointError(
                f"{path} is {what} under the name of safetensors; such files can run code when they are opened, "
                f"so it was not. {CONVERT}"
            )
    num_bytes = int.from_bytes(start[:8], "little")
    if len(start) < 9 or num_bytes < 1 or num_bytes > file_bytes - 8:
        raise CheckpointError(
            f"{path} is cut off, or not safetensors: its header should have {format_bytes(num_bytes)} and the whole "
            f"file has {format_bytes(file_bytes)}; get it again"
        )
    if num_bytes > MOST_HEADER_BYTES:
        raise CheckpointError(
            f"{path} announces a header of {format_bytes(num_bytes)}; more than {format_bytes(MOST_HEADER_BYTES)} "
            f"is not safetensors"
        )
    return num_bytes


CONVERT = (
    "Convert it where you trust it: load it with transformers and save_pretrained(directory), which writes "
    "safetensors"
)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in record if names.count(name) > 1)!r} is there twice")
    return record


def _span(path: Path, name: str, entry: Any, data_start: int) -> Span:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name!r} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BY_NAME:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has shape {shape!r} and data_offsets {offsets!r}")
    start, end = offsets
    num_bytes = math.prod(shape) * _BY_NAME[dtype].itemsize
    if end - start != num_bytes:
        raise ValueError(f"{name!r} {shape} of {dtype} takes {num_bytes} bytes, and has {end - start}")
    return Span(path, name, _BY_NAME[dtype], tuple(shape), data_start + start, num_bytes)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_offsets(spans: dict[str, Span], data_start: int, file_bytes: int) -> None:
    """Tensors must lie one behind the other, from the header to the end of the file."""
    end = data_start
    for span in sorted(spans.values(), key=lambda span: (span.start, span.num_bytes)):
        if span.start != end:
            problem = "overlaps the one before it" if span.start < end else "leaves a gap before it"
            raise ValueError(f"{span.name!r} {problem} (it starts at byte {span.start}, {end} is next)")
        end += span.num_bytes
        if end > file_bytes:
            raise ValueError(f"it is cut off: {span.name!r} ends at byte {end} and the file has {file_bytes}")
    if end != file_bytes:
        raise ValueError(f"its tensors end at byte {end} and the file has {file_bytes}")
