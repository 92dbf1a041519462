"""The directory of checkpoints: names, how one appears and goes, and what dead processes left behind.

A checkpoint is made under a temporary name and renamed when it is complete and on the disk, and renamed away
before it is deleted; so what bears a checkpoint's name was complete once, whenever a process was killed.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_CHECKPOINT = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_TEMPORARY = re.compile(r"\.(?:writing|deleting)-step-\d{8,}\.([\w-]+)\.(\d+)\.(\d+)\.[0-9a-f]+")

GIVEN_UP_NAME = "given-up.txt"
"""In a directory that ranks were writing into: why there will be no checkpoint."""


@dataclass(frozen=True, slots=True, order=True)
class Checkpoint:
    """A checkpoint's place. `version` is above 0 only while it replaces one of the same step."""

    step: int
    version: int
    path: Path


def list_checkpoints(directory: Path | str) -> list[Checkpoint]:
    """The checkpoints in a directory, oldest step first; none where there is no such directory.

    By name only: whether they are good is for `load` or `verify` to say. Raises OSError if it cannot be read.
    """
    found = []
    try:
        for path in Path(directory).iterdir():
            match = _CHECKPOINT.fullmatch(path.name)
            if match and path.is_dir():
                found.append(Checkpoint(int(match[1]), int(match[2] or 0), path))
    except FileNotFoundError:
        return []
    return sorted(found)


def checkpoint_name(step: int, version: int = 0) -> str:
    """1200 → `"step-00001200"`."""
    return f"step-{step:08d}" + (f".{version}" if version else "")


def begin(directory: Path, step: int) -> Path:
    """A new, empty temporary directory to write a checkpoint into. Raises OSError."""
    make_directory(directory)
    path = _temporary(directory, "writing", step)
    path.mkdir()
    return path


def new_attempt() -> str:
    """A name for one try at a checkpoint by many ranks: this process, which answers for it, and a number that does not
    come again."""
    return f"{owner()}.{secrets.token_hex(8)}"


def attempt_path(directory: Path, step: int, attempt: str) -> Path:
    """Where the ranks of an attempt write; the same on all."""
    return directory / f".writing-{checkpoint_name(step)}.{attempt}"


def begin_attempt(path: Path) -> None:
    """Open an attempt's directory, which other ranks wait for. Raises OSError."""
    make_directory(path.parent)
    path.mkdir()


def remove_given_up(directory: Path) -> None:
    """Delete what this process began, gave up and kept for other ranks to read the reason. Never raises OSError."""
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            if match and ".".join(match.groups()) == owner() and (path / GIVEN_UP_NAME).exists():
                shutil.rmtree(path, ignore_errors=True)


def publish(temporary: Path, directory: Path, step: int) -> Path:
    """Give a complete checkpoint its name, and make the name durable; returns its path. Raises OSError.

    A directory cannot be renamed onto a full one. Where this step has a checkpoint already, the new one
    becomes its next version, the old one goes, and then the version is dropped from the name: at every
    instant one of them is there, which two renames through a temporary name would not give.
    """
    sync_directory(temporary)
    while True:
        same_step = [c for c in list_checkpoints(directory) if c.step == step]
        version = same_step[-1].version + 1 if same_step else 0
        path = directory / checkpoint_name(step, version)
        try:
            temporary.rename(path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another process published this very version since we looked: take the next.
    sync_directory(directory)
    for older in same_step:
        discard(older)
    if version == 0:
        return path
    plain = directory / checkpoint_name(step)
    try:
        path.rename(plain)
        sync_directory(directory)
    except (
        OSError
    ):  # another process replaced ours, or made a newer version meanwhile: both names are readable
        return path if path.exists() else plain
    return plain


def discard(checkpoint: Checkpoint) -> None:
    """Delete a checkpoint, renamed first: none is ever half there. What fails is left for the next time."""
    temporary = _temporary(checkpoint.path.parent, "deleting", checkpoint.step)
    try:
        checkpoint.path.rename(temporary)
    except OSError:
        return
    shutil.rmtree(temporary, ignore_errors=True)


def clean(directory: Path | str, *, abandoned_after_s: float | None = None) -> list[Path]:
    """Delete what dead processes of this machine left half written or half deleted; returns what was removed.

    Leftovers of live processes and of other programs stay; those of other machines too, unless nothing in them has
    changed for `abandoned_after_s` by the file system's own clock. Never raises OSError.
    """
    removed = []
    now_s: float | None = None
    try:
        for path in Path(directory).iterdir():
            match = _TEMPORARY.fullmatch(path.name)
            if not match:
                continue
            dead = owner_is_dead(match[1], match[2], match[3])
            if not dead and abandoned_after_s is not None and match[1] != _host():
                now_s = now_s or _file_system_time_s(path.parent)
                dead = _changed_s(path) < now_s - abandoned_after_s
            if dead:
                shutil.rmtree(path, ignore_errors=True)
                if not path.exists():
                    removed.append(path)
    except OSError:
        pass  # no directory, not ours to read, or going away under our eyes: another time
    return removed


def _changed_s(path: Path) -> float:
    """When a directory or a file in it last changed. Raises OSError."""
    return max(one.stat().st_mtime for one in (path, *path.iterdir()))


def _file_system_time_s(directory: Path) -> float:
    """What the machine that serves the files would write as the time now. Raises OSError."""
    probe = directory / f".clock-{secrets.token_hex(8)}"
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def make_directory(path: Path) -> None:
    """`mkdir -p`, durable. Raises OSError."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a directory's entries survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(directory: Path, kind: Literal["writing", "deleting"], step: int) -> Path:
    return directory / f".{kind}-{checkpoint_name(step)}.{owner()}.{secrets.token_hex(4)}"


def owner() -> str:
    """This process, for the name of what it is writing: host, process, and its start, as process ids come round
    again."""
    pid = os.getpid()
    return f"{_host()}.{pid}.{_started(pid)}"


def owner_is_dead(host: str, pid: str, started: str) -> bool:
    """Whether a process of this machine that named something so is gone."""
    return host == _host() and _started(int(pid)) != started


def _host() -> str:
    return re.sub(r"[^\w-]", "_", socket.gethostname()) or "localhost"


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot; `"0"` where nothing says; None if it is dead."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # alive, of another user
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "0"
    return None if fields[0] in ("Z", "X") else fields[19]
