"""Real processes for real disasters. A fork server that has torch loaded makes one in milliseconds."""

import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from colossus.checkpoint import Saver, load, save
from colossus.spec.run import Checkpoints

from .states import state

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["colossus.checkpoint", "torch.distributed"])


def start(target: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """Run `target(connection, *arguments)` in a new process; returns it and our end of the pipe."""
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def received(connection: Connection) -> list[Any]:
    """All that a process said before it ended."""
    messages = []
    while True:
        try:
            messages.append(connection.recv())
        except EOFError:
            return messages


def save_in_a_loop(said: Connection, directory: Path, first_step: int, num_elements: int) -> None:
    """Save one step after the other until killed, saying each that is reported as saved."""
    torch.set_num_threads(1)
    saver = Saver(directory, keep=Checkpoints(keep_last=2))
    said.send("ready")
    for step in range(first_step, first_step + 100_000):
        saver.save(step, state(step, num_elements), {"step": step, "num_elements": num_elements})
        for result in saver.poll():
            said.send(result)


def save_twenty(said: Connection, directory: Path, first_step: int) -> None:
    """Save twenty steps, each waited for."""
    torch.set_num_threads(1)
    saver = Saver(directory, keep=Checkpoints(keep_last=3))
    for step in range(first_step, first_step + 20):
        saver.save(step, state(step), {"step": step})
        for result in saver.wait():
            said.send(result)


def die_at_call(fatal_call: int) -> None:
    """This process is killed at the `fatal_call`-th thing that it asks of the file system from here on."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fatal_call:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            count()
            return function(*arguments)

        return call

    events = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
    sys.addaudithook(lambda event, _: count() if event in events else None)
    for name in ("write", "fsync", "ftruncate"):
        setattr(os, name, counted(getattr(os, name)))


def save_and_die(said: Connection, directory: Path, fatal_call: int) -> None:
    """Save a few steps; be killed at the `fatal_call`-th thing that is asked of the file system."""
    torch.set_num_threads(1)
    die_at_call(fatal_call)

    def saved(step: int, generation: int) -> None:
        facts = {"step": step, "generation": generation}
        save(directory, step, state(step + 1000 * generation, 40), facts)
        said.send((step, generation))

    saved(1, 0)
    saved(2, 0)
    saved(2, 1)  # replaces
    saver = Saver(directory, keep=Checkpoints(keep_last=1))
    saver.save(3, state(3, 40), {"step": 3, "generation": 0})  # deletes 1 and 2
    saver.wait()
    said.send((3, 0))
    said.send("done")


def save_with_a_file_limit(said: Connection, directory: Path, limit_bytes: int) -> None:
    """Save a step that fits, one that the limit does not allow, and one that fits again."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    saver = Saver(directory)
    for step, num_elements in ((1, 2000), (2, 200_000), (3, 2000)):
        saver.save(step, state(step, num_elements), {"step": step})
        said.send(saver.wait())


def save_and_load_measured(said: Connection, directory: Path) -> None:
    """Say the bytes of a state, and by how much saving and loading it raised the peak of anonymous memory."""
    torch.set_num_threads(1)
    tensors = {f"model.{i}": torch.ones(4 << 20) for i in range(8)}
    before = _anonymous_bytes()
    peaks = []
    for work in (lambda: save(directory, 1, tensors, {}), lambda: load(directory / "step-00000001")):
        with _PeakMemory() as memory:
            result = work()
        peaks.append(memory.peak_bytes - before)
    assert all(float(tensor.min()) == 1 for tensor in result.tensors.values())
    said.send((sum(tensor.nbytes for tensor in tensors.values()), *peaks))


class _PeakMemory:
    """Watches this process's memory that no file stands behind."""

    def __enter__(self) -> "_PeakMemory":
        self.peak_bytes = _anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, _anonymous_bytes())
            if self._done.wait(0.001):
                return


def _anonymous_bytes() -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024
