"""A checkpoint back into tensors, every byte checked; and the newest one that is good."""

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch

from colossus.checkpoint.directory import Checkpoint, list_checkpoints
from colossus.checkpoint.expect import Expect, model_differences, stored_model
from colossus.checkpoint.index import Index
from colossus.checkpoint.manifest import (
    Manifest,
    OtherVersionError,
    PayloadEntry,
    Piece,
    TensorEntry,
    read_manifest,
    size_problems,
)
from colossus.checkpoint.payload import CHUNK_BYTES, hash_range, map_file, view_bytes
from colossus.checkpoint.shard import overlap, relative, slices
from colossus.errors import CheckpointError
from colossus.spec.model import ModelSpec

_SHOWN_DIFFERENCES = 4


class OtherModelError(CheckpointError):
    """Whole, but not of the model, or without the tensors, that were asked for."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint's content. `model` is what was given to `save`, if this version can read it.

    Tensors of one piece are the file itself, mapped copy-on-write: they take memory as they are written to,
    and stay readable when the checkpoint is deleted. Copy them where they belong and let them go. Where `load`
    finds tensors in several pieces, `tensors` puts one together each time that it is asked for, so memory holds
    those that you hold.
    """

    path: Path
    step: int
    tensors: Mapping[str, torch.Tensor]
    facts: dict[str, Any]
    model: ModelSpec | None
    mappings: tuple[mmap.mmap, ...] = field(default=(), repr=False, compare=False)

    def one_of(self, name: str, i: int) -> torch.Tensor:
        """`tensors[name][i]`, without putting together the rest of a tensor of several pieces."""
        if isinstance(self.tensors, _Assembled):
            return self.tensors.one_of(name, i)
        return self.tensors[name][i]

    def forget_pages(self) -> None:
        """Give back the memory of what was read so far; it comes from the file again when it is next touched.

        What was written to the tensors is undone. Without it, going through a checkpoint ends with all of it
        counted as this process's memory.
        """
        for mapping in self.mappings:
            mapping.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A checkpoint that was passed over, and why."""

    path: Path
    reason: str


def load(path: Path | str, *, expect: Expect = None, prefix: str = "") -> Loaded:
    """Load the checkpoint at `path`, or only tensors whose names start with `prefix`: just those are read.

    Names keep the prefix. Raises CheckpointError, naming file or tensor, if anything differs from what was
    written, if the model is not the one that `expect` describes, or if no name has the prefix.
    """
    path = Path(path)
    with named(path):
        manifest = _checked_manifest(path, expect)
        selected = _select(manifest, prefix)
        data: dict[str, torch.Tensor] = {}
        mappings: list[mmap.mmap] = []
        for payload in _checked_payloads(path, manifest, selected, whole=not prefix):
            if payload.problems:
                raise CheckpointError(payload.problems[0])
            if payload.mapping is not None:
                mappings.append(payload.mapping)
                data[payload.name] = torch.frombuffer(payload.mapping, dtype=torch.uint8)
        tensors = _tensors(selected, data)
    return Loaded(path, manifest.step, tensors, manifest.facts, stored_model(manifest), tuple(mappings))


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of reading the checkpoint at `path` as they are told: with its name, and what would work."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}. {_advice(path)}") from error
    except (OtherModelError, OtherVersionError) as error:
        raise type(error)(f"checkpoint {path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: {error}. {_advice(path)}") from error


def load_newest(
    directory: Path | str, *, expect: Expect = None, prefix: str = ""
) -> tuple[Loaded, tuple[Rejected, ...]]:
    """Load the newest good checkpoint of a directory; newer ones that were damaged come with their reasons.

    Raises CheckpointError if there is none, or none is good (each with its reason), or if a newer one than
    any good one is whole but of another model or a newer version: going back would then lose work behind
    one's back.
    """
    directory = Path(directory)
    rejected: list[Rejected] = []
    remaining = listed(directory)
    while remaining:
        checkpoint = remaining.pop()
        before = identity(checkpoint.path)
        try:
            return load(checkpoint.path, expect=expect, prefix=prefix), tuple(rejected)
        except (OtherModelError, OtherVersionError):
            raise
        except CheckpointError as error:
            if before and identity(checkpoint.path) == before:
                rejected.append(Rejected(checkpoint.path, reason_of(checkpoint.path, error)))
            else:  # not damaged: deleted or replaced meanwhile, by a trainer that has a newer one
                rejected = []
                remaining = listed(directory)
    raise none_good(directory, rejected)


def none_good(directory: Path, rejected: Sequence[Rejected]) -> CheckpointError:
    """What to say when nothing could be loaded."""
    if not rejected:
        return CheckpointError(
            f"there is no checkpoint in {directory}; give the directory that holds step-… directories"
        )
    lines = "".join(f"\n  {one.path.name}: {one.reason}" for one in rejected)
    return CheckpointError(
        f"none of the {len(rejected)} checkpoints in {directory} is good:{lines}\n"
        f"Restore one of them from a copy, or move them away to start from the beginning"
    )


def verify(path: Path | str) -> list[str]:
    """Check a checkpoint wholly, without loading it; returns all that is wrong, and nothing if it is good."""
    path = Path(path)
    try:
        manifest = read_manifest(path)
        payloads = _checked_payloads(path, manifest, manifest.tensors, whole=True)
        return [problem for payload in payloads for problem in payload.problems]
    except CheckpointError as error:
        return [str(error)]


def listed(directory: Path) -> list[Checkpoint]:
    """The checkpoints in a directory, oldest first. Raises CheckpointError if it cannot be read."""
    try:
        return list_checkpoints(directory)
    except OSError as error:
        raise CheckpointError(f"checkpoints in {directory} cannot be listed: {error.strerror}") from error


def identity(path: Path) -> tuple[int, int] | None:
    """Changes when a directory is renamed, deleted, or replaced under its name."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def _checked_manifest(path: Path, expect: Expect) -> Manifest:
    manifest = read_manifest(path)
    check_model(manifest, expect)
    return manifest


def check_model(manifest: Manifest | Index, expect: Expect) -> None:
    """Raises OtherModelError, without naming the checkpoint, if it is not of the model that is expected."""
    differences = model_differences(manifest, expect)
    if differences:
        shown = "; ".join(differences[:_SHOWN_DIFFERENCES])
        more = len(differences) - _SHOWN_DIFFERENCES
        raise OtherModelError(
            f"it is of another model, {len(differences)} difference{'s' * (len(differences) > 1)}: {shown}"
            f"{f'; and {more} more' if more > 0 else ''}. "
            f"Use the model that wrote it, or another run directory"
        )


def _select(manifest: Manifest, prefix: str) -> dict[str, TensorEntry]:
    selected = {name: entry for name, entry in manifest.tensors.items() if name.startswith(prefix)}
    if prefix and not selected:
        known = sorted({name.partition(".")[0] for name in manifest.tensors})
        raise OtherModelError(
            f"it has no tensor whose name starts with {prefix!r}; names start with {', '.join(known)}"
        )
    return selected


@dataclass(frozen=True, slots=True)
class _CheckedPayload:
    """A payload file, mapped if nothing is wrong with what was checked of it."""

    name: str
    mapping: mmap.mmap | None
    problems: list[str]


def _checked_payloads(
    path: Path, manifest: Manifest, selected: Mapping[str, TensorEntry], *, whole: bool
) -> Iterator[_CheckedPayload]:
    """The payloads of the selected tensors, these checked; if `whole`, all payloads and all their bytes."""
    pieces: dict[str, list[tuple[str, Piece]]] = {name: [] for name in manifest.payloads} if whole else {}
    for name, entry in selected.items():
        for piece in entry.pieces:
            pieces.setdefault(piece.payload, []).append((name, piece))
    # First, as it costs nothing.
    sizes = size_problems(path, {name: manifest.payloads[name].num_bytes for name in pieces})
    for name, problem in sizes.items():
        yield _CheckedPayload(name, None, [problem])
    largest = max((manifest.payloads[name].num_bytes for name in pieces), default=0)
    buffer = memoryview(bytearray(min(CHUNK_BYTES, largest)))
    for name in pieces.keys() - sizes.keys():
        try:
            # Hashed and mapped through one descriptor: the name may come to mean another file at any time.
            with (path / name).open("rb", buffering=0) as file:
                problems = list(_problems(file, name, manifest.payloads[name], pieces[name], buffer, whole))
                yield _CheckedPayload(name, None if problems else map_file(file), problems)
        except OSError as error:
            yield _CheckedPayload(name, None, [f"{name} cannot be read: {error.strerror}"])


def _problems(
    file: RawIOBase,
    name: str,
    entry: PayloadEntry,
    pieces: list[tuple[str, Piece]],
    buffer: memoryview,
    whole: bool,
) -> Iterator[str]:
    if whole and hash_range(file, 0, entry.header_bytes, buffer) != entry.header_xxh3_128:
        yield f"the header of {name} is damaged: its bytes do not match its hash"
    for tensor, piece in sorted(pieces, key=lambda item: item[1].start):
        if hash_range(file, piece.start, piece.num_bytes, buffer) != piece.xxh3_128:
            yield f"tensor {tensor} in {name} is damaged: its bytes do not match its hash"


def _tensors(
    entries: Mapping[str, TensorEntry], data: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    if all(len(entry.pieces) == 1 for entry in entries.values()):
        return {name: _view(entry, entry.pieces[0], data) for name, entry in entries.items()}
    return _Assembled(entries, data)


def _view(entry: TensorEntry, piece: Piece, data: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return view_bytes(data[piece.payload], piece.start, piece.shape, entry.dtype)


class _Assembled(Mapping[str, torch.Tensor]):
    """Tensors that are put together from their pieces when they are asked for."""

    def __init__(self, entries: Mapping[str, TensorEntry], data: Mapping[str, torch.Tensor]) -> None:
        self._entries = entries
        self._data = data

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        if len(entry.pieces) == 1:
            return _view(entry, entry.pieces[0], self._data)
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for piece in entry.pieces:
            whole[slices(piece.offsets, piece.shape)] = _view(entry, piece, self._data)
        return whole

    def one_of(self, name: str, i: int) -> torch.Tensor:
        entry = self._entries[name]
        first = (i, *[0] * (len(entry.shape) - 1))
        layer = (1, *entry.shape[1:])
        whole = torch.empty(layer, dtype=entry.dtype)
        for piece in entry.pieces:
            shared = overlap(first, layer, piece.offsets, piece.shape)
            if shared:
                offsets, shape = shared
                source = _view(entry, piece, self._data)
                whole[slices(relative(offsets, first), shape)] = source[
                    slices(relative(offsets, piece.offsets), shape)
                ]
        return whole[0]

    def __contains__(self, name: object) -> bool:  # else Mapping puts the tensor together to see
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _advice(path: Path) -> str:
    inside = list_checkpoints(path)
    if inside:
        return f"It is a directory of checkpoints; give one of them, such as {inside[-1].path}"
    if not path.exists():
        return "There is no such directory"
    return "Load an older checkpoint, or restore this one from a copy"


def reason_of(path: Path, error: CheckpointError) -> str:
    """The error without the path and the advice that a list of them would repeat."""
    return str(error.__cause__ or error).removeprefix(f"checkpoint {path} ")
