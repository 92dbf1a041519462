"""Bad facts, and the sentence that each of them brings."""

from dataclasses import replace

import pytest

from colossus.doctor.checks import CHECKS, Check, Facts, Gpu, check_all, usable_cores

GOOD_GPU = Gpu("H200", 141 << 30, 0, 0, 1.9e9, 1.98e9, True, False)
GOOD = Facts(
    python=(3, 11, 7),
    torch="2.13.0+cpu",
    cores=8,
    affinity_cores=8,
    load=0.1,
    memory_bytes=64 << 30,
    available_bytes=60 << 30,
    shared_memory_bytes=32 << 30,
    disk_directory="runs",
    disk_free_bytes=100 << 30,
    disk_write_bytes_per_s=1e9,
    disk_read_bytes_per_s=2e9,
    clock_synchronised=True,
    clock_offset_s=0.001,
    open_files=65_536,
    processes=-1,
    locked_memory_bytes=-1,
    huge_pages="madvise",
    hostname="node-7",
    gloo_s=2.0,
    compiler="g++ 12",
    caches={"/cache": None},
)
ON_GPUS = replace(
    GOOD, torch="2.13.0+cu130", cuda_build="13.0", cuda_available=True, nccl="2.28", driver="580.1",
    driver_cuda="13.0", gpus=(GOOD_GPU, GOOD_GPU),
)  # fmt: skip


def named(facts: Facts, name: str) -> Check:
    return next(check for check in check_all(facts) if check.name == name)


@pytest.mark.parametrize("facts", [GOOD, ON_GPUS])
def test_a_good_machine_has_nothing_to_fix(facts: Facts) -> None:
    checks = check_all(facts)
    assert [check for check in checks if check.status != "ok"] == []
    assert len({check.name for check in checks}) == len(checks) >= 18


def test_gpus_are_looked_at_only_where_there_are_any() -> None:
    on_cpu, on_gpus = ({check.name for check in check_all(facts)} for facts in (GOOD, ON_GPUS))
    assert on_gpus - on_cpu == {"GPUs", "NCCL"}


def gpu(**changes: object) -> dict[str, object]:
    return {"gpus": (GOOD_GPU, replace(GOOD_GPU, **changes))}


BAD = [
    ("Python", "problem", GOOD, {"python": (3, 10, 2)}, "Install Python 3.11"),
    ("torch", "problem", GOOD, {"torch": "2.9.1+cu128"}, "2.11 or later"),
    ("torch", "problem", GOOD, {"torch": None, "torch_error": "not installed"}, "pip install torch"),
    ("CUDA", "problem", ON_GPUS, {"cuda_build": None}, "built for CUDA"),
    ("CUDA", "problem", ON_GPUS, {"driver_cuda": "12.8"}, "Update the driver to one for CUDA 13.0"),
    ("CUDA", "problem", ON_GPUS, {"cuda_available": False}, "CUDA_VISIBLE_DEVICES"),
    ("CUDA", "warning", GOOD, {"cuda_build": "13.0", "nccl": "2.28"}, "Training will run"),
    ("NCCL", "problem", ON_GPUS, {"nccl": None}, "torch with NCCL"),
    ("GPUs", "problem", ON_GPUS, gpu(ecc_errors=3), "drain this node"),
    ("GPUs", "warning", ON_GPUS, gpu(used_bytes=40 << 30), "nvidia-smi"),
    ("GPUs", "warning", ON_GPUS, gpu(throttled=True), "cooling"),
    ("GPUs", "warning", ON_GPUS, gpu(persistence=False), "-pm 1"),
    ("CPU cores", "warning", GOOD, {"quota_cores": 2.5}, "--threads 2"),
    ("CPU load", "warning", GOOD, {"load": 4.0}, "slowest"),
    ("memory", "problem", GOOD, {"available_bytes": 1 << 30}, "2.00 GiB"),
    ("memory", "problem", GOOD, {"limit_bytes": 8 << 30, "limit_used_bytes": 7 << 30}, "container's limit"),
    ("swap", "warning", GOOD, {"swap_used_bytes": 4 << 30}, "swaps"),
    ("shared memory", "warning", GOOD, {"shared_memory_bytes": 64 << 20}, "--shm-size"),
    ("shared memory", "problem", ON_GPUS, {"shared_memory_bytes": 64 << 20}, "--shm-size"),
    ("disk", "problem", GOOD, {"disk_error": "Read-only file system"}, "--directory"),
    ("disk", "problem", GOOD, {"disk_free_bytes": 100 << 20}, "Free some space"),
    ("disk", "warning", GOOD, {"disk_free_bytes": 5 << 30}, "checkpoint"),
    ("disk", "warning", GOOD, {"disk_write_bytes_per_s": 9e6}, "faster disk"),
    ("clock", "problem", GOOD, {"clock_went_back": True}, "kernel"),
    ("clock", "warning", GOOD, {"clock_synchronised": False}, "set-ntp"),
    ("clock", "warning", GOOD, {"clock_offset_s": -2.0}, "NTP"),
    ("open files", "problem", GOOD, {"open_files": 256}, "ulimit -n 4096"),
    ("open files", "warning", GOOD, {"open_files": 1024}, "ulimit -n"),
    ("user processes", "warning", GOOD, {"processes": 200}, "ulimit -u"),
    ("locked memory", "problem", GOOD, {"locked_memory_bytes": 64 << 10, "has_rdma": True}, "memlock"),
    ("huge pages", "warning", GOOD, {"huge_pages": "never"}, "madvise"),
    ("rendezvous", "problem", GOOD, {"port_error": "Cannot assign"}, "loopback"),
    ("rendezvous", "warning", GOOD, {"hostname_error": "Name or service not known"}, "/etc/hosts"),
    ("two ranks", "problem", GOOD, {"gloo_error": "timed out"}, "GLOO_SOCKET_IFNAME"),
    ("C++ compiler", "warning", GOOD, {"compiler": None}, "g++"),
    ("caches", "warning", GOOD, {"caches": {"/cache": "Permission denied"}}, "TORCHINDUCTOR_CACHE_DIR"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "status", "facts", "changes", "advice"), BAD)
def test_what_is_wrong_is_told_with_what_to_do(name, status, facts, changes, advice) -> None:
    bad = replace(facts, **changes)
    check = named(bad, name)
    assert (check.status, advice in check.advice) == (status, True), check
    assert check.advice.endswith(".")
    assert [other for other in check_all(bad) if other.status != "ok" and other.name != name] == []


def test_every_check_can_fail() -> None:
    assert {name for name, *_ in BAD} == {check.name for check in check_all(ON_GPUS)}
    assert len(CHECKS) == len({name for name, *_ in BAD})


def test_what_cannot_be_found_out_is_skipped_with_its_reason() -> None:
    check = named(
        replace(GOOD, clock_synchronised=None, clock_offset_s=None, not_gathered={"clock": "no chrony"}),
        "clock",
    )
    assert (check.status, check.found) == ("skipped", "no chrony")


def test_cores_are_the_fewest_of_machine_affinity_and_quota() -> None:
    assert usable_cores(replace(GOOD, affinity_cores=4, quota_cores=2.5)) == 2.5
    assert usable_cores(replace(GOOD, affinity_cores=4)) == 4
