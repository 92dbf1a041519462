"""What is measured of the machine, and of this process."""

import resource
import subprocess
import sys

import pytest

from colossus.spec.rank import Machine
from colossus.trainer.machine import (
    measure_machine,
    peak_rss_bytes,
    rank_environment,
    release_memory,
    usable_cores,
)
from tests.spec.configs import small_config


def test_the_machine_is_measured() -> None:
    machine = measure_machine(small_config())
    assert Machine.model_validate(machine.model_dump()) == machine
    assert machine.num_threads <= usable_cores()
    assert 100e6 < machine.baseline_bytes < machine.memory_bytes
    assert min(machine.matmul_flops.values()) > 1e8


def test_the_peak_is_this_processs_own() -> None:
    """A process made by one that holds much memory does not inherit its figure."""
    ballast = bytearray(b"1") * (400 << 20)
    script = "from colossus.trainer.machine import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert int(done.stdout) < own - 200e6
    assert peak_rss_bytes() >= len(ballast)


def test_freed_memory_goes_back() -> None:
    before = peak_rss_bytes()
    release_memory()
    # A peak does not fall, beyond what the kernel rounds; and the call is harmless anywhere.
    assert peak_rss_bytes() == pytest.approx(before, rel=1e-3)


def test_a_rank_keeps_what_is_said_to_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert "tcache_count=0" in rank_environment("cpu")["GLIBC_TUNABLES"]
    assert rank_environment("cuda") == {}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert rank_environment("cpu") == {}
