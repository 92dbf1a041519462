"""One of the ranks that measure this machine together; writes what it found to a file.

python -m colossus.doctor.rank FOLDER RANK RANKS THREADS full|quick
"""

import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from colossus.doctor import measure
from colossus.trainer.machine import fastest_float32, prepare_process
from colossus.trainer.precision import use_float32_library

QUICK_MATMULS, QUICK_SEQUENCES, QUICK_HEAD_DIMS = measure.MATMULS[:3], (128,), (32,)
QUICK_ELEMENTS, QUICK_MESSAGES = (2**13, 2**15), (2**10, 2**17)


def main(folder: Path, rank: int, num_ranks: int, num_threads: int, quick: bool) -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(rank)
    prepare_process(num_threads)
    if num_ranks > 1:
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=num_ranks)
    try:
        found = measured(kind, num_ranks, quick)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def measured(kind: str, num_ranks: int, quick: bool) -> dict[str, Any]:
    library, _ = fastest_float32(kind)
    if num_ranks > 1:  # all ranks measure one library, the first one's
        names = [library]
        dist.broadcast_object_list(names, 0)
        library = names[0]
    use_float32_library(library)
    records = measure.Records(kind, meet=dist.barrier if num_ranks > 1 else lambda: None)
    if quick:
        records.num_spells, records.spell_s = 3, 0.003
    bandwidth = measure.memory_bytes_per_s(records)
    wide = () if kind == "cpu" or quick else measure.WIDE_MATMULS
    measure.measure_matmuls(records, QUICK_MATMULS if quick else (*measure.MATMULS, *wide))
    measure.measure_attention(
        records,
        QUICK_SEQUENCES if quick else measure.SEQUENCES,
        QUICK_HEAD_DIMS if quick else measure.HEAD_DIMS,
    )
    measure.measure_operations(records, QUICK_ELEMENTS if quick else None)
    if num_ranks > 1:
        measure.measure_collectives(records, QUICK_MESSAGES if quick else measure.MESSAGES)
    found = asdict(records)
    return {
        "memory_bandwidth": bandwidth,
        "float32_library": library,
        "spread": statistics.median(records.spreads),
        **{name: found[name] for name in ("matmuls", "attention", "operations", "collectives")},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "quick")
