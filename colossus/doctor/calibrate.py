"""All ranks of this machine at work at the same time, measured; and what they found as one fleet."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from colossus.doctor.disk import disk_rates
from colossus.errors import ColossusError, ConfigError
from colossus.planner.estimate.measured import law_errors
from colossus.spec.fleet import Generation
from colossus.spec.measured import MeasuredMatmul, Product
from colossus.trainer.machine import device_kind, rank_environment, usable_cores

TIMEOUT_S = 1800.0


def measure_ranks(num_ranks: int, num_threads: int, *, quick: bool = False) -> dict[str, Any]:
    """What `num_ranks` processes of `num_threads` threads measure, each number the median over ranks."""
    with tempfile.TemporaryDirectory(prefix="colossus-doctor-") as folder:
        environment = {
            **os.environ,
            **rank_environment(device_kind()),
            "OMP_NUM_THREADS": str(num_threads),
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "colossus.doctor.rank", folder, str(rank), str(num_ranks),
                 str(num_threads), "quick" if quick else "full"],
                env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(num_ranks)
        ]  # fmt: skip
        try:
            for rank, process in enumerate(ranks):
                _, errors = process.communicate(timeout=TIMEOUT_S)
                if process.returncode:
                    last = errors.strip().splitlines()[-1:] or ["it said nothing"]
                    raise ColossusError(
                        f"measuring failed on rank {rank} of {num_ranks} (exit code {process.returncode}): {last[0]}; "
                        "`colossus doctor` tells what may be wrong with this machine"
                    )
        except subprocess.TimeoutExpired:
            raise ColossusError(
                f"measuring did not end within {TIMEOUT_S / 60:.0f} minutes; other programs may use the machine"
            ) from None
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    return merged(found)


def merged(found: Sequence[Any]) -> Any:
    """Like values from each rank as one: medians of their numbers. What is no time is the same for all."""
    first = found[0]
    if isinstance(first, dict):
        return {key: merged([one[key] for one in found]) for key in first}
    if isinstance(first, list):
        return [merged(items) for items in zip(*found, strict=True)]
    return statistics.median(found) if isinstance(first, float) else first


def default_ranks() -> int:
    """Two processes, where there are cores for two; a GPU each where there are GPUs."""
    import torch

    return torch.cuda.device_count() or min(2, usable_cores())


def threads_of(num_ranks: int) -> int:
    return max(1, usable_cores() // num_ranks)


def checked_ranks(asked: int | None) -> int:
    """Raises ConfigError where there are fewer cores, or GPUs, than ranks are asked for."""
    import torch

    most, what = (
        (torch.cuda.device_count(), "GPUs") if torch.cuda.is_available() else (usable_cores(), "cores")
    )
    if asked is not None and asked > most:
        raise ConfigError(
            f"{asked} ranks do not fit this machine, which has {most} {what}; ask for {most} at most"
        )
    return asked or default_ranks()


def disk_of(directory: Path) -> tuple[float, float] | None:
    """Bytes/s written and read where runs go; None where nothing can be written."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.resolve().parent
    try:
        rates = disk_rates(directory)
    except OSError:
        return None
    return rates.write_bytes_per_s, rates.read_bytes_per_s


_GENERATIONS: dict[int, Generation] = {7: "volta", 8: "ampere", 9: "hopper", 10: "blackwell", 12: "blackwell"}
"""By CUDA's major compute capability."""


def device_facts(source: str) -> dict[str, Any] | None:
    """Fields of the chip that a GPU reports of itself; None on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(0)
    ada = (device.major, device.minor) == (8, 9)
    return {
        "generation": "ada" if ada else _GENERATIONS.get(device.major, "hopper"),
        "memory_bytes": device.total_memory,
        "num_cores": device.multi_processor_count,
        "power_watts": 700.0,
        "idle_watts": 100.0,
        "sources": {
            "memory_bytes": "as the device reports it",
            "num_cores": "as the device reports it",
            "power_watts": "assumed: set it to the board's limit (nvidia-smi -q -d POWER)",
            "idle_watts": "assumed",
        },
    }


def summary(found: dict[str, Any]) -> dict[str, float | str]:
    """A few of the measured numbers, for people, and how well the matmuls follow their law."""
    shown: dict[str, float | str] = {"float32 matmuls by": found["float32_library"]}
    points = [MeasuredMatmul.model_validate(point) for point in found["matmuls"]]
    for dtype in dict.fromkeys(point.dtype for point in points):
        own = [point for point in points if point.dtype == dtype]
        rates = [point.flops / point.seconds / 1e9 for point in own]
        shown[f"{dtype} matmuls, GFLOP/s"] = f"{min(rates):,.0f} to {max(rates):,.0f}"
        errors = [
            abs(error)
            for product in get_args(Product)
            for error in law_errors([point for point in own if point.product == product])
        ]
        shown[f"{dtype} matmuls, error of their law"] = (
            f"{statistics.median(errors):.1%} median, {max(errors):.0%} worst"
        )
        for curve in found["attention"]:
            if (curve["dtype"], curve["head_dim"]) == (dtype, 64):
                heads, sequence = curve["sizes"][-1], curve["sequence_tokens"]
                took = curve["seconds"][-1] + curve["backward_seconds"][-1]
                rate = 12 * heads * sequence**2 * 64 / took / 1e9
                shown[f"{dtype} attention of {sequence} tokens, GFLOP/s of the whole square"] = f"{rate:,.0f}"
    shown["memory, GB/s (triad)"] = found["memory_bandwidth"] / 1e9
    for curve in found["collectives"]:
        rate = curve["sizes"][-1] / curve["seconds"][-1] / 1e9
        shown[f"{curve['kind']} ({curve['backend']}), ms at the least and GB/s at the most"] = (
            f"{min(curve['seconds']) * 1e3:.2f}, {rate:.2f}"
        )
    shown["spread of repetitions"] = f"{found['spread']:.1%}"
    return shown
