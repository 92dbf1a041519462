"""A directory that appears whole, in one instant, or not at all."""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from colossus.checkpoint.directory import make_directory, owner, owner_is_dead, sync_directory
from colossus.errors import CheckpointError, ConfigError


def check_free(path: Path) -> None:
    """Raises ConfigError unless a new directory can have this name: nothing, or an empty directory, is there."""
    if next((one for one in path.absolute().parents if one.exists()), path).is_file():
        raise ConfigError(f"{path} cannot be a directory, as what should hold it is a file")
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(OSError):
            if not any(path.iterdir()):
                return
        raise ConfigError(
            f"{path} exists and is not empty; give a new directory, or move that one away: nothing is overwritten"
        )
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists and is not a directory; give a new one")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path`, which gets that name when the block ends without an error.

    What a killed process left of the same `path` is removed first. Raises ConfigError where `path` is taken,
    CheckpointError where it cannot be written (disk full, read-only).
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100  not resolve(): the name is wanted, not what it links to
    check_free(path)
    temporary = path.parent / f".{path.name}.writing.{owner()}.{secrets.token_hex(4)}"
    try:
        make_directory(path.parent)
        _clean(path)
        temporary.mkdir()
        try:
            yield temporary
            sync_directory(temporary)
            temporary.rename(path)  # onto nothing or an empty directory, never onto a full one
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and path.parent.is_dir():
            raise ConfigError(f"{path} was made by someone else meanwhile; give a new directory") from None
        raise CheckpointError(
            f"{path} could not be written: {error.strerror or error}; nothing is left of it. Make its parent "
            f"writable, with room for the whole model"
        ) from error


def _clean(path: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.writing\.([\w-]+)\.(\d+)\.(\d+)\.[0-9a-f]+")
    for leftover in path.parent.iterdir():
        match = pattern.fullmatch(leftover.name)
        if match and owner_is_dead(match[1], match[2], match[3]):
            shutil.rmtree(leftover, ignore_errors=True)


def write_synced(path: Path, text: str) -> None:
    """A small file, on the disk when this returns. Raises OSError."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
