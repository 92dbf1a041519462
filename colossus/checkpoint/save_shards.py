"""One checkpoint written by many ranks, who speak to each other through files alone.

Every rank writes its payloads and then, by a rename, its part's manifest into one directory on a file system that all
share. Rank 0 opens that directory, waits for all parts, looks that their boxes make up every tensor, writes the index
and gives the directory its name. The others see the name change, or read in it why it was given up.

So what can happen is: all parts came, and the checkpoint appears; or rank 0 gives up (a part did not come in time, a
rank said that it could not write, boxes do not fit), and says so; or rank 0 dies, the others stop waiting after a time
and the directory, which no one can publish any more, is removed at the next start. Checkpoints that were there stay in
every case.
"""

import contextlib
import mmap
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from colossus.checkpoint.directory import (
    GIVEN_UP_NAME,
    Checkpoint,
    attempt_path,
    begin_attempt,
    list_checkpoints,
    new_attempt,
    publish,
    remove_given_up,
    sync_directory,
)
from colossus.checkpoint.index import Index, PartEntry, encode_tables
from colossus.checkpoint.manifest import MANIFEST_NAME, PayloadEntry, Piece
from colossus.checkpoint.part import Part, part_name, read_announcement, read_tail
from colossus.checkpoint.payload import CHUNK_BYTES, TensorType, check_tensor, lay_out, write_payload
from colossus.checkpoint.ranks import Ranks
from colossus.checkpoint.save import Saved, cannot_write, write_synced
from colossus.checkpoint.shard import Shard, as_shards
from colossus.checkpoint.tiling import Placed, place
from colossus.errors import CheckpointError
from colossus.spec.model import ModelSpec

TIMEOUT_S = 600.0
"""How long rank 0 waits, when its own part is written, for those of the others."""

_SHOWN_RANKS = 8
_LOOKS = 10
_READERS = 16
_LEAVING_S = 10.0


def save_shards(
    directory: Path | str,
    step: int,
    tensors: Mapping[str, torch.Tensor | Shard],
    facts: Mapping[str, Any],
    ranks: Ranks,
    *,
    model: ModelSpec | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Saved:
    """Write `directory/step-<step>` together with the other ranks; returns on each when the whole is published.

    `tensors` is what this rank is to write: of all ranks, the boxes make up each tensor, every element once. A plain
    tensor is a whole one, which no other rank has. `facts` and `model` count on rank 0. For the rest see `save`.
    `num_bytes` of the result are this rank's; on rank 0 with the index.

    Raises CheckpointError on every rank if it cannot be written, with the same reason where it is known; TypeError or
    ValueError on rank 0 if `facts` are not JSON-able.
    """
    token = ranks.broadcast(new_attempt() if ranks.rank == 0 else None)
    attempt = Attempt(Path(directory), step, token, ranks.rank, ranks.num_ranks, timeout_s)
    return attempt.save(as_shards(tensors), facts, model, Planner())


class Planner:
    """Rank 0's knowledge of who holds which box. It is worked out once, and again when a rank announces others."""

    def __init__(self) -> None:
        self._layouts: list[str] = []
        self._payload_bytes: list[Mapping[str, int]] = []
        self._tensors: dict[str, Placed] = {}
        self._tables = ""

    def index(
        self, path: Path, num_ranks: int, step: int, model: ModelSpec | None, facts: Mapping[str, Any]
    ) -> bytes:
        """The encoded index of the parts in `path`. Raises OSError, CheckpointError if their boxes do not fit."""
        with ThreadPoolExecutor(_READERS) as pool:  # a shared file system answers many sooner than one by one
            paths = [path / part_name(rank) for rank in range(num_ranks)]
            tails = list(pool.map(read_tail, paths))
            layouts = [tail.layout_xxh3_128 for tail in tails]
            changed = layouts != self._layouts
            announced = list(pool.map(read_announcement, paths, range(num_ranks))) if changed else []
        if changed:
            self._tensors = place(announced)
            self._tables = encode_tables(self._tensors)
            self._payload_bytes = [one.payload_bytes for one in announced]
            self._layouts = layouts
        index = Index(
            step=step,
            model_fingerprint=model.fingerprint() if model else None,
            model_spec=model.model_dump(mode="json") if model else None,
            facts=dict(facts),
            parts={
                rank: PartEntry(tail.num_bytes, tail.xxh3_128, self._payload_bytes[rank])
                for rank, tail in enumerate(tails)
            },
            tensors=self._tensors,
        )
        return index.encode(self._tables)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a checkpoint. `token` names it, the same on all ranks and never again. From when `leaving` is set it
    waits for other ranks no longer than a few seconds: its process is about to end."""

    directory: Path
    step: int
    token: str
    rank: int
    num_ranks: int
    timeout_s: float
    leaving: threading.Event = field(default_factory=threading.Event)
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", attempt_path(self.directory, self.step, self.token))

    def save(
        self, shards: Mapping[str, Shard], facts: Mapping[str, Any], model: ModelSpec | None, planner: Planner
    ) -> Saved:
        """This rank's share of it, and the wait for the others'. Raises as `save_shards` does."""
        started = time.perf_counter()
        num_bytes = sum(shard.box.num_bytes for shard in shards.values())
        try:
            if self.rank == 0:
                begin_attempt(self.path)
            else:
                self._wait_until_open()
            inode = self.path.stat().st_ino
            try:
                num_bytes = self._write_part(shards)
                if self.rank == 0:
                    self._wait_for_parts()
                    data = planner.index(self.path, self.num_ranks, self.step, model, facts)
                    num_bytes += write_synced(self.path / MANIFEST_NAME, data)
                    path = publish(self.path, self.directory, self.step)
                    remove_given_up(self.directory)
            except BaseException as error:
                if isinstance(error, OSError):
                    error = CheckpointError(
                        self._given_up() or cannot_write(self.directory, self.step, num_bytes, error)
                    )
                self._say_failed(str(error))
                raise error
            if self.rank != 0:
                path = self._wait_for_the_end(inode)
        except OSError as error:
            raise CheckpointError(cannot_write(self.directory, self.step, num_bytes, error)) from error
        return Saved(self.step, path, num_bytes, time.perf_counter() - started)

    def refuse(self, reason: str) -> None:
        """In place of `save`: say that this rank's part will not come; on rank 0, that there will be no checkpoint."""
        with contextlib.suppress(OSError, CheckpointError):
            if self.rank == 0:
                begin_attempt(self.path)
            else:
                self._wait_until_open()
            self._say_failed(reason)

    def _say_failed(self, reason: str) -> None:
        if self.rank == 0:
            self._give_up(reason)
        else:
            with contextlib.suppress(OSError):
                _write_whole(self.path / _failed_name(self.rank), reason.encode())

    def _write_part(self, shards: Mapping[str, Shard]) -> int:
        """Payloads, then the manifest by a rename; returns their bytes. Raises OSError, CheckpointError."""
        for name, shard in shards.items():
            check_tensor(name, shard.tensor)
        types = {
            name: TensorType(shard.tensor.dtype, tuple(shard.tensor.shape))
            for name, shard in shards.items()
            if shard.tensor.numel()
        }
        buffer = mmap.mmap(-1, CHUNK_BYTES)
        payloads: dict[str, PayloadEntry] = {}
        pieces: dict[str, Piece] = {}
        for file, layout in lay_out(types, self.rank).items():
            hashes = write_payload(self.path / file, layout, lambda name: shards[name].tensor, buffer)
            header_hash = xxhash.xxh3_128_hexdigest(layout.header)
            payloads[file] = PayloadEntry(layout.num_bytes, len(layout.header), header_hash)
            for slot in layout.slots:
                found = hashes[slot.name]
                pieces[slot.name] = Piece(
                    shards[slot.name].offsets,
                    slot.shape,
                    file,
                    slot.start,
                    slot.num_bytes,
                    found.whole,
                    found.chunks,
                )
        boxes = {name: shard.box for name, shard in shards.items()}
        data = Part(self.step, self.rank, boxes, payloads, pieces).encode()
        _write_whole(self.path / part_name(self.rank), data)
        return len(data) + sum(entry.num_bytes for entry in payloads.values())

    def _wait_until_open(self) -> None:
        waiting = _Waiting(self.timeout_s, self.leaving)
        while not self.path.is_dir():
            if waiting.is_over():
                raise CheckpointError(
                    f"the checkpoint of step {self.step}: rank 0 did not open {self.path} within "
                    f"{waiting.waited_s:.0f} s; look for its error, and whether all ranks see one file system and "
                    f"save the same step"
                )

    def _wait_for_parts(self) -> None:
        waiting = _Waiting(self.timeout_s, self.leaving)
        expected = {part_name(rank): rank for rank in range(self.num_ranks)}
        failed = {_failed_name(rank): rank for rank in range(self.num_ranks)}
        while True:
            there = {path.name for path in self.path.iterdir()}
            for name in there & failed.keys():
                reason = (self.path / name).read_text(errors="replace")
                raise CheckpointError(f"rank {failed[name]} could not write its part: {reason}")
            missing = [rank for name, rank in expected.items() if name not in there]
            if not missing:
                return
            if waiting.is_over():
                shown = ", ".join(map(str, missing[:_SHOWN_RANKS]))
                more = f" and {len(missing) - _SHOWN_RANKS:,} more" if len(missing) > _SHOWN_RANKS else ""
                raise CheckpointError(
                    f"the checkpoint of step {self.step} is given up: {len(missing):,} of {self.num_ranks:,} ranks did "
                    f"not write their parts within {waiting.waited_s:.0f} s: {shown}{more}. The checkpoints before it "
                    f"stay; see whether these ranks live, or allow more time"
                )

    def _wait_for_the_end(self, inode: int) -> Path:
        """Where the checkpoint is. Raises CheckpointError with rank 0's reason if there is none."""
        waiting = _Waiting(2 * self.timeout_s, self.leaving)
        looks = 0
        while True:
            reason = self._given_up()
            if reason is not None:
                raise CheckpointError(reason)
            if not self.path.exists():
                # The same directory under a checkpoint's name. Where it replaces one of the same step its name changes
                # once more, so wait a little for the last one.
                found = self._published(inode)
                looks += 1
                if found and (found.version == 0 or looks == _LOOKS):
                    return found.path
                if looks == _LOOKS:
                    raise CheckpointError(
                        f"the checkpoint of step {self.step} was given up by rank 0; see its error"
                    )
            if waiting.is_over():
                raise CheckpointError(
                    f"the checkpoint of step {self.step} was neither published nor given up by rank 0 within "
                    f"{waiting.waited_s:.0f} s; the checkpoints before it stay. See whether rank 0 lives"
                )

    def _published(self, inode: int) -> Checkpoint | None:
        for checkpoint in list_checkpoints(self.directory):
            with contextlib.suppress(OSError):
                if checkpoint.step == self.step and checkpoint.path.stat().st_ino == inode:
                    return checkpoint
        return None

    def _given_up(self) -> str | None:
        """Rank 0's reason, if it gave up."""
        try:
            return (self.path / GIVEN_UP_NAME).read_text(errors="replace")
        except OSError:
            return None

    def _give_up(self, reason: str) -> None:
        """Leave nothing but the reason, for ranks that wait; or nothing at all where it cannot be written."""
        try:
            for path in self.path.iterdir():
                path.unlink(missing_ok=True)
            _write_whole(self.path / GIVEN_UP_NAME, reason.encode())
        except OSError:
            shutil.rmtree(self.path, ignore_errors=True)


class _Waiting:
    """Looks again after 10 ms, then less and less often: thousands may be looking at one file system."""

    def __init__(self, timeout_s: float, leaving: threading.Event) -> None:
        self._start_s = time.monotonic()
        self._limit_s = timeout_s
        self._leaving = leaving
        self._pause_s = 0.01

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._start_s

    def is_over(self) -> bool:
        """Whether there is no time left; else waits."""
        if self._leaving.is_set():
            self._limit_s = min(self._limit_s, self.waited_s + _LEAVING_S)
            self._leaving = threading.Event()
        left_s = self._limit_s - self.waited_s
        if left_s <= 0:
            return True
        self._leaving.wait(min(self._pause_s, left_s))
        self._pause_s = min(1.5 * self._pause_s, 1.0)
        return False


def _failed_name(rank: int) -> str:
    return f"failed-{rank:05d}.txt"


def _write_whole(path: Path, data: bytes) -> None:
    """A file that is there with all its bytes or not at all. Raises OSError."""
    temporary = path.with_name(f".{path.name}")
    write_synced(temporary, data)
    temporary.rename(path)
    sync_directory(path.parent)
