"""What the zoo knows of a model besides its numbers."""

from collections.abc import Callable
from dataclasses import dataclass

from colossus.spec.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of the zoo: who it belongs to, where its numbers are from, and how it is built."""

    family: str
    source: str
    build: Callable[[], ModelSpec]
