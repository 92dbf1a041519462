"""Which files of a directory hold the weights, and which tensors are in them: looked at, not read."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from colossus.checkpoint.hugging_face.header import CONVERT, Span, read_header
from colossus.errors import CheckpointError
from colossus.units import format_bytes
from colossus.zoo.hugging_face import Architecture

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_OTHER_SUFFIXES = {".gguf", ".h5", ".msgpack", ".onnx", ".npz"}
_MOST_INDEX_BYTES = 200_000_000
_MOST_TEXT_BYTES = 64_000_000
_RANK = re.compile(r".*-TP-(\d{3})\.safetensors")
_OF_RANKS = re.compile(r".*-TP-(\d{3}|common)\.safetensors")


def spans_of(directory: Path, architecture: Architecture) -> dict[str, tuple[Span, ...]]:
    """Every stored tensor's place, by the architecture's name for it; several where tensor-parallel ranks each
    stored a part, in the order of ranks.

    Raises CheckpointError where a file is missing, damaged, outside the directory, or of a kind that is not opened.
    """
    index = directory / INDEX_NAME
    # Names with a dot in front are other programs' notes beside a file, not weights.
    there = sorted(directory.glob("[!.]*.safetensors"))
    by_rank = [path for path in there if _OF_RANKS.fullmatch(path.name)]
    if by_rank:
        return _merged(directory, by_rank, architecture)
    if not index.exists():
        single = directory / SINGLE_NAME
        files = [single] if single.exists() else there
        if not files:
            raise CheckpointError(_nothing(directory))
        return _merged(directory, files, architecture)
    promised = _read_index(index)
    names = sorted(set(promised.values()))
    for name in names:
        _check_plain(index, name)
    spans = _merged(directory, [directory / name for name in names], architecture)
    for tensor, name in promised.items():
        found = spans.get(architecture.canonical(tensor))
        if found is None or found[0].file.name != name:
            where = f"it is in {found[0].file.name}" if found else "it is in no file"
            raise CheckpointError(
                f"{index} says that {tensor} is in {name}; {where}. Get the directory again"
            )
    return spans


def inside(directory: Path, name: str) -> Path | None:
    """The file of a directory, if it is there. Raises CheckpointError for a link that leads elsewhere."""
    path = directory / name
    try:
        if not path.exists():
            return None
        real, home = path.resolve(), directory.resolve()
    except (OSError, ValueError) as error:  # such as a name that no file system takes
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{directory} names a file {name[:60]!r}, which cannot be: {reason}") from None
    homes = [home]
    if home.parent.name == "snapshots":  # of the hub's own cache, whose snapshots are links to its blobs
        homes.append(home.parents[1] / "blobs")
    if not any(real.is_relative_to(one) for one in homes):
        raise CheckpointError(
            f"{path} is a link to {real}, outside the directory, and was not opened; put the file itself there"
        )
    if not real.is_file():
        raise CheckpointError(f"{path} is not a file")
    return path


def read_text(file: Path) -> str:
    """A small text file. Raises CheckpointError where it is not one, or cannot be read."""
    try:
        if file.stat().st_size > _MOST_TEXT_BYTES:
            raise CheckpointError(f"{file} has {format_bytes(file.stat().st_size)}, too much for what it is")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise CheckpointError(f"{file} is not UTF-8 text; get it again") from None


def _merged(
    directory: Path, files: Iterable[Path], architecture: Architecture
) -> dict[str, tuple[Span, ...]]:
    spans: dict[str, tuple[Span, ...]] = {}
    for file in files:
        path = inside(directory, file.name)
        if path is None:
            raise CheckpointError(f"{file} is missing; get the directory again, with all of its files")
        for stored_name, span in read_header(path).items():
            name = architecture.canonical(stored_name)
            others = spans.get(name, ())
            if others and not all(_RANK.fullmatch(one.file.name) for one in (*others, span)):
                raise CheckpointError(
                    f"{name} is both in {others[0].file.name} and in {span.file.name} of {directory}; remove the "
                    f"file that does not belong there"
                )
            spans[name] = (*others, span)
    for name, parts in spans.items():
        _check_ranks(directory, name, parts)
    return spans


def _check_ranks(directory: Path, name: str, parts: tuple[Span, ...]) -> None:
    """One part of each rank, all of one shape and dtype."""
    matches = [match for part in parts if (match := _RANK.fullmatch(part.file.name))]
    ranks = [int(match[1]) for match in matches]
    if ranks and ranks != list(range(len(ranks))):
        raise CheckpointError(
            f"{directory}: {name} is in the files of ranks {', '.join(map(str, ranks))}; ranks from 0 on must "
            f"each have one part"
        )
    if len({(part.dtype, part.shape) for part in parts}) > 1:
        raise CheckpointError(f"{directory}: the ranks' parts of {name} differ in shape or dtype")


def _read_index(index: Path) -> dict[str, str]:
    path = inside(index.parent, index.name)
    assert path is not None
    try:
        if path.stat().st_size > _MOST_INDEX_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        promised = record["weight_map"]
        if not isinstance(promised, dict) or not all(isinstance(name, str) for name in promised.values()):
            raise ValueError("its weight_map is not a table of names")
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = "it has no weight_map" if isinstance(error, KeyError | TypeError) else str(error)
        raise CheckpointError(f"{index} is not an index of safetensors: {reason}; get it again") from None
    if not promised:
        raise CheckpointError(f"{index} names no files; get it again")
    return promised


def _check_plain(index: Path, name: str) -> None:
    """An index may name files beside it and nothing else."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{index} names {name!r}, which is not a file of its own directory, and was not opened; the index is "
            f"wrong or made to harm"
        )
    if Path(name).suffix in _PICKLE_SUFFIXES:
        raise CheckpointError(f"{index} names {name}, which is not safetensors and was not opened. {CONVERT}")


def _nothing(directory: Path) -> str:
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError as error:
        return f"{directory} cannot be read: {error.strerror}"
    pickles = [name for name in names if Path(name).suffix in _PICKLE_SUFFIXES]
    others = [name for name in names if Path(name).suffix in _OTHER_SUFFIXES]
    if not pickles:
        nothing = (
            f"{directory} has no weights: there is no {SINGLE_NAME}, {INDEX_NAME} or other .safetensors file"
        )
        return f"{nothing}. {others[0]} is of a format that Colossus does not read" if others else nothing
    more = f" and {len(pickles) - 1} more" if len(pickles) > 1 else ""
    return (
        f"the weights in {directory} are pickles ({pickles[0]}{more}), which can run code when they are opened, so "
        f"they were not. {CONVERT}"
    )
