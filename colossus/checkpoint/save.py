"""A training state into a directory that appears in one instant, or not at all."""

import mmap
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from colossus.checkpoint.directory import begin, publish
from colossus.checkpoint.manifest import MANIFEST_NAME, Manifest, PayloadEntry, Piece, TensorEntry
from colossus.checkpoint.payload import (
    CHUNK_BYTES,
    PayloadLayout,
    TensorType,
    check_tensor,
    lay_out,
    write_payload,
)
from colossus.errors import CheckpointError
from colossus.spec.model import ModelSpec
from colossus.units import format_bytes


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is on the disk. `seconds` is the wall time that writing took."""

    step: int
    path: Path
    num_bytes: int
    seconds: float


def save(
    directory: Path | str,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
    *,
    model: ModelSpec | None = None,
) -> Saved:
    """Write `directory/step-<step>` and return when it would survive a power cut.

    Names starting with `model.` are the model's parameters. `facts` is anything JSON can say, and comes back
    as JSON gives it (tuples as lists, keys as strings). `model` lets a later load tell another model's
    checkpoint where all shapes agree. A checkpoint of the same step is replaced. Two names of one storage are
    written twice.

    Raises CheckpointError if it cannot be written (disk full, read-only; nothing is left behind, checkpoints
    that were there stay) or a tensor cannot be held; TypeError or ValueError if `facts` are not JSON-able.
    """
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    types = {name: TensorType(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return save_streamed(directory, step, types, tensors.__getitem__, facts, model=model)


def save_streamed(
    directory: Path | str,
    step: int,
    types: Mapping[str, TensorType],
    tensor: Callable[[str], torch.Tensor],
    facts: Mapping[str, Any],
    *,
    model: ModelSpec | None = None,
) -> Saved:
    """`save` for a state that need not fit into memory: `tensor` makes each tensor when its turn to be written
    comes, and whatever it raises goes through, leaving nothing behind.
    """
    started = time.perf_counter()
    directory = Path(directory)
    layouts = lay_out(types)
    num_bytes = sum(layout.num_bytes for layout in layouts.values())
    try:
        temporary = begin(directory, step)
        try:
            manifest = _write(temporary, step, types, tensor, facts, model, layouts)
            path = publish(temporary, directory, step)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise CheckpointError(cannot_write(directory, step, num_bytes, error)) from error
    return Saved(step, path, num_bytes + manifest, time.perf_counter() - started)


def _write(
    target: Path,
    step: int,
    types: Mapping[str, TensorType],
    tensor: Callable[[str], torch.Tensor],
    facts: Mapping[str, Any],
    model: ModelSpec | None,
    layouts: Mapping[str, PayloadLayout],
) -> int:
    """All files of a checkpoint, the manifest last; returns the manifest's size in bytes."""
    buffer = mmap.mmap(-1, CHUNK_BYTES)
    payloads: dict[str, PayloadEntry] = {}
    entries: dict[str, TensorEntry] = {}
    for name, layout in layouts.items():
        hashes = write_payload(target / name, layout, tensor, buffer)
        header_hash = xxhash.xxh3_128_hexdigest(layout.header)
        payloads[name] = PayloadEntry(layout.num_bytes, len(layout.header), header_hash)
        for slot in layout.slots:
            offsets = (0,) * len(slot.shape)
            found = hashes[slot.name]
            piece = Piece(offsets, slot.shape, name, slot.start, slot.num_bytes, found.whole, found.chunks)
            entries[slot.name] = TensorEntry(slot.dtype, slot.shape, (piece,))
    manifest = Manifest(
        step=step,
        model_fingerprint=model.fingerprint() if model else None,
        model_spec=model.model_dump(mode="json") if model else None,
        facts=dict(facts),
        payloads=payloads,
        tensors={name: entries[name] for name in types},
    )
    return write_synced(target / MANIFEST_NAME, manifest.encode())


def write_synced(path: Path, data: bytes) -> int:
    """A new file that would survive a power cut; returns its size in bytes. Raises OSError."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return len(data)


def cannot_write(directory: Path, step: int, num_bytes: int, error: OSError) -> str:
    """What to say when a disk refuses."""
    reason = error.strerror or str(error)
    try:
        free_bytes = shutil.disk_usage(directory).free
        room = f"; it takes {format_bytes(num_bytes)} and {format_bytes(free_bytes)} are free"
    except OSError:
        room = ""
    return (
        f"the checkpoint of step {step} could not be written to {directory}: {reason}{room}. "
        f"The checkpoints before it stay; make the directory writable with room for one more than are kept"
    )
