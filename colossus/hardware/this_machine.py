"""The machine at hand as a node of one CPU: cores and memory as the system reports them, all rates assumed."""

import os
from functools import cache
from pathlib import Path

from colossus.spec.fleet import Chip, Node

CPU, LAPTOP = "cpu", "laptop"
_FLOPS_PER_CORE = 30e9
_LIMITS_OF_CONTAINERS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@cache
def this_machine() -> Node:
    """One node with one chip, the CPU."""
    cores = _usable_cores()
    chip = Chip(
        name=CPU,
        generation="cpu",
        peak_flops={"float32": cores * _FLOPS_PER_CORE, "bfloat16": cores * _FLOPS_PER_CORE},
        memory_bytes=_memory_bytes(),
        memory_bandwidth=20e9,
        num_cores=cores,
        power_watts=45.0,
        idle_watts=10.0,
        source="assumed: 30 GFLOP/s for each core, 20 GB/s of memory bandwidth, 45 W",
        sources={
            "num_cores": "the cores that this process may run on",
            "memory_bytes": "the system's memory, or what the container may use of it",
        },
        note="`colossus train` measures the matmul rates of its machine before it plans; this entry does not.",
    )
    return Node(
        name=LAPTOP,
        chip=chip,
        num_chips=1,
        scale_up_chips=1,
        scale_up_bandwidth=20e9,
        nic_bandwidth=0.125e9,
        power_watts=65.0,
        source="assumed: 1 Gb/s of network, 65 W at the plug",
    )


def _usable_cores() -> int:
    """A container's or a taskset's, not the whole machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int:
    import psutil  # type: ignore[import-untyped, unused-ignore]

    limits = [int(psutil.virtual_memory().total)]
    for path in _LIMITS_OF_CONTAINERS:
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such hierarchy, or "max"
            continue
    return min(limit for limit in limits if limit > 0)
