"""What is measured of the machine, and of this process."""

import os
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


CHURN = """
import threading, torch
from colossus.trainer.machine import peak_rss_bytes, prepare_process

prepare_process(1)
kept, small = [], []

def step():
    # As sharding does: blocks of a few sizes come and go from several threads, and small things stay in between.
    blocks = []
    for size in (4_000_000, 660_000, 9_400_000, 2_000_000) * 3:
        blocks.append(torch.ones(size))
        small.append(torch.ones(8))
        if len(blocks) > 2:
            blocks.pop(0)

for _ in range(30):
    other = threading.Thread(target=step)
    other.start()
    step()
    other.join()
    del small[::2]
print(peak_rss_bytes())
"""


@pytest.mark.skipif(not os.confstr("CS_GNU_LIBC_VERSION"), reason="it is about glibc")
def test_blocks_of_a_rank_grow_together_again() -> None:
    """What comes and goes a hundred times takes little more memory than the first time."""

    def peak(environment: dict[str, str]) -> int:
        done = subprocess.run(
            [sys.executable, "-c", CHURN], capture_output=True, text=True, check=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        return int(done.stdout)

    assert peak(rank_environment("cpu")) < peak({}) - 50e6


def test_a_rank_keeps_what_is_said_to_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert "tcache_count=0" in rank_environment("cpu")["GLIBC_TUNABLES"]
    assert rank_environment("cuda") == {}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert rank_environment("cpu") == {}
