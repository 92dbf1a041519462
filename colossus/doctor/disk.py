"""How fast a directory's disk writes and reads."""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

FILE_BYTES = 64 << 20
_PIECE_BYTES = 4 << 20
SPELLS = 3


@dataclass(frozen=True)
class DiskRates:
    write_bytes_per_s: float
    """Until the file is on the disk (fsync)."""
    read_bytes_per_s: float
    """After the system was asked to forget the file; where it does not, its cache's rate."""


def disk_rates(directory: Path, *, file_bytes: int = FILE_BYTES, spells: int = SPELLS) -> DiskRates:
    """Medians over some spells. The file is removed, also when something fails: it has no name to begin with where
    the system can make one without."""
    piece = os.urandom(_PIECE_BYTES)  # no zeros, which some disks need not write
    count = max(1, file_bytes // _PIECE_BYTES)
    writes, reads = [], []
    for _ in range(spells):
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            started = time.perf_counter()
            for _ in range(count):
                file.write(piece)
            os.fsync(file.fileno())
            writes.append(count * _PIECE_BYTES / (time.perf_counter() - started))
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.perf_counter()
            while file.read(_PIECE_BYTES):
                pass
            reads.append(count * _PIECE_BYTES / (time.perf_counter() - started))
    return DiskRates(statistics.median(writes), statistics.median(reads))
