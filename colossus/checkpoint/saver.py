"""Checkpoints behind training's back: copy the state, go on training, write the copy in a thread."""

import contextlib
import json
import mmap
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from colossus.checkpoint.directory import clean, new_attempt
from colossus.checkpoint.payload import check_tensor, host_bytes, view_bytes
from colossus.checkpoint.ranks import Ranks
from colossus.checkpoint.retention import retire
from colossus.checkpoint.save import Saved, save
from colossus.checkpoint.save_shards import TIMEOUT_S, Attempt, Planner
from colossus.checkpoint.shard import Shard, as_shards
from colossus.errors import CheckpointError
from colossus.spec.model import ModelSpec
from colossus.spec.run import Checkpoints

_ALIGNMENT_BYTES = 64
_ABANDONED_S = 3600.0


@dataclass(frozen=True, slots=True)
class SaveFailed:
    """A checkpoint that could not be written. The ones before it are as they were."""

    step: int
    reason: str


class Saver:
    """Saves a run's checkpoints in the background, one at a time, and deletes those that are not to be kept.

    `save` holds training only while it copies the state to host memory, which stays allocated for the next
    time: as many bytes as the state has, pinned if any tensor is on a CUDA device. If the one before is still
    being written, `save` waits for it: a checkpoint that was asked for is never dropped in silence. Ask
    `busy` first to put one off instead.

    Nothing that goes wrong raises into training: failures come back from `poll` and `wait` as SaveFailed.
    Calls come from one thread. Leftovers of dead processes are cleaned up at the start.

    With `ranks`, many processes save one checkpoint together: each makes a Saver, calls `save` for the same steps and
    gives what it is to write, as of `save_shards`. They meet in the constructor only; afterwards each writes when it
    comes to it and they know of each other by files, so nothing here takes part in training's collectives. Rank 0
    publishes when all parts are there, gives up `timeout_s` after its own part is written, cleans up and retires; on
    the others a checkpoint is Saved when it was published. `facts`, `keep` and `model` count on rank 0.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        keep: Checkpoints | None = None,
        model: ModelSpec | None = None,
        ranks: Ranks | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.directory = Path(directory)
        self._keep = keep or Checkpoints()
        self._model = model
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._planner = Planner()
        self._num_attempts = 0
        self._leaving = threading.Event()
        self._copy = _HostCopy()
        self._thread: threading.Thread | None = None
        self._results: list[Saved | SaveFailed] = []
        if ranks is None:
            clean(self.directory)
            return
        if ranks.rank == 0:
            # Before the others go on to write. No attempt lives through `timeout_s` without a byte written.
            clean(self.directory, abandoned_after_s=max(2 * timeout_s, _ABANDONED_S))
        self._name = ranks.broadcast(new_attempt() if ranks.rank == 0 else None)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def prepare(self, tensors: Mapping[str, torch.Tensor | Shard]) -> None:
        """Get the host memory that `save` will copy these into, in the background.

        Not needed, but the first `save` then holds training no longer than the later ones: a system that
        hands out fresh memory a page at a time can be ten times slower at it than the copying is.
        """
        self._join()
        self._start("checkpoint-memory", lambda: self._copy.reserve(_local(tensors)))

    def save(self, step: int, tensors: Mapping[str, torch.Tensor | Shard], facts: Mapping[str, Any]) -> float:
        """Begin to save; tensors and facts may change as soon as it returns. Arguments as of `save.save`, or with
        `ranks` as of `save_shards`.

        Returns the seconds that the caller was held: waiting for the one in flight, and copying.
        """
        started = time.perf_counter()
        self._join()
        attempt = self._attempt(step)
        try:
            facts = json.loads(json.dumps(facts)) if attempt is None or attempt.rank == 0 else {}
            snapshot = self._copy.take(_local(tensors))
            if attempt is None:
                self._start(f"checkpoint-{step}", lambda: self._write(step, snapshot, facts))
            else:
                shards = {
                    name: replace(shard, tensor=snapshot[name]) for name, shard in as_shards(tensors).items()
                }
                self._start(f"checkpoint-{step}", lambda: self._write_part(attempt, shards, facts))
        except Exception as error:
            reason = _describe(error)
            self._results.append(SaveFailed(step, reason))
            if attempt is not None:
                self._start(f"checkpoint-{step}", lambda: attempt.refuse(reason))
        return time.perf_counter() - started

    def poll(self) -> list[Saved | SaveFailed]:
        """What has finished since the last time, oldest first; does not wait."""
        if not self.busy:
            self._join()
        finished = []
        while self._results:
            finished.append(self._results.pop(0))
        return finished

    def wait(self) -> list[Saved | SaveFailed]:
        """Wait for the checkpoint in flight; returns what has finished since the last time."""
        self._join()
        return self.poll()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is not None:
            self._leaving.set()  # other ranks may be dead, and this one is to end, not to wait for them
        self._join()

    def _start(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=name)
        thread.start()  # not a daemon: a process that ends in good order finishes its checkpoint
        self._thread = thread

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _attempt(self, step: int) -> Attempt | None:
        if self._ranks is None:
            return None
        self._num_attempts += 1
        token = f"{self._name}{self._num_attempts:08x}"
        return Attempt(
            self.directory,
            step,
            token,
            self._ranks.rank,
            self._ranks.num_ranks,
            self._timeout_s,
            self._leaving,
        )

    def _write_part(self, attempt: Attempt, shards: Mapping[str, Shard], facts: Mapping[str, Any]) -> None:
        try:
            result: Saved | SaveFailed = attempt.save(shards, facts, self._model, self._planner)
            if attempt.rank == 0:
                with contextlib.suppress(OSError):
                    retire(self.directory, attempt.step, self._keep)
        except Exception as error:
            result = SaveFailed(attempt.step, _describe(error))
        self._results.append(result)

    def _write(self, step: int, snapshot: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        try:
            result: Saved | SaveFailed = save(self.directory, step, snapshot, facts, model=self._model)
            with contextlib.suppress(OSError):  # what cannot be deleted now can be after the next one
                retire(self.directory, step, self._keep)
        except Exception as error:
            result = SaveFailed(step, _describe(error))
        self._results.append(result)


def _local(tensors: Mapping[str, torch.Tensor | Shard]) -> dict[str, torch.Tensor]:
    """What of them is on this rank."""
    return {name: value.tensor if isinstance(value, Shard) else value for name, value in tensors.items()}


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


class _HostCopy:
    """A copy of a state in one block of host memory, kept: fresh memory costs more than the copying."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    def reserve(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hold enough memory for these, pages and all; where there is not enough, `take` will say so."""
        with contextlib.suppress(OSError, RuntimeError):
            self._allocate(sum(map(_padded_bytes, tensors.values())), _any_cuda(tensors))
            self._block.numpy().fill(0)

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors' values now. They stay until the next call.

        Raises CheckpointError for tensors that cannot be held, OSError or RuntimeError for want of memory.
        """
        for name, tensor in tensors.items():
            check_tensor(name, tensor)
        self._allocate(sum(map(_padded_bytes, tensors.values())), _any_cuda(tensors))
        copies: dict[str, torch.Tensor] = {}
        start = 0
        for name, tensor in tensors.items():
            copy = view_bytes(self._block, start, tuple(tensor.shape), tensor.dtype)
            if tensor.is_cuda:
                copy.copy_(tensor, non_blocking=True)
            else:
                # By numpy, in one thread: torch's threads meet at a barrier after every tensor, and where the
                # machine is not all ours that took 0.9 s for 500 MB, where one thread took 0.13 s.
                block = self._block[start : start + tensor.nbytes].numpy()
                np.copyto(block, np.asarray(host_bytes(tensor)))
            copies[name] = copy
            start += _padded_bytes(tensor)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            # The copies are queued behind the work that computes the values; both must be done.
            torch.cuda.current_stream(device).synchronize()
        return copies

    def _allocate(self, num_bytes: int, pinned: bool) -> None:
        if len(self._block) >= num_bytes and self._pinned == pinned:
            return
        self._block = torch.empty(0, dtype=torch.uint8)  # give the old one back first
        if pinned:
            self._block = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        else:
            memory = mmap.mmap(-1, num_bytes)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults at the first copy
            self._block = torch.frombuffer(memory, dtype=torch.uint8)
        self._pinned = pinned


def _padded_bytes(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.dtype.itemsize // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _any_cuda(tensors: Mapping[str, torch.Tensor]) -> bool:
    return any(tensor.is_cuda for tensor in tensors.values())
