"""A group of commands whose subcommands' help is as quick as its own."""

from typing import Any

from typer.core import TyperGroup


class Group(TyperGroup):
    """Typer converts the group's own `--help`, when it is not given, by pydantic: a fifth of a second of
    imports before any subcommand's help. A default that needs no conversion spares it."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None and option.default is None:
            option.default = False
        return option
