"""A chat as one text, by a model's own template."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from colossus.errors import DataError


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The template is someone else's program, so it runs in Jinja's sandbox. Raises DataError when it fails."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    settings: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
    try:
        return environment.from_string(template).render(**special_tokens, **settings)
    except Exception as error:  # what a template may do wrong has no end
        raise DataError(f"the model's chat template does not take this chat: {error}") from error
