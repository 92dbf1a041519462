"""Tensors in files: the safetensors layout, written past the page cache and read back through a hash.

Own writer instead of `safetensors.save_file`, for three reasons. It hashes each chunk while it is in the
processor's cache. It holds 8 MiB, not the state, beyond what the caller holds. And it writes with O_DIRECT:
for 504 MB on a busy two-core machine, 1.0 GB/s and 0.11 s of CPU, where safetensors and torch.save through
the page cache gave 0.5 to 0.7 GB/s and took 0.25 to 0.34 s of the CPU that training runs on
(`benchmarks/checkpoint.py`). The files are plain safetensors.
"""

import errno
import fcntl
import json
import math
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
import xxhash

from colossus.errors import CheckpointError

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
"""What can be saved, and safetensors' name for it."""

CHUNK_BYTES = 8 << 20
HASHED_BYTES = 1 << 20
"""A piece that is longer has a hash for each so many bytes too: who reads a part of it checks what it read."""
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python names it from 3.13 on
_BLOCK_BYTES = 4096  # what O_DIRECT wants offsets and addresses to be multiples of; tensors start on one too


@dataclass(frozen=True, slots=True)
class TensorType:
    """What a file's layout must know of a tensor, before there is one."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one piece lies in a payload: `num_bytes` from byte `start` of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Hashes:
    """Of a slot's bytes: of all of them, and of each HASHED_BYTES where there are more."""

    whole: str
    chunks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PayloadLayout:
    """A payload before it is written: its header's bytes, and its slots in the order of the file."""

    header: bytes
    slots: tuple[Slot, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(slot.num_bytes for slot in self.slots)


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raises CheckpointError for a tensor that a checkpoint cannot hold."""
    check_type(name, TensorType(tensor.dtype, tuple(tensor.shape)))
    if tensor.layout is not torch.strided or tensor.is_meta or hasattr(tensor, "full_tensor"):
        raise CheckpointError(
            f"{name} is not a plain tensor with data (sparse, meta or sharded); save a dense copy"
        )


def check_type(name: str, kind: TensorType) -> None:
    """Raises CheckpointError for a name or a dtype that a checkpoint cannot hold."""
    if name == "__metadata__":
        raise CheckpointError(
            "a tensor cannot be named '__metadata__': safetensors keeps that name for itself"
        )
    if kind.dtype not in DTYPES:
        raise CheckpointError(
            f"{name} has dtype {kind.dtype}, which checkpoints do not hold; save it as another"
        )


def lay_out(types: Mapping[str, TensorType], rank: int = 0) -> dict[str, PayloadLayout]:
    """File name → layout: one payload per leading name, so that the model can be read, or copied, alone.

    Raises CheckpointError for names and dtypes that a checkpoint cannot hold.
    """
    groups: dict[str, list[str]] = {}
    for name, kind in types.items():
        check_type(name, kind)
        head, dot, _ = name.partition(".")
        group = head if dot and re.fullmatch(r"[a-z0-9_]{1,64}", head) else "other"
        groups.setdefault(group, []).append(name)
    return {
        f"{group}-{rank:05d}.safetensors": lay_out_file({name: types[name] for name in names})
        for group, names in groups.items()
    }


def lay_out_file(types: Mapping[str, TensorType]) -> PayloadLayout:
    """The layout of one safetensors file."""
    # The format allows no gaps, so wide types come first: each starts at a multiple of its item size.
    ordered = sorted(types.items(), key=lambda item: -item[1].dtype.itemsize)
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, kind in ordered:
        start, end = end, end + kind.num_bytes
        table[name] = {
            "dtype": DTYPES[kind.dtype],
            "shape": list(kind.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _BLOCK_BYTES)
    header = len(text).to_bytes(8, "little") + text
    slots, start = [], len(header)
    for name, kind in ordered:
        slots.append(Slot(name, kind.dtype, kind.shape, start, kind.num_bytes))
        start += kind.num_bytes
    return PayloadLayout(header, tuple(slots))


def write_payload(
    path: Path, layout: PayloadLayout, tensor: Callable[[str], torch.Tensor], buffer: mmap.mmap
) -> dict[str, Hashes]:
    """Write and fsync one file; returns the hashes of each slot by name. Raises OSError, leaving the file
    partial.

    `tensor` is asked for each slot's once, in the order of the file, and may make it then. Tensors come to the
    host one at a time, so the memory taken is `buffer` and, for tensors that are made, on a device or not
    contiguous, one of them.
    """
    hashes = {}
    with _Sink(path, buffer) as sink:
        sink.write(layout.header)
        for slot in layout.slots:
            hashes[slot.name] = _write_slot(sink, slot, tensor(slot.name))
    return hashes


def _write_slot(sink: "_Sink", slot: Slot, tensor: torch.Tensor) -> Hashes:
    if (tensor.dtype, tuple(tensor.shape)) != (slot.dtype, slot.shape):
        raise CheckpointError(
            f"{slot.name} was announced as {slot.dtype} {list(slot.shape)} and is {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
    digest = xxhash.xxh3_128()
    hashes: list[str] = []
    for chunk in _chunks(host_bytes(tensor), CHUNK_BYTES):
        digest.update(chunk)
        if slot.num_bytes > HASHED_BYTES:
            hashes += [xxhash.xxh3_128_hexdigest(part) for part in _chunks(chunk, HASHED_BYTES)]
        sink.write(chunk)
    return Hashes(digest.hexdigest(), tuple(hashes))


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements in row-major order as bytes; copies only what is elsewhere or not contiguous."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # Not reshape: tensors of one element or none may have any stride and still count as contiguous.
    flat = plain.as_strided((plain.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def hash_range(file: RawIOBase, start: int, num_bytes: int, buffer: memoryview) -> str:
    """The hash of a part of a file; of fewer bytes where the file ends. Raises OSError.

    Read, not mapped: a bad sector under a mapping kills the process with SIGBUS, under a read it is an error
    that lets an older checkpoint be tried. The pages stay in the page cache, where `map_file` finds them.
    """
    digest = xxhash.xxh3_128()
    file.seek(start)
    while num_bytes:
        part = buffer[: min(num_bytes, len(buffer))]
        count = file.readinto(part)
        if not count:
            break
        digest.update(part[:count])
        num_bytes -= count
    return digest.hexdigest()


def map_file(file: RawIOBase) -> mmap.mmap:
    """A file's bytes, mapped copy-on-write: they take memory as they are written to. Raises OSError.

    Without a reserve: Linux else refuses to map a file larger than the memory, in case all of it were written to.
    """
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def view_bytes(data: torch.Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of `shape` and `dtype` that shares the bytes of `data` from `start`."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    return data[start : start + num_bytes].view(dtype).view(shape)


def _chunks(data: memoryview, num_bytes: int) -> Iterator[memoryview]:
    return (data[start : start + num_bytes] for start in range(0, len(data), num_bytes))


class _Sink(AbstractContextManager["_Sink"]):
    """A new file written through one aligned buffer, past the page cache where the file system allows it.

    Leaving it without an error has put the bytes on the disk. Raises OSError.
    """

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self._buffer = np.frombuffer(buffer, dtype=np.uint8)
        self._filled = 0
        self._num_bytes = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags | _O_DIRECT, 0o644)
            self._direct = bool(_O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some systems create the file before they refuse the flag
            self._file = os.open(path, flags, 0o644)
            self._direct = False

    def write(self, data: memoryview | bytes) -> None:
        source = np.frombuffer(data, dtype=np.uint8)
        self._num_bytes += len(source)
        while len(source):
            count = min(len(source), len(self._buffer) - self._filled)
            np.copyto(
                self._buffer[self._filled : self._filled + count], source[:count]
            )  # lets other threads run
            self._filled += count
            source = source[count:]
            if self._filled == len(self._buffer):
                self._flush(self._filled)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush(
                    -(-self._filled // _BLOCK_BYTES) * _BLOCK_BYTES
                )  # whole blocks; what is too much is cut
                os.ftruncate(self._file, self._num_bytes)
                os.fsync(self._file)
        finally:
            os.close(self._file)

    def _flush(self, num_bytes: int) -> None:
        view = self._buffer.data[:num_bytes]
        while view:
            try:
                count = os.write(self._file, view)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                count = 0
            if (
                count % _BLOCK_BYTES or not count
            ):  # stricter alignment than ours, or a write cut short: go on buffered
                self._leave_direct()
            view = view[count:]
        self._filled = 0

    def _leave_direct(self) -> None:
        if self._direct:
            fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~_O_DIRECT)
            self._direct = False


_O_DIRECT: int = getattr(os, "O_DIRECT", 0)
