"""A chat template, which is someone else's program, run so that it can do nothing but write text.

It runs in a process of its own (template_process.py), because nothing within a process can stop a template that
multiplies a text or compares lists without end. The process stays for the next conversation.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colossus.errors import ConfigError

MAX_TEMPLATE_CHARACTERS = 1_000_000
MAX_S = 5.0

_PROGRAM = Path(__file__).with_name("template_process.py")
_lock = threading.Lock()
_process: subprocess.Popen[str] | None = None
_owner = 0
"""The process that started it: one that forks has no part in its pipes."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The conversation as text, with `add_generation_prompt` up to where the assistant's answer begins.

    Raises ConfigError where the template is wrong, does not take these messages, or goes on without end.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise ConfigError(
            f"the chat template was stopped: it has {len(template):,} characters, and no model's has more than "
            f"{MAX_TEMPLATE_CHARACTERS:,}"
        )
    values = {
        **special_tokens,
        "messages": list(messages),
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    with _lock:
        answer = _ask(json.dumps({"template": template, "values": values}))
    if "text" in answer:
        return answer["text"]
    raise ConfigError(f"the chat template {answer['error']}")


def _ask(request: str) -> dict[str, str]:
    process = _running()
    assert process.stdin is not None
    assert process.stdout is not None
    end_s = time.monotonic() + MAX_S
    timer = threading.Timer(MAX_S, process.kill)
    timer.start()
    line = ""
    try:
        process.stdin.write(request + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        pass
    finally:
        timer.cancel()
        if not line.endswith("\n"):  # also at Ctrl-C: the answer to this request must not be the next one's
            _end()
    if line.endswith("\n"):
        answer: dict[str, str] = json.loads(line)
        return answer
    late = time.monotonic() >= end_s
    return {"error": f"was stopped: it takes longer than {MAX_S:g} s" if late else "broke its process down"}


def _running() -> subprocess.Popen[str]:
    """The process, ready for a request."""
    global _process, _owner
    if _process is not None and _owner == os.getpid() and _process.poll() is None:
        return _process
    _process, _owner = (
        subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            encoding="ascii",
        ),
        os.getpid(),
    )
    assert _process.stdout is not None
    if _process.stdout.readline() != "ready\n":
        _end()
        raise ConfigError(
            f"the process that runs chat templates does not start; try {sys.executable} {_PROGRAM}"
        )
    return _process


@atexit.register
def _end() -> None:
    global _process
    if _process is not None and _owner == os.getpid():
        _process.kill()
        _process.communicate()
    _process = None
