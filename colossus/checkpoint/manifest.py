"""What a checkpoint says about itself: `manifest.json`, and its reading back with suspicion.

The last line holds the hash of all bytes before it, so no bit of the manifest can change unseen; and as every
payload byte is under a hash in the manifest, no bit of the checkpoint can.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import xxhash

from colossus.checkpoint.payload import DTYPES
from colossus.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
FORMAT = "colossus-checkpoint"
VERSION = 1
_SEAL = b',\n"xxh3_128": '


class OtherVersionError(CheckpointError):
    """Whole, but written by a newer version of Colossus."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor and where its bytes lie: `num_bytes` from `start` of the file `payload`."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    payload: str
    start: int
    num_bytes: int
    xxh3_128: str


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


@dataclass(frozen=True, slots=True)
class Manifest:
    """`model_spec` is the JSON of the ModelSpec and `model_fingerprint` its hash, if they were given."""

    step: int
    model_fingerprint: str | None
    model_spec: dict[str, Any] | None
    facts: dict[str, Any]
    payloads: Mapping[str, PayloadEntry]
    tensors: Mapping[str, TensorEntry]

    def encode(self) -> bytes:
        """JSON, one tensor a line. Raises TypeError or ValueError if `facts` are not JSON-able."""
        model = {"fingerprint": self.model_fingerprint, "spec": self.model_spec}
        payloads = {
            name: {
                "num_bytes": p.num_bytes,
                "header_bytes": p.header_bytes,
                "header_xxh3_128": p.header_xxh3_128,
            }
            for name, p in self.payloads.items()
        }
        tensors = {name: _tensor_to_json(entry) for name, entry in self.tensors.items()}
        body = (
            f'{{\n"format": {_json(FORMAT)},\n"version": {VERSION},\n"step": {self.step},\n'
            f'"model": {_json(model)},\n"facts": {_json(self.facts)},\n'
            f'"payloads": {_lines(payloads)},\n"tensors": {_lines(tensors)}'
        ).encode()
        return body + _SEAL + _seal(body)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises CheckpointError where the bytes are not, in every bit, those that were written."""
        body, mark, seal = data.rpartition(_SEAL)
        if not mark or seal != _seal(body):
            raise CheckpointError(f"{MANIFEST_NAME} is damaged: its bytes do not match the hash at its end")
        try:
            record = json.loads(body + b"}")
            if record["format"] != FORMAT:
                raise ValueError(f"the format is {record['format']!r}")
            if record["version"] > VERSION:
                raise OtherVersionError(
                    f"{MANIFEST_NAME} has format version {record['version']}, and this version of Colossus "
                    f"reads up to {VERSION}; load it with the version that wrote it, or a newer one"
                )
            manifest = cls(
                step=int(record["step"]),
                model_fingerprint=record["model"]["fingerprint"],
                model_spec=record["model"]["spec"],
                facts=record["facts"],
                payloads={name: PayloadEntry(**entry) for name, entry in record["payloads"].items()},
                tensors={name: _tensor_from_json(entry) for name, entry in record["tensors"].items()},
            )
            manifest._check()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{MANIFEST_NAME} is not a checkpoint's: {error!r}") from error
        return manifest

    def _check(self) -> None:
        """Raises ValueError where a reader would leave a payload's bounds or the checkpoint's directory."""
        for payload in self.payloads:
            if Path(payload).name != payload:
                raise ValueError(f"payload {payload!r} is not a plain file name")
        for name, entry in self.tensors.items():
            if sum(math.prod(piece.shape) for piece in entry.pieces) != math.prod(entry.shape):
                raise ValueError(f"the pieces of {name} do not make up its shape {list(entry.shape)}")
            for piece in entry.pieces:
                payload_bytes = self.payloads[piece.payload].num_bytes
                if piece.num_bytes != math.prod(piece.shape) * entry.dtype.itemsize:
                    raise ValueError(
                        f"a piece of {name} has {piece.num_bytes} bytes for shape {list(piece.shape)}"
                    )
                if piece.start < 0 or piece.start + piece.num_bytes > payload_bytes:
                    raise ValueError(f"a piece of {name} lies outside {piece.payload}")
                if len(piece.offsets) != len(entry.shape) or any(
                    offset < 0 or offset + length > size
                    for offset, length, size in zip(piece.offsets, piece.shape, entry.shape, strict=True)
                ):
                    raise ValueError(f"a piece of {name} lies outside its shape {list(entry.shape)}")


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`. Raises CheckpointError, without naming `path`."""
    try:
        data = (path / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{MANIFEST_NAME} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST_NAME} cannot be read: {error.strerror}") from error
    return Manifest.decode(data)


def size_problems(path: Path, manifest: Manifest, payloads: Iterable[str] | None = None) -> dict[str, str]:
    """Payloads that are missing or not as long as they were: what can be seen without reading them."""
    problems = {}
    for name in manifest.payloads if payloads is None else payloads:
        expected = manifest.payloads[name].num_bytes
        try:
            num_bytes = (path / name).stat().st_size
        except OSError as error:
            problems[name] = f"{name} is missing ({error.strerror})"
            continue
        if num_bytes != expected:
            problems[name] = f"{name} has {num_bytes} bytes and was written with {expected}"
    return problems


def _tensor_to_json(entry: TensorEntry) -> dict[str, Any]:
    pieces = [
        {
            "offsets": list(p.offsets),
            "shape": list(p.shape),
            "payload": p.payload,
            "start": p.start,
            "num_bytes": p.num_bytes,
            "xxh3_128": p.xxh3_128,
        }
        for p in entry.pieces
    ]
    return {"dtype": str(entry.dtype).removeprefix("torch."), "shape": list(entry.shape), "pieces": pieces}


def _tensor_from_json(record: dict[str, Any]) -> TensorEntry:
    dtype = getattr(torch, record["dtype"])
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {record['dtype']!r}")
    pieces = tuple(
        Piece(**{**piece, "offsets": tuple(piece["offsets"]), "shape": tuple(piece["shape"])})
        for piece in record["pieces"]
    )
    return TensorEntry(dtype, tuple(record["shape"]), pieces)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _lines(table: Mapping[str, Any]) -> str:
    return "{\n" + ",\n".join(f"{_json(name)}: {_json(value)}" for name, value in table.items()) + "\n}"


def _seal(body: bytes) -> bytes:
    return f'"{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'.encode()
