"""One rank's output goes to its log and to our own streams at once, as it comes."""

import os
import selectors
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

_CHUNK_BYTES = 1 << 16


@contextmanager
def shown(folder: Path, log_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two named pipes in `folder`, for a process's stdout and stderr, read until the end of the `with` block.

    Named, for torch's starter of processes hands down paths, not open files. At the end, what is still in
    them is read, and no more: a stray child that holds one open keeps nobody waiting.
    """
    paths = folder / "stdout", folder / "stderr"
    wake_read, wake_write = os.pipe()
    opened = [wake_read, wake_write]
    try:
        readers = []
        for path in paths:
            os.mkfifo(path)
            readers.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
            # Ours to hold: without a writer a pipe reads as ended, also before the process has opened it.
            opened += [readers[-1], os.open(path, os.O_WRONLY)]
        targets = dict(zip(readers, (sys.stdout, sys.stderr), strict=True))
        thread = threading.Thread(target=_pump, args=(targets, wake_read, log_path), name="rank output")
        thread.daemon = True
        thread.start()
        try:
            yield paths
        finally:
            os.write(wake_write, b"x")
            thread.join()
    finally:
        for file in opened:
            os.close(file)


def _pump(targets: dict[int, TextIO], wake: int, log_path: Path) -> None:
    broken: set[int] = set()
    with log_path.open("ab", buffering=0) as log, selectors.DefaultSelector() as selector:
        for reader in (*targets, wake):
            selector.register(reader, selectors.EVENT_READ)
        ending = False
        while not ending:
            ready = [key.fd for key, _ in selector.select()]
            ending = wake in ready
            for reader, stream in targets.items():
                while (reader in ready or ending) and (data := _read(reader)):
                    with suppress(OSError):  # a full disk: the rank meets it itself, and says so better
                        log.write(data)
                    if reader not in broken and not _show(stream, data):
                        broken.add(reader)


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, _CHUNK_BYTES)
    except BlockingIOError:
        return b""


def _show(stream: TextIO, data: bytes) -> bool:
    """Writes to a stream of ours, unaltered where it takes bytes. False where nobody reads it any more."""
    try:
        if hasattr(stream, "buffer"):
            stream.buffer.write(data)
        else:  # a notebook's
            stream.write(data.decode(errors="replace"))
        stream.flush()
    except (OSError, ValueError):
        return False
    return True
