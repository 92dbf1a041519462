"""What all tests share."""

import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On tensors this small threads only wait for each other, and sums would depend on how many there are."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
