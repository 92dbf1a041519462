"""Gathers the facts that the checks judge. Nothing here fails: what cannot be found out is None, with a reason."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from colossus.doctor.checks import Facts, Gpu
from colossus.doctor.disk import disk_rates

CGROUP = Path("/sys/fs/cgroup")
_GPU_FIELDS = (
    "name", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total", "clocks.sm", "clocks.max.sm",
    "persistence_mode",
)  # fmt: skip
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""Why clocks are held down: as newer and as older versions of nvidia-smi call it."""
_THROTTLED_BITS = 0x8 | 0x20 | 0x40 | 0x80
"""Of nvidia-smi's clock event reasons: hardware slowdown, software and hardware thermal slowdown, power brake."""
LOOK_AT_LOAD_S = 0.5
TWO_RANKS_TIMEOUT_S = 120.0


def gather(directory: Path, *, disk: bool = True, ranks: bool = True) -> Facts:
    """All facts of this machine; `directory` is where runs go. `disk` and `ranks` cost seconds each."""
    missing: dict[str, str] = {}
    found: dict[str, Any] = {"python": tuple(sys.version_info[:3]), "not_gathered": missing}
    found |= _torch_facts()
    found |= _gpu_facts()
    found |= _core_facts(missing)
    found |= _memory_facts(missing)
    found |= _disk_facts(directory, disk)
    found |= _clock_facts(missing)
    found |= _limit_facts()
    found |= _network_facts()
    if found["torch"] is None:
        missing["two ranks"] = "needs torch"
    elif ranks:
        found |= two_ranks_facts()
    else:
        missing["two ranks"] = "not tried"
    found["compiler"] = find_compiler()
    found["caches"] = {str(path): _cannot_write(path) for path in _cache_directories()}
    return Facts(**found)


# --- software ---


def _torch_facts() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        here = "not installed" if "No module named 'torch'" in str(error) else f"cannot be loaded: {error}"
        return {"torch": None, "torch_error": here}
    except OSError as error:  # a library of CUDA that is not there
        return {"torch": None, "torch_error": f"cannot be loaded: {error}"}
    available = torch.cuda.is_available()
    nccl = None
    if torch.version.cuda:
        with contextlib.suppress(Exception):
            nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {
        "torch": str(torch.__version__),
        "cuda_build": torch.version.cuda,
        "cuda_available": available,
        "nccl": nccl,
    }


def _gpu_facts() -> dict[str, Any]:
    for reasons in _REASONS:
        query = ",".join((*_GPU_FIELDS, reasons))
        table = _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"])
        if table is not None:
            break
    else:
        return {}
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    banner = _output(["nvidia-smi"]) or ""
    cuda = banner.partition("CUDA Version:")[2].split()[:1]
    return {
        "gpus": tuple(gpu for line in table.splitlines() if (gpu := parse_gpu(line)) is not None),
        "driver": (driver or "unknown").splitlines()[0].strip(),
        "driver_cuda": cuda[0] if cuda else None,
    }


def parse_gpu(line: str) -> Gpu | None:
    """One line of nvidia-smi's table, `_GPU_FIELDS` and a reason between commas.

    What a board does not have is `[N/A]`.
    """
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(_GPU_FIELDS) + 1 or not cells[1].isdigit():
        return None

    def number(text: str) -> int | None:
        try:
            return int(text, 0)
        except ValueError:
            return None

    name, total, used, ecc, clock, most, persistence, reasons = cells
    clock_mhz, most_mhz, bits = number(clock), number(most), number(reasons)
    return Gpu(
        name=name,
        memory_bytes=int(total) << 20,
        used_bytes=(number(used) or 0) << 20,
        ecc_errors=number(ecc),
        clock_hz=None if clock_mhz is None else clock_mhz * 1e6,
        max_clock_hz=None if most_mhz is None else most_mhz * 1e6,
        persistence={"Enabled": True, "Disabled": False}.get(persistence),
        throttled=None if bits is None else bool(bits & _THROTTLED_BITS),
    )


def find_compiler() -> str | None:
    """The one that torch.compile would take: CXX, else g++ or clang++."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)) and (version := _output([path, "--version"])):
            return version.splitlines()[0]
    return None


# --- cores and memory ---


def _core_facts(missing: dict[str, str]) -> dict[str, Any]:
    cores = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return {
        "cores": cores,
        "affinity_cores": affinity,
        "quota_cores": quota_cores(CGROUP),
        "load": _load(missing),
    }


def quota_cores(root: Path) -> float | None:
    """Cores that the container's quota amounts to, by cgroup version 2 or 1; None: no quota."""
    text = _text(root / "cpu.max")
    if text is not None:
        quota, _, period = text.partition(" ")
        return _share(quota, period or "100000")
    for folder in ("cpu", "cpu,cpuacct"):
        quota_text = _text(root / folder / "cpu.cfs_quota_us")
        if quota_text is not None:
            return _share(quota_text, _text(root / folder / "cpu.cfs_period_us") or "100000")
    return None


def _share(quota: str, period: str) -> float | None:
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return share if share > 0 else None


def _load(missing: dict[str, str]) -> float | None:
    """Cores kept busy by others, seen over half a second."""
    try:
        import psutil  # type: ignore[import-untyped, unused-ignore]

        own_s = time.process_time()
        share = psutil.cpu_percent(interval=LOOK_AT_LOAD_S) / 100
        own = (time.process_time() - own_s) / LOOK_AT_LOAD_S
        return max(0.0, share * (psutil.cpu_count() or 1) - own)
    except Exception as error:
        missing["CPU load"] = str(error)
        return None


def memory_limit(root: Path) -> tuple[int | None, int | None]:
    """(limit, used) of the container in bytes, by cgroup version 2 or 1; None: no limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        if (text := _text(root / limit)) is not None:
            used_text = _text(root / used)
            # "max", or with version 1 the largest number of pages that there is, is none.
            size = int(text) if text.isdigit() and int(text) < 2**60 else None
            return size, int(used_text) if used_text and used_text.isdigit() else None
    return None, None


def _memory_facts(missing: dict[str, str]) -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    limit, used = memory_limit(CGROUP)
    swap = 0
    with contextlib.suppress(Exception):  # some containers hide it
        swap = int(psutil.swap_memory().used)
    shared = None
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").free
    else:
        missing["shared memory"] = "this system has no /dev/shm"
    return {
        "memory_bytes": int(memory.total),
        "available_bytes": int(memory.available),
        "limit_bytes": limit,
        "limit_used_bytes": used,
        "swap_used_bytes": swap,
        "shared_memory_bytes": shared,
    }


def _disk_facts(directory: Path, measure: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"disk_directory": str(directory)}
    try:
        # What is not there yet would be made where its nearest parent is.
        place = directory.resolve()
        while not place.exists():
            place = place.parent
        found["disk_free_bytes"] = shutil.disk_usage(place).free
        if measure:
            rates = disk_rates(place)
            found |= {
                "disk_write_bytes_per_s": rates.write_bytes_per_s,
                "disk_read_bytes_per_s": rates.read_bytes_per_s,
            }
    except OSError as error:
        found["disk_error"] = error.strerror or str(error)
    return found


# --- clock and limits ---


def _clock_facts(missing: dict[str, str]) -> dict[str, Any]:
    before = time.monotonic()
    went_back = False
    for _ in range(10_000):
        now = time.monotonic()
        went_back |= now < before
        before = now
    found: dict[str, Any] = {"clock_went_back": went_back}
    if (text := _output(["chronyc", "-c", "tracking"])) is not None:
        synchronised, offset = parse_chrony(text)
        return found | {"clock_synchronised": synchronised, "clock_offset_s": offset}
    if (text := _output(["timedatectl", "show", "--property=NTPSynchronized", "--value"])) is not None:
        return found | {"clock_synchronised": text.strip() == "yes"}
    missing["clock"] = (
        "monotonic; whether it is synchronised cannot be seen: neither chrony nor timedatectl answers"
    )
    return found


def parse_chrony(text: str) -> tuple[bool, float | None]:
    """(synchronised, seconds off) of `chronyc -c tracking`: the 5th value is the offset, the last the leap status."""
    cells = text.strip().split(",")
    try:
        offset = float(cells[4])
    except (IndexError, ValueError):
        offset = None
    return cells[-1].strip() != "Not synchronised", offset


def _limit_facts() -> dict[str, Any]:
    try:
        import resource
    except ImportError:  # not a Unix
        return {}

    def soft(name: str) -> int | None:
        number = getattr(resource, name, None)
        return None if number is None else _endless_is_minus_1(resource.getrlimit(number)[0])

    def _endless_is_minus_1(limit: int) -> int:
        return -1 if limit == resource.RLIM_INFINITY else limit

    infiniband = Path("/sys/class/infiniband")
    pages = _text(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    return {
        "open_files": soft("RLIMIT_NOFILE"),
        "processes": soft("RLIMIT_NPROC"),
        "locked_memory_bytes": soft("RLIMIT_MEMLOCK"),
        "has_rdma": infiniband.is_dir() and any(infiniband.iterdir()),
        "huge_pages": pages.partition("[")[2].partition("]")[0] or None if pages else None,
    }


# --- several processes ---


def _network_facts() -> dict[str, Any]:
    found: dict[str, Any] = {"hostname": socket.gethostname()}
    try:
        with socket.socket() as opened:
            opened.bind(("127.0.0.1", 0))
            opened.listen(1)
    except OSError as error:
        found["port_error"] = error.strerror or str(error)
    try:
        socket.getaddrinfo(found["hostname"], None)
    except OSError as error:
        found["hostname_error"] = error.strerror or str(error)
    return found


_RANK = """
import sys, datetime, torch, torch.distributed as dist
rank, port, timeout = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=timeout))
number = torch.tensor([float(rank + 1)])
dist.all_reduce(number)
dist.destroy_process_group()
sys.exit(0 if number.item() == 3.0 else f"1 + 2 came out as {number.item():g}")
"""


def two_ranks_facts(timeout_s: float = TWO_RANKS_TIMEOUT_S, script: str = _RANK) -> dict[str, Any]:
    """Two processes that meet at a port of this machine and sum a number."""
    with socket.socket() as opened:
        try:
            opened.bind(("127.0.0.1", 0))
        except OSError as error:
            return {"gloo_error": f"no port to meet at: {error.strerror or error}"}
        port = opened.getsockname()[1]
    started = time.perf_counter()
    command = [sys.executable, "-c", script]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(timeout_s / 2)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        for rank in ranks:
            left_s = max(0.1, timeout_s - (time.perf_counter() - started))
            errors = rank.communicate(timeout=left_s)[1]
            if rank.returncode:
                last = errors.strip().splitlines()[-1:] or [f"exit code {rank.returncode}"]
                return {"gloo_error": last[0][:200]}
    except subprocess.TimeoutExpired:
        return {"gloo_error": f"they did not meet within {timeout_s:.0f} s"}
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return {"gloo_s": time.perf_counter() - started}


# --- caches ---


def _cache_directories() -> Iterator[Path]:
    """Where compiled kernels and downloaded tokenizers are kept."""
    yield Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir())
    yield Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def _cannot_write(path: Path) -> str | None:
    """Why nothing can be written there; None where it can. Leaves nothing behind."""
    try:
        while not path.exists():  # would be made when first used
            path = path.parent
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"x")
    except OSError as error:
        return error.strerror or str(error)
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _output(command: Sequence[str], run: Callable[..., Any] = subprocess.run) -> str | None:
    """What a command prints; None where it is missing, fails, or takes longer than 10 s."""
    try:
        done = run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return str(done.stdout) if done.returncode == 0 else None
