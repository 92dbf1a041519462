"""A chat template, which is someone else's program, run so that it can do nothing but write text."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from colossus.errors import ConfigError

MAX_TEMPLATE_CHARACTERS = 1_000_000
MAX_CHARACTERS = 20_000_000
MAX_S = 5.0


class _Excess(Exception):
    """A template writes too much or takes too long."""


class _Raised(Exception):
    """The template's own complaint about the messages."""


def render(template: str, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str]) -> str:
    """The conversation as text, up to where the assistant's answer begins.

    Raises ConfigError where the template is wrong, does not take these messages, or goes on without end.
    """
    import jinja2

    try:
        environment, compiled = _compiled(template)
        environment.start()
        parts, length = [], 0
        values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        for part in compiled.generate(**{**special_tokens, **values}):
            length += len(part)
            environment.check(length)
            parts.append(part)
        return "".join(parts)
    except _Raised as error:
        raise ConfigError(f"the chat template does not take these messages: {error}") from None
    except _Excess as error:
        raise ConfigError(f"the chat template was stopped: {error}") from None
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template is wrong or unsafe: {error}") from None
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        ArithmeticError,
        LookupError,
        RecursionError,
    ) as error:
        raise ConfigError(
            f"the chat template fails with these messages: {type(error).__name__}: {error}"
        ) from None


@lru_cache(maxsize=8)
def _compiled(template: str) -> tuple[Any, Any]:
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise _Excess(f"it has {len(template):,} characters")
    environment = _environment()
    environment.start()
    return environment, environment.from_string(template)


def _environment() -> Any:
    """Jinja's sandbox with the extras that templates expect, and with an eye on the clock and on sizes."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training; here it is passed on."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Guarded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%", "//", "-", "/"))
        end_s = 0.0

        def start(self) -> None:
            self.end_s = time.monotonic() + MAX_S

        def check(self, value: Any = None) -> Any:
            size = (
                value
                if isinstance(value, int)
                else len(value)
                if isinstance(value, str | list | tuple)
                else 0
            )
            if size > MAX_CHARACTERS:
                raise _Excess(f"it makes more than {MAX_CHARACTERS:,} characters")
            if time.monotonic() > self.end_s:
                raise _Excess(f"it takes longer than {MAX_S:g} s")
            return value

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [
                one if isinstance(one, int) else len(one)
                for one in (left, right)
                if hasattr(one, "__len__") or isinstance(one, int)
            ]
            if operator in ("*", "**") and len(sizes) == 2 and abs(sizes[0]) * abs(sizes[1]) > MAX_CHARACTERS:
                raise _Excess("it multiplies without measure")
            if operator == "%" and isinstance(left, str):
                raise _Excess("it formats with %")
            return self.check(super().call_binop(context, operator, left, right))

        def call(self, context: Any, function: Any, *values: Any, **named: Any) -> Any:
            for value in (*values, *named.values()):
                self.check(value)
            return self.check(super().call(context, function, *values, **named))

        def getattr(self, obj: Any, attribute: str) -> Any:
            return self.check(super().getattr(obj, attribute))

        def getitem(self, obj: Any, argument: Any) -> Any:
            return self.check(super().getitem(obj, argument))

    environment = Guarded(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # what Jinja notes on a filter comes along
        def checked(*values: Any, **named: Any) -> Any:
            for value in (*values, *named.values()):
                environment.check(value)
            return environment.check(function(*values, **named))

        return checked

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message: str) -> None:
        raise _Raised(message)

    def counted(*bounds: int) -> range:
        numbers = range(*bounds)
        if len(numbers) > 10_000:
            raise _Excess("it counts beyond 10,000")
        return numbers

    environment.filters["tojson"] = to_json
    for name in ("format", "center", "wordwrap", "filesizeformat"):
        environment.filters.pop(name)
    environment.filters = {name: guarded(function) for name, function in environment.filters.items()}
    environment.globals.pop("lipsum")
    environment.globals["range"] = counted
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
