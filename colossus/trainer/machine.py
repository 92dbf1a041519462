"""The machine at hand, measured; and the process made ready to train on it."""

import ctypes
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from colossus.models import build, chunked_cross_entropy
from colossus.optim import gradient_norm, optimizers_of
from colossus.spec.base import fingerprint
from colossus.spec.model import AttentionSpec, Dtype, MlpSpec, ModelSpec, NgramSpec, RecallSpec
from colossus.spec.rank import Float32Library, Machine
from colossus.spec.run import Muon, RunConfig
from colossus.trainer.precision import DTYPES, float32_libraries, use_float32_library


def usable_cores() -> int:
    """Cores that this process may run on; a container's or a taskset's, not the whole machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_process(num_threads: int | None) -> None:
    """Threads, and an allocator that keeps what a step frees.

    glibc gives large blocks back to the system at every free, and takes them again, zeroed page by page, a moment
    later; a training step asks for the same blocks every time, so keeping them saves up to half of its time.
    """
    torch.set_num_threads(num_threads or usable_cores())
    release_memory()  # what preparing a corpus has left
    if libc := _glibc():
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def rank_environment(kind: str) -> dict[str, str]:
    """What the environment of a rank must say before it starts, for its allocator: nothing where it computes on a GPU,
    and what is said already stays.

    Torch asks glibc for aligned blocks, which leaves a few bytes before and after each. Threads keep such slivers for
    themselves (tcache), and whatever small object gets one keeps a freed block apart from its neighbours: then it is a
    little too small for the next block of the same size. Sharding takes and frees gigabytes a step in such blocks, from
    several threads: a rank of 57 million weights was seen to grow from 1.3 to 5 GB, and to spend a third of its time on
    new pages. Without those stocks, and with one heap for all threads, freed blocks grow together again.
    """
    if kind != "cpu" or _TUNABLES in os.environ:
        return {}
    return {_TUNABLES: "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1"}


_TUNABLES = "GLIBC_TUNABLES"


def release_memory() -> None:
    """Gives freed memory, which `prepare_process` makes the allocator keep, back to the system."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """None where there is another C library, whose allocator has other habits."""
    try:
        return ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    except OSError:
        return None


def peak_rss_bytes() -> int:
    """The most memory that this process has held."""
    try:
        # Not getrusage, whose figure is that of the parent at first, where a process was made by fork and exec.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def peak_memory_bytes(kind: str) -> int:
    """The most memory held where the model is: in torch's tensors on a GPU, by the whole process on a CPU."""
    return torch.cuda.max_memory_allocated() if kind == "cuda" else peak_rss_bytes()


def device_kind() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure_machine(config: RunConfig) -> Machine:
    """What the planner needs to know; takes about half a second beside what training has to load anyway."""
    kind = device_kind()
    library, float32_flops = fastest_float32(kind)
    rates: dict[Dtype, float] = {
        "float32": float32_flops,
        "bfloat16": matmul_flops(torch.bfloat16, kind),
    }
    rehearse(kind)
    release_memory()
    return Machine(
        chip=torch.cuda.get_device_name() if kind == "cuda" else cpu_name(),
        kind=kind,
        num_threads=torch.get_num_threads(),
        memory_bytes=_memory_bytes(kind),
        baseline_bytes=psutil.Process().memory_info().rss,
        matmul_flops=rates,
        float32_library=library,
        compiled_before=compile_marker(config).exists(),
    )


def rehearse(kind: str) -> None:
    """One step of a model of next to nothing: loads the code that any step runs, so that its memory can be seen.

    Torch imports its compiler when the first optimizer is made, and the pages of its libraries come in as they are
    first used: some 100 MB together, which belong to no model.
    """
    spec = ModelSpec(
        name="rehearsal",
        vocab_size=64,
        context_tokens=32,
        num_layers=1,
        hidden_size=32,
        attention=AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=16, qk_norm=True),
        mlp=MlpSpec(intermediate_size=64, activation="squared_relu"),
        ngrams=NgramSpec(num_rows=64),
        recall=RecallSpec(),
    )
    model = build(spec, seed=0, device=kind)
    optimizers = optimizers_of(model, spec, Muon())
    tokens = torch.zeros(2, 32, dtype=torch.long, device=kind)
    for dtype in DTYPES.values():
        hidden = model(tokens, dtype=dtype).flatten(0, 1)
        chunked_cross_entropy(hidden, model.head_weight, tokens.flatten(), chunk_tokens=64)[0].backward()
        gradient_norm(model)
        for optimizer in optimizers:
            optimizer.step()


def fastest_float32(kind: str) -> tuple[Float32Library, float]:
    """The library that is fastest at float32 matmuls, and its FLOP/s."""
    rates: dict[Float32Library, float] = {}
    for library in float32_libraries() if kind == "cpu" else ("default",):
        use_float32_library(library)
        rates[library] = matmul_flops(torch.float32, kind)
    use_float32_library("default")
    # oneDNN must be clearly faster: two measurements of one library differ by a few percent.
    best: Float32Library = "onednn" if rates.get("onednn", 0) > 1.05 * rates["default"] else "default"
    return best, rates[best]


def matmul_flops(dtype: torch.dtype, kind: str) -> float:
    """FLOP/s of a square matmul: the best of three spells."""
    size = 8192 if kind == "cuda" else 768
    a, b = (torch.randn(size, size, dtype=dtype, device=kind) for _ in range(2))
    return 2 * size**3 / min(spells(lambda: a @ b, kind, num_spells=3))


def spells(run: Callable[[], object], kind: str, *, num_spells: int, spell_s: float = 0.05) -> list[float]:
    """Seconds that `run` takes, measured `num_spells` times, each over as many calls as fill some `spell_s`.

    On a CPU a spell is timed by the CPU time of its threads, so that what else runs on the machine does not count;
    the system may count that in ticks of milliseconds, so one short call alone would be too short to time.
    """

    def spell(count: int) -> float:
        if kind == "cuda":
            torch.cuda.synchronize()
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        for _ in range(count):
            run()
        if kind == "cuda":
            torch.cuda.synchronize()
            return (time.perf_counter() - wall_s) / count
        return (time.process_time() - cpu_s) / count / torch.get_num_threads()

    spell(1)
    count = max(2, round(spell_s / max(spell(2), 1e-6)))
    return [spell(count) for _ in range(num_spells)]


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    limits = [psutil.virtual_memory().total]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such hierarchy, or "max"
            continue
    return min(limits)


def compile_marker(config: RunConfig) -> Path:
    """A file that exists once kernels for this model and batch have been compiled on this machine."""
    import getpass
    import tempfile

    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(
        Path(tempfile.gettempdir()) / f"torchinductor_{user}"
    )
    model = config.model.model_dump(mode="json", exclude={"name"})
    key = fingerprint([model, config.batch.model_dump(), torch.__version__, torch.get_num_threads()])
    return Path(cache) / "colossus" / key
