"""The examples, run in their order, print what stands beside them, but for figures that machines round apart."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))


def lines(text: str) -> list[str]:
    """What the model writes, and measured figures, are each machine's own."""
    return [re.sub(r"\d\.\d+", "…", re.sub(r"(?<=^it writes: ).*", "…", line)) for line in text.splitlines()]


@pytest.mark.slow
def test_examples_print_what_stands_beside_them(tmp_path: Path) -> None:
    assert len(EXAMPLES) == 4
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for example in EXAMPLES:
        done = subprocess.run(
            [sys.executable, example],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        beside = example.with_suffix(".txt").read_text(encoding="utf-8")
        assert lines(done.stdout) == lines(beside)
