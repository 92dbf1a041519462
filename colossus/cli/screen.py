"""The console that commands print tables to."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_COLUMNS = 140


def screen(stderr: bool = False) -> "Console":
    """As wide as the terminal; into a pipe or a file, wide enough that no row is folded."""
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if terminal else _PIPE_COLUMNS, highlight=False)
