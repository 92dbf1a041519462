"""What manifests are made of: pieces of tensors, payload files, and the seal under which all of it stands."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from colossus.checkpoint.payload import DTYPES, HASHED_BYTES
from colossus.errors import CheckpointError

VERSION = 2
"""The newest format that this version reads; a manifest says the oldest one that can hold it."""
SEAL = b',\n"xxh3_128": '


class OtherVersionError(CheckpointError):
    """Whole, but written by a newer version of Colossus."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor and where its bytes lie: `num_bytes` from `start` of the file `payload`.

    `chunks` are the hashes of each `chunk_bytes` of them (the last may be shorter); there may be none, where the
    piece is short or an earlier version wrote it.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    payload: str
    start: int
    num_bytes: int
    xxh3_128: str
    chunks: tuple[str, ...] = ()
    chunk_bytes: int = HASHED_BYTES


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One whole tensor, in pieces that do not overlap and leave no gap."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class PayloadEntry:
    """One payload file. Its header repeats what the manifest says, for other readers of safetensors."""

    num_bytes: int
    header_bytes: int
    header_xxh3_128: str


def dtype_to_json(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_from_json(name: str) -> torch.dtype:
    """Raises ValueError for what is no dtype of a checkpoint."""
    dtype = getattr(torch, name, None)
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


def payloads_to_json(payloads: Mapping[str, PayloadEntry]) -> dict[str, Any]:
    return {
        name: {
            "num_bytes": entry.num_bytes,
            "header_bytes": entry.header_bytes,
            "header_xxh3_128": entry.header_xxh3_128,
        }
        for name, entry in payloads.items()
    }


def check_file_name(name: str) -> None:
    """Raises ValueError where a reader would leave the checkpoint's directory."""
    if Path(name).name != name:
        raise ValueError(f"payload {name!r} is not a plain file name")


def check_piece(name: str, entry: TensorEntry, piece: Piece, payloads: Mapping[str, PayloadEntry]) -> None:
    """Raises ValueError where a piece is not of this tensor, or not within its payload; KeyError if that is unknown."""
    if piece.num_bytes != math.prod(piece.shape) * entry.dtype.itemsize:
        raise ValueError(f"a piece of {name} has {piece.num_bytes} bytes for shape {list(piece.shape)}")
    if piece.start < 0 or piece.start + piece.num_bytes > payloads[piece.payload].num_bytes:
        raise ValueError(f"a piece of {name} lies outside {piece.payload}")
    if len(piece.offsets) != len(entry.shape) or any(
        offset < 0 or offset + length > size
        for offset, length, size in zip(piece.offsets, piece.shape, entry.shape, strict=True)
    ):
        raise ValueError(f"a piece of {name} lies outside its shape {list(entry.shape)}")
    if piece.chunk_bytes < 1 or len(piece.chunks) not in (0, -(-piece.num_bytes // piece.chunk_bytes)):
        raise ValueError(f"a piece of {name} has {piece.num_bytes} bytes and {len(piece.chunks)} hashes")


def chunks_to_json(tensors: Mapping[str, Iterable[Piece]]) -> str | None:
    """The lines of the hashes of chunks, by tensor and piece; None if no piece has any."""
    table = {
        name: [list(piece.chunks) for piece in pieces]
        for name, pieces in tensors.items()
        if any(piece.chunks for piece in pieces)
    }
    return f'{{"num_bytes": {HASHED_BYTES}, "xxh3_128": {to_lines(table)}}}' if table else None


def sealed(body: bytes) -> bytes:
    """A record without its closing brace, closed by the hash of all its bytes."""
    return body + SEAL + _seal_line(xxhash.xxh3_128_hexdigest(body))


def unsealed(name: str, data: bytes, expected: str | None = None) -> dict[str, Any]:
    """The record in the file `name`. `expected` is the hash that another manifest has of it.

    Raises CheckpointError where the bytes are not, in every bit, those that were written, OtherVersionError if a
    newer version wrote them.
    """
    body, mark, seal = data.rpartition(SEAL)
    digest = xxhash.xxh3_128_hexdigest(body)
    if not mark or seal != _seal_line(digest) or expected not in (None, digest):
        raise CheckpointError(f"{name} is damaged: its bytes do not match the hash at its end")
    try:
        record: dict[str, Any] = json.loads(body + b"}")
        version = record["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{name} is not a checkpoint's: {error!r}") from error
    if isinstance(version, int) and version > VERSION:
        raise OtherVersionError(
            f"{name} has format version {version}, and this version of Colossus "
            f"reads up to {VERSION}; load it with the version that wrote it, or a newer one"
        )
    return record


def read_bytes(path: Path, name: str) -> bytes:
    """A small file of a checkpoint. Raises CheckpointError, without naming `path`."""
    try:
        return (path / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error


def to_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def to_lines(table: Mapping[str, Any]) -> str:
    """A table as JSON, one entry a line."""
    return "{\n" + ",\n".join(f"{to_json(name)}: {to_json(value)}" for name, value in table.items()) + "\n}"


def _seal_line(digest: str) -> bytes:
    return f'"{digest}"\n}}\n'.encode()
