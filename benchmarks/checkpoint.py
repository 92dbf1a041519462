"""What a checkpoint costs: how long training is held, MB/s of writing and loading; beside torch's own.

    python benchmarks/checkpoint.py [--mebibytes 480] [--repeats 3] [--threads 1] [--directory DIR]

Prints Markdown. All write the same state to the same disk and end with an fsync; all load into tensors that
exist already. Loads are timed with the files out of the page cache (cold) and again in it (warm). CPU is that
of this process while it saves: what training loses on a machine that trains on its processor. Medians of the
repeats; the time that the caller is held the first time stands by itself, as later ones find memory ready.
One torch thread unless told otherwise: where other processes want the cores too, torch's threads wait for
each other after every tensor, and the figures tell of that alone.
"""

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from colossus import checkpoint
from colossus.errors import ColossusError

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Way:
    """One way to checkpoint. `save` returns the seconds the caller was held, and what waits for the rest."""

    name: str
    save: Callable[[State, Path], tuple[float, Callable[[], object]]]
    load: Callable[[State, Path], None]


def make_state(mebibytes: int) -> State:
    """A model and its two moments, in matrices of 4 MiB and a few vectors."""
    state = {}
    for i in range(max(1, mebibytes // 12)):
        for part in ("model", "optimizer.first", "optimizer.second"):
            state[f"{part}.layers.{i}.weight"] = torch.randn(1024, 1024)
            state[f"{part}.layers.{i}.norm"] = torch.randn(1024)
    return state


def ways() -> list[Way]:
    savers: dict[Path, checkpoint.Saver] = {}

    def colossus_save(state: State, path: Path) -> tuple[float, Callable[[], object]]:
        started = time.perf_counter()
        checkpoint.save(path, 1, state, {})
        return time.perf_counter() - started, lambda: None

    def colossus_async(state: State, path: Path) -> tuple[float, Callable[[], object]]:
        saver = savers.setdefault(path.parent, checkpoint.Saver(path))
        saver.directory = path  # one saver, as in a run, so that its memory is used again
        return saver.save(1, state, {}), saver.wait

    def colossus_load(state: State, path: Path) -> None:
        copy_into(state, checkpoint.load(path / "step-00000001").tensors)

    def dcp_save(state: State, path: Path) -> tuple[float, Callable[[], object]]:
        started = time.perf_counter()
        dcp.save(state, checkpoint_id=path)
        return time.perf_counter() - started, lambda: None

    def dcp_async(state: State, path: Path) -> tuple[float, Callable[[], object]]:
        started = time.perf_counter()
        future = dcp.async_save(state, checkpoint_id=path)
        return time.perf_counter() - started, future.result

    def dcp_load(state: State, path: Path) -> None:
        dcp.load(state, checkpoint_id=path)

    def torch_save(state: State, path: Path) -> tuple[float, Callable[[], object]]:
        started = time.perf_counter()
        path.mkdir()
        with (path / "state.pt").open("wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        return time.perf_counter() - started, lambda: None

    def safetensors_save(state: State, path: Path) -> tuple[float, Callable[[], object]]:
        started = time.perf_counter()
        path.mkdir()
        save_file(state, path / "state.safetensors")
        with (path / "state.safetensors").open("rb") as file:
            os.fsync(file.fileno())
        return time.perf_counter() - started, lambda: None

    return [
        Way("colossus `save`", colossus_save, colossus_load),
        Way("colossus `Saver`", colossus_async, colossus_load),
        Way("torch DCP `save`", dcp_save, dcp_load),
        Way("torch DCP `async_save`", dcp_async, dcp_load),
        Way("`torch.save`", torch_save, lambda s, p: copy_into(s, torch.load(p / "state.pt"))),
        Way(
            "`torch.save`, load with `mmap`",
            torch_save,
            lambda s, p: copy_into(s, torch.load(p / "state.pt", mmap=True)),
        ),
        Way("safetensors", safetensors_save, lambda s, p: copy_into(s, load_file(p / "state.safetensors"))),
    ]


def copy_into(state: State, loaded: State) -> None:
    for name, tensor in loaded.items():
        state[name].copy_(tensor)


def drop_from_cache(path: Path) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def notices_a_flipped_bit(way: Way, state: State, path: Path) -> bool:
    """Flip one bit in the middle of the largest file: is it loaded all the same?"""
    file = max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    with file.open("r+b") as handle:
        handle.seek(file.stat().st_size // 2)
        byte = handle.read(1)[0]
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte ^ 16]))
    try:
        way.load(state, path)
    except (ColossusError, RuntimeError, dcp.api.CheckpointException):
        return True
    return False


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(way: Way, state: State, directory: Path, repeats: int) -> str:
    """One line of the table."""
    megabytes = sum(tensor.nbytes for tensor in state.values()) / 1e6
    held, whole, cpu, cold, warm = [], [], [], [], []
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for repeat in range(repeats):
        path = directory / str(repeat)
        os.sync()  # nobody pays for the writes of the one before
        started, cpu_started = time.perf_counter(), time.process_time()
        held_s, wait = way.save(state, path)
        wait()
        whole.append(time.perf_counter() - started)
        cpu.append(time.process_time() - cpu_started)
        held.append(held_s)
        drop_from_cache(path)
        cold.append(seconds(lambda path=path: way.load(target, path)))
        warm.append(seconds(lambda path=path: way.load(target, path)))
        if not all(torch.equal(target[name], tensor) for name, tensor in state.items()):
            raise RuntimeError(f"{way.name} does not give back what it was given")
        if repeat < repeats - 1:
            shutil.rmtree(path)
    noticed = "noticed" if notices_a_flipped_bit(way, target, path) else "loaded"
    shutil.rmtree(path)
    median = statistics.median
    later = median(held[1:]) if len(held) > 1 else held[0]
    return (
        f"| {way.name} | {held[0]:.2f} | {later:.2f} | {megabytes / median(whole):.0f} | {median(cpu):.2f} "
        f"| {megabytes / median(cold):.0f} | {megabytes / median(warm):.0f} | {noticed} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=480)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--threads", type=int, default=1, help="torch's, for every way alike")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = make_state(options.mebibytes)
    num_bytes = sum(tensor.nbytes for tensor in state.values())
    version = torch.__version__
    print(f"{num_bytes / 1e6:.0f} MB in {len(state)} tensors; torch {version}, {os.cpu_count()} cores,")
    load = os.getloadavg()[0]
    print(f"{platform.system()} {platform.release()}; load average {load:.1f} at the start.\n")
    print(
        "| | held, first (s) | held, later (s) | write MB/s | CPU (s) | load cold MB/s "
        "| load warm MB/s "
        "| a flipped bit is |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for way in ways():
        directory = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.directory))
        try:
            print(measure(way, state, directory, options.repeats), flush=True)
        finally:
            shutil.rmtree(directory)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
