"""Ctrl-C and SIGTERM: the first asks a run to end in good order, the second ends the process."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

_SHOW_CURSOR = "\x1b[?25h"


class Interrupts:
    """While entered, the first SIGINT or SIGTERM is noted in `seen`, and a second one ends the process at once.

    Outside the main thread, where Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.seen = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), _SHOW_CURSOR.encode())  # a live view has hidden it
            os._exit(128 + number)
        self.seen = True
