"""Renders chat templates for template.py, which runs this file as a process of its own: a JSON request a line comes
in, a JSON answer a line goes out.

A template is someone else's program. Jinja's sandbox keeps it from everything but its values; the operating system
keeps this process from more memory than a template can need; who asks keeps the clock. Nothing of Colossus is
imported, so that the process is there at once.
"""

import contextlib
import json
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 20_000_000
MAX_MEMORY_BYTES = 1 << 30
MAX_CPU_S = 60
"""Of one request: only matters where whoever asked is gone without a word."""


class Raised(Exception):
    """The template's own complaint about the messages."""


class Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is passed on."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The marked text."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes for HTML that Jinja's own filter writes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message: object) -> None:
    """For templates that do not take every conversation."""
    raise Raised(message)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja's sandbox with the extras that templates expect."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = to_json
    made.globals.pop("lipsum")
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


@lru_cache(maxsize=8)
def compiled(template: str) -> Template:
    """Raises TemplateError for what is no template."""
    return environment().from_string(template)


def answer(template: str, values: dict[str, Any]) -> dict[str, str]:
    """`text`, or `error`: how to go on after "the chat template"."""
    try:
        text = compiled(template).render(values)
    except Raised as error:
        return {"error": f"does not take these messages: {error}"}
    except TemplateError as error:
        return {"error": f"is wrong or unsafe: {error}"}
    except MemoryError:
        return {"error": f"was stopped: it takes more than {MAX_MEMORY_BYTES >> 20:,} MiB of memory"}
    except Exception as error:  # what a template may do wrong has no end
        return {"error": f"fails with these messages: {type(error).__name__}: {error}"}
    if len(text) > MAX_CHARACTERS:
        return {"error": f"was stopped: it writes more than {MAX_CHARACTERS:,} characters"}
    return {"text": text}


def limit() -> None:
    """Memory, and CPU time from here on; where the system knows such limits."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        used = resource.getrusage(resource.RUSAGE_SELF)
        end_s = int(used.ru_utime + used.ru_stime) + MAX_CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (end_s, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main() -> None:
    """Answers until there are no more requests."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks
    print("ready", flush=True)
    for line in sys.stdin:
        limit()
        print(json.dumps(answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
