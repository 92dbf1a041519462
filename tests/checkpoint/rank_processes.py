"""Ranks that are real processes, which meet over gloo and write into one directory."""

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from colossus.checkpoint import (
    Box,
    ProcessGroupRanks,
    Saver,
    load_newest_shards,
    load_shards,
    save,
    save_shards,
)
from colossus.spec.run import Checkpoints

from .layouts import SPLITS, assert_boxes, shards, wanted, whole_state
from .processes import _anonymous_bytes, _PeakMemory, die_at_call, start

Ranked = Callable[..., None]


def start_ranks(target: Ranked, num_ranks: int, *arguments: Any) -> list[tuple[BaseProcess, Connection]]:
    """Run `target(connection, rank, num_ranks, *arguments)` on so many processes."""
    return [start(target, rank, num_ranks, *arguments) for rank in range(num_ranks)]


def meet(store: Path, rank: int, num_ranks: int) -> ProcessGroupRanks:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), num_ranks),
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=60),
    )
    return ProcessGroupRanks()


def save_and_load_every_layout(said: Connection, rank: int, num_ranks: int, folder: Path) -> None:
    """Save one step per layout, and load each under the layout after it."""
    ranks = meet(folder / "store", rank, num_ranks)
    names = list(SPLITS)
    for step, (name, other) in enumerate(zip(names, [*names[1:], names[0]], strict=True)):
        state = whole_state(step)
        directory = folder / name.replace(" ", "-")
        saved = save_shards(
            directory, step, shards(state, SPLITS[name], rank, num_ranks), {"by": name}, ranks
        )
        boxes = wanted(state, SPLITS[other], rank, num_ranks)
        loaded, rejected = load_newest_shards(directory, boxes, ranks)
        assert (loaded.path, loaded.step, loaded.facts, rejected) == (saved.path, step, {"by": name}, ())
        assert_boxes(loaded.tensors, state, boxes)
    ranks.barrier()
    said.send("done")


def save_in_the_background(said: Connection, rank: int, num_ranks: int, directory: Path, store: Path) -> None:
    """Save five steps behind a busy process group: the barriers stand for training's collectives."""
    ranks = meet(store, rank, num_ranks)
    saver = Saver(directory, keep=Checkpoints(keep_last=2), ranks=ranks, timeout_s=30)
    state = whole_state(0)
    saver.prepare(shards(state, SPLITS["rows"], rank, num_ranks))
    for step in range(1, 6):
        held = shards(whole_state(step), SPLITS["rows"], rank, num_ranks)
        saver.save(step, held, {"step": step})
        for value in held.values():
            getattr(value, "tensor", value).zero_()  # the optimizer's next step, as it were
        for _ in range(20):
            ranks.barrier()
        said.send(saver.wait())
    ranks.barrier()


def save_two_steps(
    said: Connection, rank: int, num_ranks: int, directory: Path, store: Path, victim: int, fatal_call: int
) -> None:
    """Save steps 1 and 2; one rank is killed at the `fatal_call`-th thing that it asks of the file system."""
    ranks = meet(store, rank, num_ranks)
    saver = Saver(directory, keep=Checkpoints(keep_last=2), ranks=ranks, timeout_s=2)
    if rank == victim:
        die_at_call(fatal_call)
    for step in (1, 2):
        saver.save(step, shards(whole_state(step), SPLITS["rows"], rank, num_ranks), {"step": step})
        for result in saver.wait():
            said.send(result)
    said.send("done")


def hold_an_attempt(said: Connection, rank: int, num_ranks: int, directory: Path, store: Path) -> None:
    """Rank 1 is killed before it writes, and rank 0 once it has written its part."""
    ranks = meet(store, rank, num_ranks)
    saver = Saver(directory, ranks=ranks, timeout_s=60)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    saver.save(9, shards(whole_state(9), SPLITS["rows"], rank, num_ranks), {})
    said.send("writing")
    saver.wait()


def load_parts_measured(said: Connection, directory: Path) -> None:
    """Say by how much loading rows, columns, or a corner of 64 MiB raised the peak of anonymous memory."""
    torch.set_num_threads(1)
    shape = (2048, 8192)
    path = save(directory, 1, {"model.w": torch.ones(shape)}, {}).path
    growths = {}
    for offsets, size in (((1000, 0), (256, 8192)), ((0, 500), (2048, 512)), ((1900, 8000), (96, 192))):
        box = Box(shape, offsets, size, torch.float32)
        load_shards(path, {"model.w": Box(shape, offsets, (1, 1), torch.float32)})
        before = _anonymous_bytes()
        with _PeakMemory() as memory:
            loaded = load_shards(path, {"model.w": box})
        assert float(loaded.tensors["model.w"].min()) == 1
        growths[str(size)] = memory.peak_bytes - before
    said.send(growths)
