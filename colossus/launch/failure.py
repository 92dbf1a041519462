"""What a rank says of its failure, and what of that a person needs to read."""

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from colossus.errors import ColossusError

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
LOG_FILE = "COLOSSUS_LOG"
"""The environment variable in which the launcher tells a rank where its log is."""
_MAX_LOG_BYTES = 1 << 16
_MAX_LINES = 20
_MAX_CHARACTERS = 300

_NOT_OURS = re.compile(
    r"(site|dist)-packages/(?!colossus/|recipes/)|/lib/python3[.\d]*/(?!site-packages/)|<frozen "
)
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07")
_RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")
_CARETS = re.compile(r"^\s*[~^]+\s*$")
_NATIVE_FRAME = re.compile(r"^(frame #\d+:|Exception raised from |C\+\+ CapturedTraceback:|#\d+ )")
_LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|Socket closed|Read error \[|"
    r"remote process exited|ncclRemoteError|ncclSystemError|recvValue failed|sendBytes failed|"
    r"Dist(Network|Store|Backend)Error|process group watchdog thread terminated",
)
_HINTS = {
    signal.SIGKILL: "out of memory? The kernel's log (dmesg) names what it killed for want of memory",
    signal.SIGSEGV: "an error in compiled code, not in Python",
    signal.SIGBUS: "shared memory full? `df -h /dev/shm` shows",
    signal.SIGABRT: "compiled code gave up; its log says why",
    signal.SIGILL: "compiled for another processor than this machine's?",
}


@dataclass(frozen=True, slots=True)
class Reported:
    """What a rank wrote about the exception that ends it. `time_s`: when, since 1970."""

    error: str
    stack: str
    sentence: str | None
    time_s: float


def report_failure(error: BaseException) -> None:
    """Tells the launcher why this rank ends; for the `except` around a rank's main. Only the first call counts.

    The file is torch elastic's, so `torchrun` understands it too; `sentence` is there when the error is one of
    ours, which needs no traceback. Without a launcher nothing happens.
    """
    if not (path := os.environ.get(_ERROR_FILE)):
        return
    said = {
        "message": {
            "message": f"{type(error).__name__}: {error}",
            "extraInfo": {
                "py_callstack": "".join(traceback.format_exception(error)),
                "timestamp": str(int(time.time())),
            },
        },
        "sentence": str(error) if isinstance(error, ColossusError) else None,
    }
    draft = Path(f"{path}.{os.getpid()}")
    with suppress(OSError):  # a full disk must not hide the error itself
        draft.write_text(json.dumps(said))
        with suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()


def log_failure(error: BaseException) -> None:
    """Writes why this rank ends to its log; to stderr where it has none.

    Not to stderr where it has one: of rank 0 that is a person's terminal, on which the launcher says in a few lines
    which rank was the first to fail, and the tracebacks of those that failed by it would hide that.
    """
    said = (
        f"error: {error}\n"
        if isinstance(error, ColossusError)
        else "".join(traceback.format_exception(error))
    )
    if log := os.environ.get(LOG_FILE):
        with suppress(OSError), Path(log).open("a", encoding="utf-8") as file:
            file.write(said)
            return
    sys.stderr.write(said)


def read_report(path: Path) -> Reported | None:
    """What a rank wrote there, by `report_failure` or torch's `record`; None where it did not come to it."""
    try:
        said = json.loads(path.read_text(errors="replace"))
        message = said["message"]
        if isinstance(message, str):
            return Reported(message, "", said.get("sentence"), path.stat().st_mtime)
        stack = message.get("extraInfo", {}).get("py_callstack", "")
        # The file's own time, not the time stamp in it: torch's is in whole seconds.
        return Reported(message["message"], stack, said.get("sentence"), path.stat().st_mtime)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def is_lost_peer(text: str) -> bool:
    """Whether a rank says that it failed because another one had gone."""
    return _LOST_PEER.search(text) is not None


def how_it_ended(code: int) -> str:
    """An exit code as `Popen` gives it, in words: `exit code 3`, or a signal with what is behind it most often."""
    if code >= 0:
        by_shell = code - 128
        inside = f" ({signal.Signals(by_shell).name} inside it)" if by_shell in _SIGNALS else ""
        return f"ended with exit code {code}{inside}"
    try:
        number = signal.Signals(-code)
    except ValueError:
        return f"was killed by signal {-code}"
    hint = _HINTS.get(number)
    return f"was killed by {number.name}{f' ({hint})' if hint else ''}"


_SIGNALS = {int(number) for number in signal.Signals}


def last_lines(log_path: Path) -> list[str]:
    """The end of a rank's log, shortened."""
    try:
        with log_path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MAX_LOG_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return shortened(text)


def shortened(text: str) -> list[str]:
    """At most 20 lines: no terminal control, no native frames, and of a traceback the frames of one's own code."""
    lines = (_plain(line) for line in text.split("\n"))
    kept = _short_tracebacks([line for line in lines if not _NATIVE_FRAME.match(line)])
    kept = [line for line in kept if line.strip()]
    return [_cut(line) for line in kept[-_MAX_LINES:]]


def _plain(line: str) -> str:
    """As a terminal would show it, without the number of the rank that torch puts before tracebacks."""
    seen = _CONTROL.sub("", line).rstrip("\r").rsplit("\r", 1)[-1]
    return _RANK_PREFIX.sub("", seen).rstrip()


def _short_tracebacks(lines: Sequence[str]) -> list[str]:
    kept: list[str] = []
    at = 0
    while at < len(lines):
        kept.append(lines[at])
        at += 1
        if not kept[-1].startswith("Traceback (most recent call last)"):
            continue
        frames: list[list[str]] = []
        while at < len(lines) and lines[at].startswith("  "):
            if lines[at].startswith("  File ") or not frames:
                frames.append([])
            if not _CARETS.match(lines[at]):
                frames[-1].append(lines[at])
            at += 1
        kept += _telling(frames)
    return kept


def _telling(frames: list[list[str]]) -> list[str]:
    """Of a traceback's frames the last three of one's own code, and the one where it was raised."""
    ours = [number for number, frame in enumerate(frames) if not _NOT_OURS.search(frame[0])]
    chosen = sorted({*ours[-3:], *range(len(frames))[-1:]})
    lines = [line for number in chosen for line in frames[number]]
    left_out = len(frames) - len(chosen)
    return [f"  ({left_out} frames left out)", *lines] if left_out else lines


def _cut(line: str) -> str:
    return line if len(line) <= _MAX_CHARACTERS else f"{line[:_MAX_CHARACTERS]} …"
