"""Outlives the launcher, and leaves nothing of a run behind: neither ranks nor what those have started.

The kernel ends a rank whose launcher was killed (`child.die_with_parent`), but on Linux only, and not the rank's
own children. So a small process of its own waits for the launcher's end, which it sees as the end of a pipe, and
then kills what is left: the process groups of ranks that had not ended, and every process with the run's mark in
its environment, which children inherit even where they leave their group.

    guardian.py MARK FOLDER < pipe of lines "+pid" (a rank has started) and "-pid" (it has ended)
"""

import os
import select
import shutil
import signal
import sys
import time
from contextlib import suppress

import psutil

MARK = "COLOSSUS_LAUNCH"


def kill_group(pid: int) -> None:
    """Kills the process group that `pid` leads, at once. Nothing happens where it has gone."""
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of dead processes
        os.killpg(pid, signal.SIGKILL)


def marked(mark: str) -> list[psutil.Process]:
    """All living processes of this user that a run with this mark has started."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def sweep(mark: str) -> None:
    """Kills every process with this mark, and those that they start in the meantime."""
    for _ in range(50):
        left = [process for process in marked(mark) if process.pid != os.getpid()]
        if not left:
            return
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.1)


def _ranks_at_the_end(parent: int) -> set[int]:
    """Reads until the launcher has ended; the pids of ranks that had not."""
    alive: set[int] = set()
    unread = b""
    while True:
        # The launcher's end closes the pipe, unless a fork of it holds the pipe open: so we look at both.
        ready, _, _ = select.select([0], [], [], 1.0)
        if not ready:
            if os.getppid() != parent:
                return alive
            continue
        data = os.read(0, 1 << 16)
        if not data:
            return alive
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            (alive.add if line[:1] == b"+" else alive.discard)(int(line[1:]))


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # schedulers signal all processes of a job; this one stays
    mark, folder = sys.argv[1:]
    for pid in _ranks_at_the_end(os.getppid()):
        kill_group(pid)
    sweep(mark)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
