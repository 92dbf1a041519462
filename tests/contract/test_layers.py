"""Planning, simulating, launching and watching work where torch is not installed."""

import importlib.util
import subprocess
import sys

import pytest

NO_TORCH = (
    "colossus.spec.config", "colossus.spec.run", "colossus.events", "colossus.errors", "colossus.units",
    "colossus.hardware", "colossus.zoo", "colossus.planner", "colossus.simulator", "colossus.observe",
    "colossus.observe.overview", "colossus.observe.terminal", "colossus.observe.lines",
    "colossus.observe.curves", "colossus.observe.summary",
    "colossus.observe.run_directory", "colossus.observe.tensorboard",
    "colossus.launch", "colossus.dashboard", "colossus.resilience.policy", "colossus.cli", "recipes",
)  # fmt: skip


def exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent that is not there yet
        return False


@pytest.mark.parametrize("name", NO_TORCH)
def test_importing_it_leaves_torch_out(name: str) -> None:
    if not exists(name):
        pytest.skip("not there yet")
    script = f"import sys; import {name}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"{name} imports torch"


@pytest.mark.parametrize("name", NO_TORCH)
def test_it_works_where_torch_is_not_installed(name: str) -> None:
    if not exists(name):
        pytest.skip("not there yet")
    script = f"import sys; sys.modules['torch'] = None; import {name}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
