"""Measured rates, prices and durations, each with its source, as TOML beside this file."""

import tomllib
from functools import cache
from importlib import resources
from typing import Any


@cache
def table(name: str) -> dict[str, Any]:
    """The content of `name`.toml. Callers validate what they take out of it, and change nothing in it."""
    content: dict[str, Any] = tomllib.loads(
        resources.files(__package__).joinpath(f"{name}.toml").read_text("utf-8")
    )
    return content
