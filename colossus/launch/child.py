"""Becomes one rank: runs in the new process, sets what only a process itself can set, and turns into the command.

A script of the standard library alone (it is run with `python -I -S`, which starts in some 15 ms):

    child.py '{"parent": 4711, "stdout": "rank.log", "stderr": "rank.log", "cpus": [0, 1]}' command argument …
"""

import json
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """On Linux, the kernel kills this process when its parent ends, however that ends. It outlasts `exec`."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we could ask for that
        os._exit(1)


def main() -> None:
    settings = json.loads(sys.argv[1])
    command = sys.argv[2:]
    die_with_parent(settings["parent"])
    for stream, path in ((0, os.devnull), (1, settings["stdout"]), (2, settings["stderr"])):
        # Appending: both streams may go into one file, and neither overwrites the other.
        file = os.open(path, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, stream)
        os.close(file)
    if settings["cpus"] is not None:
        os.sched_setaffinity(0, settings["cpus"])
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"error: {command[0]!r} cannot be started: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)  # as shells say it


if __name__ == "__main__":
    main()
