"""What a checkpoint says about itself: `manifest.json`, and its reading back with suspicion.

The last line holds the hash of all bytes before it, so no bit of the manifest can change unseen; and as every
payload byte is under a hash in the manifest, no bit of the checkpoint can.

One process writes it all into one file, in format 1. Where many ranks write, `manifest.json` is an index of the
manifests of their parts, in format 2: see index.py. `read_manifest` puts those together; for a whole reader.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from colossus.checkpoint.index import Index, read_part
from colossus.checkpoint.pieces import (
    OtherVersionError,
    PayloadEntry,
    Piece,
    TensorEntry,
    check_file_name,
    check_piece,
    chunks_to_json,
    dtype_from_json,
    dtype_to_json,
    payloads_to_json,
    read_bytes,
    sealed,
    to_json,
    to_lines,
    unsealed,
)
from colossus.errors import CheckpointError

__all__ = ["OtherVersionError", "PayloadEntry", "Piece", "TensorEntry"]

MANIFEST_NAME = "manifest.json"
FORMAT = "colossus-checkpoint"


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
        tensors = {name: _tensor_to_json(entry) for name, entry in self.tensors.items()}
        # Beside the tensors, not in their lines, where readers of this format before there were any pass them over.
        chunks = chunks_to_json({name: entry.pieces for name, entry in self.tensors.items()})
        return sealed(
            (
                f'{{\n"format": {to_json(FORMAT)},\n"version": 1,\n"step": {self.step},\n'
                f'"model": {to_json(model)},\n"facts": {to_json(self.facts)},\n'
                f'"payloads": {to_lines(payloads_to_json(self.payloads))},\n"tensors": {to_lines(tensors)}'
                + (f',\n"chunks": {chunks}' if chunks else "")
            ).encode()
        )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises CheckpointError where the bytes are not, in every bit, those that were written."""
        return cls.from_record(unsealed(MANIFEST_NAME, data))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Raises CheckpointError for what is no manifest in format 1."""
        try:
            if record["format"] != FORMAT:
                raise ValueError(f"the format is {record['format']!r}")
            chunks = record.get("chunks") or {"num_bytes": 1, "xxh3_128": {}}
            manifest = cls(
                step=int(record["step"]),
                model_fingerprint=record["model"]["fingerprint"],
                model_spec=record["model"]["spec"],
                facts=record["facts"],
                payloads={name: PayloadEntry(**entry) for name, entry in record["payloads"].items()},
                tensors={
                    name: _tensor_from_json(entry, chunks["num_bytes"], chunks["xxh3_128"].get(name))
                    for name, entry in record["tensors"].items()
                },
            )
            manifest._check()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{MANIFEST_NAME} is not a checkpoint's: {error!r}") from error
        return manifest

    def file_bytes(self) -> dict[str, int]:
        """Size of every file but the manifest itself."""
        return {name: entry.num_bytes for name, entry in self.payloads.items()}

    def _check(self) -> None:
        """Raises ValueError where a reader would leave a payload's bounds or the checkpoint's directory."""
        for payload in self.payloads:
            check_file_name(payload)
        for name, entry in self.tensors.items():
            if sum(math.prod(piece.shape) for piece in entry.pieces) != math.prod(entry.shape):
                raise ValueError(f"the pieces of {name} do not make up its shape {list(entry.shape)}")
            for piece in entry.pieces:
                check_piece(name, entry, piece, self.payloads)


def read_header(path: Path) -> Manifest | Index:
    """`manifest.json` of the checkpoint at `path`, as it is. Raises CheckpointError, without naming `path`."""
    record = unsealed(MANIFEST_NAME, read_bytes(path, MANIFEST_NAME))
    try:
        parted = record["format"] == FORMAT and record["version"] == 2
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST_NAME} is not a checkpoint's: {error!r}") from error
    return Index.from_record(record) if parted else Manifest.from_record(record)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`, with every piece. Raises CheckpointError, without naming `path`."""
    header = read_header(path)
    if isinstance(header, Manifest):
        return header
    payloads: dict[str, PayloadEntry] = {}
    pieces: dict[str, list[Piece]] = {name: [] for name in header.tensors}
    for rank in header.parts:
        part = read_part(path, rank, header)
        payloads |= part.payloads
        for name, piece in part.pieces.items():
            pieces[name].append(piece)
    manifest = Manifest(
        header.step,
        header.model_fingerprint,
        header.model_spec,
        header.facts,
        payloads,
        {
            name: TensorEntry(entry.dtype, entry.shape, tuple(pieces[name]))
            for name, entry in header.tensors.items()
        },
    )
    try:
        manifest._check()
    except ValueError as error:
        raise CheckpointError(f"{MANIFEST_NAME} is not a checkpoint's: {error!r}") from error
    return manifest


def size_problems(path: Path, num_bytes: Mapping[str, int]) -> dict[str, str]:
    """Files that are missing or not as long as they were: what can be seen without reading them."""
    problems = {}
    for name, expected in num_bytes.items():
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            problems[name] = f"{name} is missing ({error.strerror})"
            continue
        if found != expected:
            problems[name] = f"{name} has {found} bytes and was written with {expected}"
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
    return {"dtype": dtype_to_json(entry.dtype), "shape": list(entry.shape), "pieces": pieces}


def _tensor_from_json(
    record: dict[str, Any], chunk_bytes: int, chunks: Iterable[Iterable[str]] | None
) -> TensorEntry:
    pieces = tuple(
        Piece(
            **{**piece, "offsets": tuple(piece["offsets"]), "shape": tuple(piece["shape"])},
            chunks=tuple(hashes),
            chunk_bytes=chunk_bytes,
        )
        for piece, hashes in zip(record["pieces"], chunks or [()] * len(record["pieces"]), strict=True)
    )
    return TensorEntry(dtype_from_json(record["dtype"]), tuple(record["shape"]), pieces)
