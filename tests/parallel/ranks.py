"""Many processes as one line: `run_ranks(function, num_ranks, *arguments)`.

Processes are kept and used again: importing torch takes longer than most cases. A pool lasts as long as the test
session; it is torn down by pid, and a pool in which something failed is not used again.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PATIENCE_S = 240.0


class RankError(AssertionError):
    """What went wrong, on which rank."""


def run_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each rank of a gloo world. Functions of modules only: they are pickled."""
    pool = _POOLS.get(num_ranks)
    if pool is None:
        pool = _POOLS[num_ranks] = _Pool(num_ranks)
    try:
        return pool.run(function, arguments)
    except BaseException:
        _POOLS.pop(num_ranks).kill()
        raise


class _Pool:
    def __init__(self, num_ranks: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._directory = tempfile.mkdtemp(prefix="ranks-")
        self._count = 0
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, num_ranks, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        self._count += 1
        store = str(Path(self._directory) / f"store-{self._count}")
        for pipe in self._pipes:
            pipe.send((function, arguments, store))
        results: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            ready = wait(list(waiting), timeout=PATIENCE_S)
            if not ready:
                raise RankError(f"ranks {sorted(waiting.values())} gave no answer in {PATIENCE_S:.0f} s")
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[index]
                try:
                    error, result = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    raise RankError(f"rank {rank} died") from None
                if error is not None:
                    raise RankError(f"rank {rank}:\n{error}")
                results[rank] = result
        return [results[rank] for rank in range(len(self._pipes))]

    def kill(self) -> None:
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            process.join()


_POOLS: dict[int, _Pool] = {}


@atexit.register
def _end() -> None:
    for pool in _POOLS.values():
        pool.kill()


def _serve(rank: int, num_ranks: int, pipe: Connection) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments, path = pipe.recv()
        except EOFError:
            return
        try:
            store = dist.FileStore(path, num_ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
            try:
                result = function(*arguments)
            finally:
                dist.destroy_process_group()
            pipe.send((None, result))
        except BaseException:
            pipe.send((traceback.format_exc(), None))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
