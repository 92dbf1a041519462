"""Watching a run, without torch: its directory, live view, lines, curves and summary."""

from collections.abc import Callable
from typing import TypeAlias

from colossus.events import Event

Observer: TypeAlias = Callable[[Event], None]
"""Whatever wants to know what happens in a run: the trainer calls it with every event, in order."""
