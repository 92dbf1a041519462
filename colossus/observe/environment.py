"""Where and with what a run runs, so that its directory explains itself: machine, versions, source commit."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "colossus-llm", "torch", "triton", "numpy", "pydantic", "tokenizers", "sentencepiece", "pyarrow",
    "zstandard", "xxhash", "safetensors", "datasets", "typer", "rich", "tensorboard", "matplotlib",
)  # fmt: skip


def environment(command: Sequence[str] | None = None) -> dict[str, Any]:
    """The machine, the versions, and the command line (by default, this process's)."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    return {
        "command": list(sys.argv if command is None else command),
        "working_directory": str(Path.cwd()),
        "python": platform.python_version(),
        "python_executable": sys.executable,
        "os": platform.platform(),
        "host": platform.node(),
        "process_id": os.getpid(),
        "cpu": cpu_model(),
        "num_cores": psutil.cpu_count(logical=False),
        "num_logical_cores": psutil.cpu_count(),
        "num_usable_cores": _num_usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": package_versions(),
    }


def cpu_model() -> str:
    """What the system calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    """Versions of the packages that shape a run, of those installed."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_state(directory: Path) -> dict[str, Any] | None:
    """Commit and uncommitted changes of the repository with its root at `directory`, or None."""
    root = _git(directory, "rev-parse", "--show-toplevel")
    if not root or Path(root).resolve() != directory.resolve():
        return None
    changes = (_git(directory, "status", "--porcelain") or "").splitlines()
    return {
        "commit": _git(directory, "rev-parse", "--verify", "HEAD"),
        "branch": _git(directory, "symbolic-ref", "--short", "HEAD"),
        "dirty": bool(changes),
        "changed_files": [line[3:] for line in changes],
        "diff_stat": (_git(directory, "diff", "--shortstat", "HEAD") or "").strip(),
    }


def _git(directory: Path, *arguments: str) -> str | None:
    """What git answers, or None where there is no git, no repository or no answer."""
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            # Looking must not take the repository's locks, nor ask for a password.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"},
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.rstrip("\n")


def _num_usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
