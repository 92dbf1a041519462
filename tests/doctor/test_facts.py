"""Facts as systems tell them, and of the machine that the tests run on."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from colossus.doctor import facts
from colossus.doctor.checks import check_all
from colossus.doctor.disk import disk_rates


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu_DOT_max": "250000 100000"}, 2.5),
        ({"cpu_DOT_max": "max 100000"}, None),
        ({"cpu__cpu_DOT_cfs_quota_us": "400000", "cpu__cpu_DOT_cfs_period_us": "100000"}, 4.0),
        ({"cpu__cpu_DOT_cfs_quota_us": "-1", "cpu__cpu_DOT_cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_quota_by_both_versions_of_cgroups(
    tmp_path: Path, files: dict[str, str], expected: float | None
) -> None:
    assert facts.quota_cores(write(tmp_path, **files)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory_DOT_max": "8589934592", "memory_DOT_current": "1073741824"}, (8 << 30, 1 << 30)),
        ({"memory_DOT_max": "max", "memory_DOT_current": "5"}, (None, 5)),
        ({"memory__memory_DOT_limit_in_bytes": "9223372036854771712"}, (None, None)),
        ({"memory__memory_DOT_limit_in_bytes": "4096"}, (4096, None)),
        ({}, (None, None)),
    ],
)
def test_memory_limit_by_both_versions_of_cgroups(
    tmp_path: Path, files: dict[str, str], expected: object
) -> None:
    assert facts.memory_limit(write(tmp_path, **files)) == expected


def test_a_line_of_nvidia_smi() -> None:
    gpu = facts.parse_gpu("NVIDIA H100 80GB HBM3, 81559, 12, 0, 1980, 1980, Enabled, 0x0000000000000004")
    assert gpu is not None
    assert (gpu.memory_bytes, gpu.used_bytes) == (81559 << 20, 12 << 20)
    assert (gpu.ecc_errors, gpu.clock_hz, gpu.persistence, gpu.throttled) == (0, 1.98e9, True, False)
    hot = facts.parse_gpu("GeForce, 24564, 1, [N/A], 300, 2100, Disabled, 0x0000000000000040")
    assert hot is not None
    assert (hot.ecc_errors, hot.persistence, hot.throttled) == (None, False, True)
    assert facts.parse_gpu("No devices were found") is None


def test_chrony_tells_the_offset() -> None:
    line = "A29FC87B,time.example,3,1700000000.1,-0.000123,0.0,0.0,1.0,0.0,0.0,0.03,0.01,64.2,{}"
    assert facts.parse_chrony(line.format("Normal")) == (True, -0.000123)
    assert facts.parse_chrony(line.format("Not synchronised"))[0] is False


def test_this_machine(tmp_path: Path) -> None:
    found = facts.gather(tmp_path / "not" / "there", ranks=False)
    assert found.memory_bytes == psutil.virtual_memory().total
    assert found.affinity_cores == len(os.sched_getaffinity(0))
    assert found.disk_free_bytes is not None
    assert found.disk_write_bytes_per_s is not None
    assert list(tmp_path.iterdir()) == []  # nothing is left behind
    assert {check.status for check in check_all(found) if check.name in ("Python", "torch")} == {"ok"}


def test_the_disk_is_measured_and_left_clean(tmp_path: Path) -> None:
    rates = disk_rates(tmp_path, file_bytes=4 << 20, spells=1)
    assert rates.write_bytes_per_s > 0
    assert rates.read_bytes_per_s > 0
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_none_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = facts._disk_facts(tmp_path / "file", measure=True)
    assert "disk_error" in found


def test_two_real_ranks_meet() -> None:
    found = facts.two_ranks_facts()
    assert "gloo_error" not in found
    assert found["gloo_s"] > 0


def test_ranks_that_do_not_meet_are_ended_and_told() -> None:
    hang = facts.two_ranks_facts(timeout_s=1.0, script="import time; time.sleep(60)")
    assert hang == {"gloo_error": "they did not meet within 1 s"}
    fail = facts.two_ranks_facts(timeout_s=20.0, script="import sys; sys.exit('connection refused')")
    assert fail == {"gloo_error": "connection refused"}


def test_all_but_training_is_checked_where_torch_is_missing() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from colossus.doctor.facts import gather\n"
        "from colossus.doctor.checks import check_all\n"
        "checks = {check.name: check for check in check_all(gather(Path('.'), disk=False))}\n"
        "print(checks['torch'].status, checks['two ranks'].found, checks['Python'].status, len(checks) > 12)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "problem needs torch ok True", done.stderr
