"""Planning and watching work where torch is not installed: the left-hand side of the picture in docs/tour.md."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import colossus

TORCH_SIDE = {
    "checkpoint",
    "data",
    "doctor",
    "evaluate",
    "generate",
    "models",
    "optim",
    "parallel",
    "serve",
    "trainer",
}
LEFT = {module.name for module in pkgutil.iter_modules(colossus.__path__)} - TORCH_SIDE
PACKAGES = [*(f"colossus.{name}" for name in sorted(LEFT)), "recipes"]


def modules(package: str) -> list[str]:
    """A package and all modules in it, found without importing any."""
    folder = Path(colossus.__file__).parents[1].joinpath(*package.split("."))
    inner = [f"{package}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem[:2] != "__"]
    return [package, *inner]


def test_the_picture_has_packages() -> None:
    assert {"colossus.spec", "colossus.planner", "colossus.observe", "colossus.cli"} <= set(PACKAGES)
    assert len(modules("colossus.spec")) > 5


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_all_of_it_leaves_torch_out(package: str) -> None:
    imports = "; ".join(f"import {name}" for name in modules(package))
    for script in (
        f"import sys; {imports}; sys.exit('torch' in sys.modules)",
        f"import sys; sys.modules['torch'] = None; {imports}",  # as where it is not installed
    ):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr or f"{package} imports torch"
