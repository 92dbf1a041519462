"""What planning a checkpoint costs as ranks grow: the save and the load without the tensors' bytes.

    python benchmarks/checkpoint_ranks.py [--ranks 16 256 4096 16384] [--directory DIR]

Prints Markdown. Every rank's part of the manifest is made and written as in a real save, with as many hashes as its
bytes would have; only the payloads are left out. Then rank 0 plans as in a run's first save, when it reads all parts,
and as in a later one; and ranks plan a load, under the layout that wrote and under another.

    weak    64 matrices and their two moments, each of 1,024 rows and columns per rank: 805 MB on every rank,
            all ranks in one replica group
    fixed   Llama 3 8B and its two moments in float32, rows over all ranks, in one replica group
    groups  the same over 256 ranks; all others are replicas of these, so they write nothing and load the same shards

Seconds are of one process on this machine's disk with what was written in the page cache; on a shared file system
the bytes and the number of files count. A rank's figures are medians over five ranks, evenly spaced.
"""

import argparse
import math
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import xxhash

from colossus.checkpoint.load_shards import locate, parts_to_read
from colossus.checkpoint.manifest import MANIFEST_NAME, Manifest, read_header
from colossus.checkpoint.part import Part, part_name
from colossus.checkpoint.payload import HASHED_BYTES, TensorType, lay_out
from colossus.checkpoint.pieces import PayloadEntry, Piece
from colossus.checkpoint.save_shards import Planner
from colossus.checkpoint.shard import Box
from colossus.zoo import find

SAMPLED = 5
GROUP_RANKS = 256
HASH = "0" * 32

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Row:
    ranks: int
    part_s: float
    part_bytes: float
    first_s: float
    later_s: float
    index_bytes: int
    load_s: float
    load_bytes: float
    other_s: float
    other_bytes: float
    other_parts: float


def with_moments(shapes: Shapes) -> Shapes:
    moments = {f"optimizer.{name}.{m}": shape for name, shape in shapes.items() for m in ("first", "second")}
    return {**{f"model.{name}": shape for name, shape in shapes.items()}, **moments}


def weak(num_ranks: int) -> Shapes:
    return with_moments({f"layers.{i}.weight": (1024 * num_ranks, 1024) for i in range(64)})


def fixed(_: int) -> Shapes:
    return with_moments({parameter.name: parameter.shape for parameter in find("llama3-8b").parameters()})


def rows(shapes: Shapes, rank: int, num_ranks: int) -> dict[str, Box]:
    """The first dim in equal pieces; the last ones shorter or empty."""
    boxes = {}
    for name, shape in shapes.items():
        length = -(-shape[0] // num_ranks)
        start, end = min(rank * length, shape[0]), min((rank + 1) * length, shape[0])
        boxes[name] = Box(shape, (start, *[0] * (len(shape) - 1)), (end - start, *shape[1:]), torch.float32)
    return boxes


def part_of(rank: int, boxes: dict[str, Box]) -> bytes:
    """A part as a save makes it, the hashes apart."""
    types = {name: TensorType(box.dtype, box.shape) for name, box in boxes.items() if box.num_elements}
    payloads, pieces = {}, {}
    for file, layout in lay_out(types, rank).items():
        digest = xxhash.xxh3_128_hexdigest(layout.header)
        payloads[file] = PayloadEntry(layout.num_bytes, len(layout.header), digest)
        for slot in layout.slots:
            num_chunks = math.ceil(slot.num_bytes / HASHED_BYTES)
            hashes = (HASH,) * num_chunks if num_chunks > 1 else ()
            pieces[slot.name] = Piece(
                boxes[slot.name].offsets, slot.shape, file, slot.start, slot.num_bytes, HASH, hashes
            )
    return Part(1, rank, boxes, payloads, pieces).encode()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def measure(path: Path, shapes: Shapes, num_ranks: int, num_writers: int) -> Row:
    made = []
    for rank in range(num_writers):
        boxes = rows(shapes, rank, num_writers)
        seconds, data = timed(lambda rank=rank, boxes=boxes: part_of(rank, boxes))
        (path / part_name(rank)).write_bytes(data)
        made.append((seconds, len(data)))
    planner = Planner()
    first_s, data = timed(lambda: planner.index(path, num_writers, 1, None, {}))
    later_s, again = timed(lambda: planner.index(path, num_writers, 1, None, {}))
    assert again == data
    (path / MANIFEST_NAME).write_bytes(data)
    sampled = [i * (num_writers - 1) // (SAMPLED - 1) for i in range(SAMPLED)]
    same = [load(path, rows(shapes, rank, num_writers)) for rank in sampled]
    readers = max(1, 3 * num_writers // 4)
    others = [load(path, rows(shapes, rank * readers // num_writers, readers)) for rank in sampled]
    median = statistics.median
    return Row(
        num_ranks,
        median(seconds for seconds, _ in made),
        median(size for _, size in made),
        first_s,
        later_s,
        len(data),
        median(seconds for seconds, _, _ in same),
        median(size for _, size, _ in same),
        median(seconds for seconds, _, _ in others),
        median(size for _, size, _ in others),
        median(parts for _, _, parts in others),
    )


def load(path: Path, wanted: dict[str, Box]) -> tuple[float, int, int]:
    """Seconds, bytes read and parts read to find where all of the boxes lie."""

    def plan() -> object:
        return locate(path, read_header(path), wanted)

    seconds, _ = timed(plan)
    index = read_header(path)
    assert not isinstance(index, Manifest)
    parts = parts_to_read(index, wanted)
    num_bytes = sum(index.parts[rank].num_bytes for rank in parts)
    return seconds, num_bytes + (path / MANIFEST_NAME).stat().st_size, len(parts)


def show(row: Row) -> str:
    return (
        f"| {row.ranks:,} | {1e3 * row.part_s:.1f} | {row.part_bytes / 1e3:.0f} | {row.first_s:.2f} | "
        f"{row.later_s:.2f} | {row.index_bytes / 1e3:,.0f} | {1e3 * row.load_s:.0f} | {row.load_bytes / 1e3:,.0f} | "
        f"{1e3 * row.other_s:.0f} | {row.other_bytes / 1e3:,.0f} | {row.other_parts:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 256, 4096, 16384])
    parser.add_argument("--directory", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{date.today()}. {platform.processor() or platform.machine()}, Python {platform.python_version()}.\n"
    )
    scenarios: dict[str, tuple[Callable[[int], Shapes], int | None]] = {
        "weak": (weak, None),
        "fixed": (fixed, None),
        "groups": (fixed, GROUP_RANKS),
    }
    for name, (shapes, group) in scenarios.items():
        print(
            f"\n### {name}\n\n| ranks | part ms | part kB | rank 0 first s | rank 0 later s | index kB | load ms | "
            "load kB | other layout ms | other layout kB | other layout parts |\n|" + "---|" * 11
        )
        for num_ranks in options.ranks:
            path = Path(tempfile.mkdtemp(dir=options.directory))
            try:
                num_writers = min(num_ranks, group or num_ranks)
                print(show(measure(path, shapes(num_writers), num_ranks, num_writers)), flush=True)
            finally:
                shutil.rmtree(path)


if __name__ == "__main__":
    main()
