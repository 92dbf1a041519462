"""Files that are either whole or not there, and a lock that dies with its process."""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

READ_BYTES = 1 << 20


def sync_directory(directory: Path) -> None:
    """Makes renames inside `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Gives a finished temporary file its name; a reader sees the old file or the new one, never a part."""
    temporary.replace(path)
    sync_directory(path.parent)


def temporary_name(path: Path) -> Path:
    """Where `path` is written before it is whole. One writer at a time holds the lock, so one name is
    enough."""
    return path.with_name(path.name + ".partial")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a small file: temporary, fsync, rename. What is no file, as /dev/null, is written to and stays."""
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def hash_file(path: Path) -> str:
    """xxh3 (64 bits) of a file's bytes as 16 hex digits, read in bounded blocks."""
    import xxhash

    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def return_free_memory() -> None:
    """Hands freed memory back to the system, where the C library can (glibc keeps hundreds of MB)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def exclusive_lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds an advisory lock on `path`; calls `on_wait` once if another holds it, then waits.

    The operating system drops the lock when the process dies, however it dies: nothing stale is left behind.
    """
    import fcntl

    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
