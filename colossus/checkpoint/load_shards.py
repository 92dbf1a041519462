"""Boxes of a checkpoint's tensors, whoever wrote them and however they were split then.

A rank reads the index, the manifests of those parts that hold something of its boxes, and of their payloads the chunks
that its elements lie in: those are read through a hash first, and then the elements are taken from the file's pages.
Nothing that is larger than the boxes is put together.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

import numpy as np
import torch

from colossus.checkpoint.expect import Expect, stored_model
from colossus.checkpoint.index import Index, read_part
from colossus.checkpoint.load import (
    Loaded,
    OtherModelError,
    Rejected,
    check_model,
    identity,
    listed,
    named,
    none_good,
    reason_of,
)
from colossus.checkpoint.manifest import Manifest, OtherVersionError, Piece, read_header, size_problems
from colossus.checkpoint.payload import CHUNK_BYTES, hash_range, map_file, view_bytes
from colossus.checkpoint.ranks import Ranks, SingleRank
from colossus.checkpoint.shard import Box, overlap, relative, slices
from colossus.errors import CheckpointError

_SHOWN_NAMES = 4


def load_shards(
    path: Path | str,
    wanted: Mapping[str, Box],
    *,
    expect: Expect = None,
    optional: Sequence[str] = (),
) -> Loaded:
    """Load the wanted boxes of the checkpoint at `path`: on the host, of each box's shape, in memory of their own.

    Tensors whose names start with one of `optional` may be absent from the checkpoint; they are then absent from the
    result. Raises CheckpointError, naming file or tensor, if anything that was read differs from what was written, if
    the model is not the one that `expect` describes, or if a wanted tensor is not there or has another dtype or shape.
    """
    path = Path(path)
    with named(path):
        header = read_header(path)
        check_model(header, expect)
        found = _present(header, wanted, optional)
        pieces, payload_bytes = locate(path, header, found)
        tensors = {name: torch.empty(box.shape, dtype=box.dtype) for name, box in found.items()}
        by_payload: dict[str, list[_Overlap]] = {}
        for name, box in found.items():
            overlaps = [shared for piece in pieces[name] if (shared := _overlap(name, box, piece))]
            if sum(math.prod(one.shape) for one in overlaps) != box.num_elements:
                raise CheckpointError(f"manifest.json is not a checkpoint's: pieces do not make up {name}")
            for one in overlaps:
                by_payload.setdefault(one.piece.payload, []).append(one)
        problems = size_problems(path, {name: payload_bytes[name] for name in by_payload})
        if problems:
            raise CheckpointError(next(iter(problems.values())))
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for payload, overlaps in by_payload.items():
            with (path / payload).open("rb", buffering=0) as file:
                _read(file, payload, overlaps, found, tensors, buffer)
    return Loaded(path, header.step, tensors, header.facts, stored_model(header))


def load_newest_shards(
    directory: Path | str,
    wanted: Mapping[str, Box],
    ranks: Ranks | None = None,
    *,
    expect: Expect = None,
    optional: Sequence[str] = (),
) -> tuple[Loaded, tuple[Rejected, ...]]:
    """Load this rank's boxes from the newest checkpoint that is good for all ranks: all get the same one, or the same
    error. Newer ones that were damaged come with their reasons. For the rest see `load_newest` and `load_shards`.
    """
    directory = Path(directory)
    ranks = ranks or SingleRank()
    rejected: list[Rejected] = []
    passed: set[tuple[str, tuple[int, int] | None]] = set()
    while True:
        candidate = ranks.broadcast(_candidate(directory, passed) if ranks.rank == 0 else None)
        if isinstance(candidate, CheckpointError):
            raise candidate
        if candidate is None:
            raise none_good(directory, rejected)
        name, before = candidate
        path = directory / name
        outcome: Loaded | Exception
        try:
            outcome = load_shards(path, wanted, expect=expect, optional=optional)
        except Exception as error:  # of any kind: the others wait to hear of it
            outcome = error
        # No rank goes on with a checkpoint that is not good for all. The first that fails says why.
        first = ranks.lowest(ranks.num_ranks if isinstance(outcome, Loaded) else ranks.rank)
        if first == ranks.num_ranks:
            return outcome, tuple(rejected)
        failure = None if isinstance(outcome, Loaded) else _failure(path, outcome)
        damaged, kind, message = ranks.broadcast(failure, source=first)
        gone = ranks.broadcast(identity(path) != before if ranks.rank == 0 else None)
        whose = f"rank {first}: " if ranks.num_ranks > 1 else ""
        if not damaged:
            if ranks.rank == first and not isinstance(outcome, CheckpointError | Loaded):
                raise outcome
            raise kind(f"{whose}{message}")
        del outcome
        if gone:  # not damaged: deleted or replaced meanwhile, by a trainer that has a newer one
            rejected = []
            passed = set()
        else:
            rejected.append(Rejected(path, f"{whose}{message}"))
            passed.add((name, before))


def _failure(path: Path, error: Exception) -> tuple[bool, type[CheckpointError], str]:
    """Whether the checkpoint is damaged, so that an older one may do; if not, what all ranks are to raise."""
    if isinstance(error, OtherModelError | OtherVersionError):
        return False, type(error), str(error)
    if isinstance(error, CheckpointError):
        return True, CheckpointError, reason_of(path, error)
    return False, CheckpointError, f"checkpoint {path} cannot be loaded: {type(error).__name__}: {error}"


def _candidate(
    directory: Path, passed: Collection[tuple[str, tuple[int, int] | None]]
) -> tuple[str, tuple[int, int] | None] | CheckpointError | None:
    """The newest checkpoint's name and identity that was not passed over; what is newer than those does not count."""
    try:
        checkpoints = listed(directory)
    except CheckpointError as error:
        return error
    for checkpoint in reversed(checkpoints):
        candidate = (checkpoint.path.name, identity(checkpoint.path))
        if candidate not in passed:
            return candidate
    return None


def _present(header: Manifest | Index, wanted: Mapping[str, Box], optional: Sequence[str]) -> dict[str, Box]:
    """What of the wanted is there. Raises OtherModelError if some of it is not, or not of that shape and dtype."""
    missing = [name for name in wanted if name not in header.tensors and not name.startswith(tuple(optional))]
    if missing:
        more = f" and {len(missing) - _SHOWN_NAMES:,} more" if len(missing) > _SHOWN_NAMES else ""
        raise OtherModelError(
            f"it has no tensor {', '.join(missing[:_SHOWN_NAMES])}{more}; "
            f"use the model and optimizer that wrote it, or another run directory"
        )
    present = {name: box for name, box in wanted.items() if name in header.tensors}
    for name, box in present.items():
        stored = header.tensors[name]
        if (stored.dtype, stored.shape) != (box.dtype, box.global_shape):
            raise OtherModelError(
                f"{name} is {stored.dtype} {list(stored.shape)} in it, and {box.dtype} {list(box.global_shape)} is "
                f"wanted; use the model and the precision that wrote it"
            )
    return present


def locate(
    path: Path, header: Manifest | Index, wanted: Mapping[str, Box]
) -> tuple[dict[str, list[Piece]], dict[str, int]]:
    """All the planning that a load takes: for each wanted tensor the pieces that its box may overlap, and the sizes of
    the payloads that those are in."""
    if isinstance(header, Manifest):
        return {name: list(header.tensors[name].pieces) for name in wanted}, header.file_bytes()
    holders = parts_to_read(header, wanted)
    pieces: dict[str, list[Piece]] = {name: [] for name in wanted}
    payload_bytes: dict[str, int] = {}
    for rank, names in holders.items():
        part = read_part(path, rank, header)
        payload_bytes |= {name: entry.num_bytes for name, entry in part.payloads.items()}
        for name in names:
            if name in part.pieces:
                pieces[name].append(part.pieces[name])
    return pieces, payload_bytes


def parts_to_read(index: Index, wanted: Mapping[str, Box]) -> dict[int, list[str]]:
    """The ranks whose parts hold something of the wanted boxes, and of which tensors."""
    holders: dict[int, list[str]] = {}
    # Tensors that are split alike, and wanted alike, are held by the same ranks.
    known: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for name, box in wanted.items():
        if box.num_elements == 0:
            continue
        placement = index.tensors[name].placement
        key = (id(placement), box.offsets, box.shape)
        if key not in known:
            known[key] = placement.overlapping(box.offsets, box.shape)
        for rank in known[key]:
            holders.setdefault(rank, []).append(name)
    return holders


@dataclass(frozen=True, slots=True)
class _Overlap:
    """What of a piece belongs to the wanted box of tensor `name`: `shape` from `offsets` of the whole tensor."""

    name: str
    piece: Piece
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def _overlap(name: str, box: Box, piece: Piece) -> _Overlap | None:
    shared = overlap(box.offsets, box.shape, piece.offsets, piece.shape)
    return _Overlap(name, piece, *shared) if shared else None


def _read(
    file: RawIOBase,
    payload: str,
    overlaps: Sequence[_Overlap],
    wanted: Mapping[str, Box],
    tensors: Mapping[str, torch.Tensor],
    buffer: memoryview,
) -> None:
    """Check the chunks that the overlaps touch and copy those to their places. Raises OSError, CheckpointError."""
    overlaps = sorted(overlaps, key=lambda one: one.piece.start)
    for one in overlaps:
        _check(file, payload, one, tensors[one.name].dtype, buffer)
    # Checked by reads and taken from a mapping of the same file, whose pages the reads left: see `hash_range`.
    mapping = map_file(file)
    data = torch.frombuffer(mapping, dtype=torch.uint8)
    for one in overlaps:
        piece, target, box = one.piece, tensors[one.name], wanted[one.name]
        source = view_bytes(data, piece.start, piece.shape, target.dtype)
        target[slices(relative(one.offsets, box.offsets), one.shape)] = source[
            slices(relative(one.offsets, piece.offsets), one.shape)
        ]


def _check(file: RawIOBase, payload: str, one: _Overlap, dtype: torch.dtype, buffer: memoryview) -> None:
    piece = one.piece
    damaged = CheckpointError(f"tensor {one.name} in {payload} is damaged: its bytes do not match its hash")
    if not piece.chunks:
        if hash_range(file, piece.start, piece.num_bytes, buffer) != piece.xxh3_128:
            raise damaged
        return
    touched = touched_chunks(
        piece.shape, relative(one.offsets, piece.offsets), one.shape, dtype.itemsize, piece.chunk_bytes
    )
    for i in touched:
        start = i * piece.chunk_bytes
        num_bytes = min(piece.chunk_bytes, piece.num_bytes - start)
        if hash_range(file, piece.start + start, num_bytes, buffer) != piece.chunks[i]:
            raise damaged


def touched_chunks(
    shape: tuple[int, ...],
    offsets: tuple[int, ...],
    lengths: tuple[int, ...],
    item_bytes: int,
    chunk_bytes: int,
) -> list[int]:
    """The chunks of a row-major piece of `shape` in which elements of a box of it lie, `lengths` from `offsets`, which
    is not empty."""
    starts = np.zeros(1, np.int64)
    run_bytes = stride = item_bytes
    for size, offset, length in zip(reversed(shape), reversed(offsets), reversed(lengths), strict=True):
        if len(starts) == 1 and stride <= chunk_bytes:
            # Gaps between these runs are shorter than a chunk, so no chunk between them is untouched: one run.
            starts = starts + offset * stride
            run_bytes += (length - 1) * stride
        else:
            steps = np.arange(offset, offset + length, dtype=np.int64) * stride
            starts = (steps[:, None] + starts).reshape(-1)
        stride *= size
    first, last = starts // chunk_bytes, (starts + run_bytes - 1) // chunk_bytes
    num_chunks = -(-item_bytes * math.prod(shape) // chunk_bytes)
    edges = np.zeros(num_chunks + 1, np.int64)
    np.add.at(edges, first, 1)
    np.add.at(edges, last + 1, -1)
    return np.flatnonzero(np.cumsum(edges[:-1])).tolist()
