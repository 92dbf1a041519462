"""What is fit for training on this machine and what is not: pure functions of the facts that were gathered.

Each check takes `Facts` and gives a `Check`: a status, what was found, and for anything but ok a sentence of what to
do. A fact that could not be had is None, and its check says so; `not_gathered` says why.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from colossus.units import format_bytes

Status = Literal["ok", "warning", "problem", "skipped"]
LEAST_PYTHON, LEAST_TORCH = (3, 11), (2, 11)
LEAST_FREE_MEMORY_BYTES = 2 << 30
"""Interpreter, torch and a small model."""
LEAST_SHARED_MEMORY_BYTES = 256 << 20
"""NCCL and gloo exchange through it some MB for each peer."""
LEAST_FREE_DISK_BYTES, FEW_FREE_DISK_BYTES = 1 << 30, 10 << 30
SLOW_DISK_BYTES_PER_S = 50e6
"""A checkpoint of a billion parameters, 14 GB, would take five minutes."""
LEAST_OPEN_FILES, FEW_OPEN_FILES = 1024, 4096
LEAST_PROCESSES = 1024
CLOCK_OFFSET_S = 0.5
"""Beyond this, events of two nodes stand in the wrong order in one log."""


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi; None where the board does not say."""

    name: str
    memory_bytes: int
    used_bytes: int
    ecc_errors: int | None
    clock_hz: float | None
    max_clock_hz: float | None
    persistence: bool | None
    throttled: bool | None


@dataclass(frozen=True)
class Facts:
    """What was found on a machine. None: could not be found out, or is not there."""

    python: tuple[int, int, int]
    torch: str | None
    torch_error: str | None = None
    cuda_build: str | None = None
    """CUDA version that torch is built for; None: a build for CPUs."""
    cuda_available: bool = False
    nccl: str | None = None
    driver: str | None = None
    driver_cuda: str | None = None
    """Newest CUDA version that the driver runs."""
    gpus: tuple[Gpu, ...] = ()
    cores: int = 1
    """Of the whole machine."""
    affinity_cores: int = 1
    """That this process may run on."""
    quota_cores: float | None = None
    """That the container's quota amounts to; None: no quota."""
    load: float | None = None
    """Cores that other programs kept busy just now."""
    memory_bytes: int = 0
    available_bytes: int = 0
    limit_bytes: int | None = None
    """The container's limit on memory."""
    limit_used_bytes: int | None = None
    swap_used_bytes: int = 0
    shared_memory_bytes: int | None = None
    disk_directory: str = ""
    disk_free_bytes: int | None = None
    disk_error: str | None = None
    disk_write_bytes_per_s: float | None = None
    disk_read_bytes_per_s: float | None = None
    clock_went_back: bool = False
    clock_synchronised: bool | None = None
    clock_offset_s: float | None = None
    open_files: int | None = None
    """Limits of this process; None: not known, -1: none."""
    processes: int | None = None
    locked_memory_bytes: int | None = None
    has_rdma: bool = False
    huge_pages: str | None = None
    """always, madvise or never"""
    port_error: str | None = None
    hostname: str = ""
    hostname_error: str | None = None
    gloo_error: str | None = None
    gloo_s: float | None = None
    """Seconds in which two ranks met and summed; None: not tried."""
    compiler: str | None = None
    """Name and version of the C++ compiler that torch.compile would use."""
    caches: Mapping[str, str | None] = field(default_factory=dict)
    """By directory: why it cannot be written, or None."""
    not_gathered: Mapping[str, str] = field(default_factory=dict)
    """By check: why its facts could not be had."""


@dataclass(frozen=True)
class Check:
    name: str
    status: Status
    found: str
    advice: str = ""
    """What to do, a sentence; empty where all is well."""


def check_all(facts: Facts) -> list[Check]:
    """All checks, in the order in which they matter; those of a kind of machine that this is not are left "
    "out."""
    return [check for one in CHECKS if (check := one(facts)) is not None]


def usable_cores(facts: Facts) -> float:
    """Cores that this process can keep busy: the fewest of machine, affinity and quota."""
    return min(facts.cores, facts.affinity_cores, facts.quota_cores or facts.cores)


# --- software ---


def python(facts: Facts) -> Check:
    found = ".".join(map(str, facts.python))
    if facts.python[:2] < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        return Check("Python", "problem", found, f"Install Python {least} or later.")
    return Check("Python", "ok", found)


def torch(facts: Facts) -> Check:
    least = ".".join(map(str, LEAST_TORCH))
    if facts.torch is None:
        return Check(
            "torch", "problem", facts.torch_error or "not installed",
            f"Install torch {least} or later (pip install torch); planning works without, training does not.",
        )  # fmt: skip
    if _version(facts.torch)[:2] < LEAST_TORCH:
        return Check(
            "torch", "problem", facts.torch, f"Install torch {least} or later: pip install -U torch."
        )
    return Check("torch", "ok", facts.torch)


def cuda(facts: Facts) -> Check | None:
    if facts.torch is None:
        return None
    build = f"torch for CUDA {facts.cuda_build}" if facts.cuda_build else "torch for CPUs"
    driver = (
        f"driver {facts.driver} (CUDA up to {facts.driver_cuda or 'unknown'})"
        if facts.driver
        else "no driver"
    )
    seen = "them" if facts.cuda_available else "none"
    found = f"{build}, {driver}, {len(facts.gpus)} GPUs by nvidia-smi, torch sees {seen}"
    if not facts.driver and not facts.cuda_build:
        return Check("CUDA", "ok", "none, and torch is built for CPUs: this machine trains on its CPU")
    if facts.gpus and not facts.cuda_build:
        return Check(
            "CUDA",
            "problem",
            found,
            "Install a torch built for CUDA: GPUs are here, and this one is for CPUs.",
        )
    if facts.cuda_build and not facts.gpus and not facts.cuda_available:
        return Check(
            "CUDA", "warning", found,
            "Training will run on the CPU. If this machine has GPUs, install NVIDIA's driver, or give the "
            "container access to them.",
        )  # fmt: skip
    if (
        facts.driver_cuda
        and facts.cuda_build
        and _version(facts.cuda_build)[:1] > _version(facts.driver_cuda)[:1]
    ):
        return Check(
            "CUDA", "problem", found,
            f"Update the driver to one for CUDA {facts.cuda_build}, or install a torch built for CUDA "
            f"{facts.driver_cuda}.",
        )  # fmt: skip
    if facts.gpus and not facts.cuda_available:
        return Check(
            "CUDA", "problem", found,
            "torch cannot use the GPUs: look at CUDA_VISIBLE_DEVICES, and whether the driver was updated "
            "without a reboot.",
        )  # fmt: skip
    return Check("CUDA", "ok", found)


def nccl(facts: Facts) -> Check | None:
    if not facts.cuda_build:
        return None
    if facts.nccl is None:
        return Check(
            "NCCL",
            "problem",
            "missing",
            "Install a torch with NCCL: several GPUs cannot exchange without it.",
        )
    return Check("NCCL", "ok", facts.nccl)


def gpus(facts: Facts) -> Check | None:
    if not facts.gpus:
        return None
    names = ", ".join(sorted({gpu.name for gpu in facts.gpus}))
    found = f"{len(facts.gpus)} × {names}, {format_bytes(min(g.memory_bytes for g in facts.gpus))} each"
    if wrong := [i for i, gpu in enumerate(facts.gpus) if gpu.ecc_errors]:
        return Check(
            "GPUs", "problem", f"{found}; uncorrected ECC errors on {_list(wrong)}",
            "Their memory fails: drain this node, reset the GPUs, and have them replaced if errors come "
            "again.",
        )  # fmt: skip
    if full := [i for i, gpu in enumerate(facts.gpus) if gpu.used_bytes > 0.1 * gpu.memory_bytes]:
        return Check(
            "GPUs", "warning", f"{found}; memory in use on {_list(full)}",
            "Something else uses these GPUs; see who with nvidia-smi, and end it before training.",
        )  # fmt: skip
    if slow := [i for i, gpu in enumerate(facts.gpus) if gpu.throttled]:
        return Check(
            "GPUs", "warning", f"{found}; clocks held down by heat or power on {_list(slow)}",
            "One slow GPU slows all: look at cooling and the power limit (nvidia-smi -q -d PERFORMANCE).",
        )  # fmt: skip
    if off := [i for i, gpu in enumerate(facts.gpus) if gpu.persistence is False]:
        return Check(
            "GPUs", "warning", f"{found}; persistence mode is off on {_list(off)}",
            "Switch it on (nvidia-smi -pm 1), or every start waits for the driver.",
        )  # fmt: skip
    return Check("GPUs", "ok", found)


# --- cores and memory ---


def cores(facts: Facts) -> Check:
    usable = usable_cores(facts)
    quota = "none" if facts.quota_cores is None else f"{facts.quota_cores:g}"
    found = f"{usable:g} usable (machine {facts.cores}, affinity {facts.affinity_cores}, quota {quota})"
    if facts.quota_cores is not None and facts.quota_cores < 0.99 * facts.affinity_cores:
        threads = max(1, int(facts.quota_cores))
        return Check(
            "CPU cores", "warning", found,
            f"The container may use {facts.quota_cores:g} cores but sees {facts.affinity_cores}: threads "
            "beyond its quota are "
            f"stopped again and again. Train with --threads {threads}, or raise the quota.",
        )  # fmt: skip
    return Check("CPU cores", "ok", found)


def load(facts: Facts) -> Check:
    if facts.load is None:
        return _skipped("CPU load", facts)
    found = f"other programs keep {facts.load:.1f} of {facts.cores} cores busy"
    if facts.load > 0.25 * facts.cores:
        return Check(
            "CPU load", "warning", found,
            "Ranks wait for the slowest of them: end what else runs here, or train with fewer --threads.",
        )  # fmt: skip
    return Check("CPU load", "ok", found)


def memory(facts: Facts) -> Check:
    free, limit = facts.available_bytes, "no limit by a container"
    if facts.limit_bytes is not None and facts.limit_bytes < facts.memory_bytes:
        free = min(free, max(0, facts.limit_bytes - (facts.limit_used_bytes or 0)))
        limit = f"container's limit {format_bytes(facts.limit_bytes)}"
    found = f"{format_bytes(free)} free of {format_bytes(facts.memory_bytes)}, {limit}"
    if free < LEAST_FREE_MEMORY_BYTES:
        return Check(
            "memory", "problem", found,
            f"Training takes at least {format_bytes(LEAST_FREE_MEMORY_BYTES)}: end other programs, or raise "
            "the container's limit.",
        )  # fmt: skip
    return Check("memory", "ok", found)


def swap(facts: Facts) -> Check:
    found = f"{format_bytes(facts.swap_used_bytes)} in use"
    if facts.swap_used_bytes > 0.02 * facts.memory_bytes:
        return Check(
            "swap",
            "warning",
            found,
            "Memory has run out here before: end what fills it; a step that swaps takes minutes.",
        )
    return Check("swap", "ok", found)


def shared_memory(facts: Facts) -> Check:
    if facts.shared_memory_bytes is None:
        return _skipped("shared memory", facts)
    found = f"{format_bytes(facts.shared_memory_bytes)} free in /dev/shm"
    if facts.shared_memory_bytes < LEAST_SHARED_MEMORY_BYTES:
        return Check(
            "shared memory", "problem" if facts.gpus else "warning", found,
            "Start the container with --shm-size=8g (docker), or mount a memory-backed emptyDir at "
            "/dev/shm (Kubernetes).",
        )  # fmt: skip
    return Check("shared memory", "ok", found)


def disk(facts: Facts) -> Check:
    where = f"in {facts.disk_directory}"
    if facts.disk_error is not None:
        return Check(
            "disk", "problem", f"{where}: {facts.disk_error}",
            "Runs are written there: name a directory that can be written with --directory, and train with "
            "--runs.",
        )  # fmt: skip
    if facts.disk_free_bytes is None:
        return _skipped("disk", facts)
    found = f"{format_bytes(facts.disk_free_bytes)} free {where}"
    if facts.disk_write_bytes_per_s and facts.disk_read_bytes_per_s:
        write, read = facts.disk_write_bytes_per_s / 1e6, facts.disk_read_bytes_per_s / 1e6
        found += f", writes {write:,.0f} MB/s, reads {read:,.0f} MB/s"
    if facts.disk_free_bytes < LEAST_FREE_DISK_BYTES:
        return Check("disk", "problem", found, "Free some space, or keep runs on another disk (--runs).")
    if facts.disk_free_bytes < FEW_FREE_DISK_BYTES:
        return Check(
            "disk",
            "warning",
            found,
            "A checkpoint takes 14 bytes for each parameter: a billion of them fill what is left.",
        )
    if facts.disk_write_bytes_per_s and facts.disk_write_bytes_per_s < SLOW_DISK_BYTES_PER_S:
        return Check(
            "disk",
            "warning",
            found,
            "Checkpoints will be slow: keep runs on a faster disk (--runs), or save less often.",
        )
    return Check("disk", "ok", found)


# --- clock and limits ---


def clock(facts: Facts) -> Check:
    if facts.clock_went_back:
        return Check(
            "clock", "problem", "the monotonic clock went back",
            "Step times cannot be measured on this machine: update its kernel or its hypervisor.",
        )  # fmt: skip
    if facts.clock_synchronised is None and facts.clock_offset_s is None:
        return _skipped("clock", facts)
    offset = "" if facts.clock_offset_s is None else f", {abs(facts.clock_offset_s) * 1e3:.1f} ms off"
    state = "synchronised" if facts.clock_synchronised else "not synchronised"
    if not facts.clock_synchronised or abs(facts.clock_offset_s or 0.0) > CLOCK_OFFSET_S:
        return Check(
            "clock", "warning", state + offset,
            "Switch on NTP (timedatectl set-ntp true): logs of several nodes are put in order by their "
            "clocks.",
        )  # fmt: skip
    return Check("clock", "ok", state + offset)


def open_files(facts: Facts) -> Check:
    if facts.open_files is None:
        return _skipped("open files", facts)
    found = _limit(facts.open_files)
    if 0 <= facts.open_files < LEAST_OPEN_FILES:
        return Check(
            "open files", "problem", found, f"Raise the limit: ulimit -n {FEW_OPEN_FILES} before starting."
        )
    if 0 <= facts.open_files < FEW_OPEN_FILES:
        return Check(
            "open files", "warning", found,
            "Enough for one node; for many ranks and data in many files raise it: ulimit -n "
            f"{16 * FEW_OPEN_FILES}.",
        )  # fmt: skip
    return Check("open files", "ok", found)


def processes(facts: Facts) -> Check:
    if facts.processes is None:
        return _skipped("user processes", facts)
    found = _limit(facts.processes)
    if 0 <= facts.processes < LEAST_PROCESSES:
        return Check(
            "user processes", "warning", found,
            "Ranks, their threads and readers of data count: raise it, ulimit -u 8192, or the container's "
            "pids limit.",
        )  # fmt: skip
    return Check("user processes", "ok", found)


def locked_memory(facts: Facts) -> Check:
    if facts.locked_memory_bytes is None:
        return _skipped("locked memory", facts)
    limited = facts.locked_memory_bytes >= 0
    found = format_bytes(facts.locked_memory_bytes) if limited else "no limit"
    if limited and facts.has_rdma:
        return Check(
            "locked memory", "problem", found,
            "RDMA registers buffers as locked memory: set ulimit -l unlimited (docker: --ulimit memlock=-1).",
        )  # fmt: skip
    return Check("locked memory", "ok", f"{found}{'' if facts.has_rdma else '; no RDMA device needs it'}")


def huge_pages(facts: Facts) -> Check:
    if facts.huge_pages is None:
        return _skipped("huge pages", facts)
    if facts.huge_pages == "never":
        return Check(
            "huge pages", "warning", "never",
            "Large tensors cost more page faults: echo madvise > "
            "/sys/kernel/mm/transparent_hugepage/enabled (as root).",
        )  # fmt: skip
    return Check("huge pages", "ok", facts.huge_pages)


# --- several processes ---


def rendezvous(facts: Facts) -> Check:
    name = facts.hostname
    if facts.port_error is not None:
        return Check(
            "rendezvous", "problem", f"no port on localhost: {facts.port_error}",
            "Ranks meet at a port of this machine: look at the loopback interface (ip link set lo up) and "
            "at firewalls.",
        )  # fmt: skip
    if facts.hostname_error is not None:
        return Check(
            "rendezvous", "warning", f"a port can be bound, but {name!r} does not resolve: "
            f"{facts.hostname_error}",
            f"Ranks of other nodes look for this one by name: add {name} to /etc/hosts, or to the DNS.",
        )  # fmt: skip
    return Check("rendezvous", "ok", f"a port can be bound, {name} resolves")


def two_ranks(facts: Facts) -> Check:
    if facts.gloo_error is not None:
        return Check(
            "two ranks", "problem", facts.gloo_error,
            "Processes of this machine cannot exchange by gloo: set GLOO_SOCKET_IFNAME=lo, and look at "
            "firewalls.",
        )  # fmt: skip
    if facts.gloo_s is None:
        return _skipped("two ranks", facts)
    return Check(
        "two ranks", "ok", f"two processes met and summed with gloo, {facts.gloo_s:.1f} s with starting them"
    )


def compiler(facts: Facts) -> Check:
    if facts.compiler is None:
        return Check(
            "C++ compiler", "warning", "none found",
            "torch.compile needs one on a CPU: install g++ (or set CXX); without it, train with --set "
            "fixed.compile=false.",
        )  # fmt: skip
    return Check("C++ compiler", "ok", facts.compiler)


def caches(facts: Facts) -> Check:
    wrong = {path: why for path, why in facts.caches.items() if why is not None}
    if wrong:
        return Check(
            "caches", "warning", "; ".join(f"{path}: {why}" for path, why in wrong.items()),
            "Compiled kernels and downloads will not be kept: set TORCHINDUCTOR_CACHE_DIR and HF_HOME to "
            "directories that can "
            "be written.",
        )  # fmt: skip
    return Check("caches", "ok", f"can be written: {', '.join(facts.caches) or 'none asked'}")


CHECKS: tuple[Callable[[Facts], Check | None], ...] = (
    python, torch, cuda, nccl, gpus, cores, load, memory, swap, shared_memory, disk, clock, open_files, processes,
    locked_memory, huge_pages, rendezvous, two_ranks, compiler, caches,
)  # fmt: skip


def _skipped(name: str, facts: Facts) -> Check:
    return Check(name, "skipped", facts.not_gathered.get(name, "cannot be found out on this system"))


def _limit(count: int) -> str:
    return "no limit" if count < 0 else f"at most {count:,}"


def _list(indices: list[int]) -> str:
    return ", ".join(f"GPU {i}" for i in indices)


def _version(text: str) -> tuple[int, ...]:
    """`"2.13.0+cpu"` → `(2, 13, 0)`."""
    parts = []
    for part in text.partition("+")[0].split("."):
        digits = "".join(one for one in part if one.isdigit())
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)
