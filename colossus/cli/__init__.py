"""The command line. One file for each group of commands; each imports what it needs when it runs, not before,
so that help is instant: no torch, no pydantic, no rich until a command asks for them.
"""

import errno
import sys

import typer

from colossus.cli import (
    calibrate,
    chat,
    compare,
    data,
    doctor,
    evaluate,
    export,
    fleet,
    generate,
    import_,
    models,
    plan,
    recipes,
    runs,
    serve,
    train,
    upcycle,
    validate,
)
from colossus.cli.group import Group
from colossus.errors import ColossusError, ConfigError

app = typer.Typer(
    name="colossus",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    # Plain help: rich's takes a quarter of a second to import, which is longer than all the rest together.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("train", epilog=train.EPILOG)(train.train)
app.command("plan", epilog=plan.PLAN_EPILOG)(plan.plan)
app.command("explain", epilog=plan.EXPLAIN_EPILOG)(plan.explain)
app.command("compare", epilog=compare.EPILOG)(compare.compare)
app.command("validate", epilog=validate.EPILOG)(validate.validate)
app.command("calibrate", epilog=calibrate.EPILOG)(calibrate.calibrate)
app.command("doctor", epilog=doctor.EPILOG)(doctor.doctor)
app.command("generate", epilog=generate.EPILOG)(generate.generate)
app.command("chat", epilog=chat.EPILOG)(chat.chat)
app.command("serve", epilog=serve.EPILOG)(serve.serve)
app.command("evaluate", epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command("export", epilog=export.EPILOG)(export.export)
app.command("import", epilog=import_.EPILOG)(import_.import_)
app.command("upcycle", epilog=upcycle.EPILOG)(upcycle.upcycle)
app.add_typer(runs.app, name="runs")
app.command("recipes")(recipes.recipes)
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")
app.add_typer(fleet.app, name="fleet")


@app.callback()
def colossus() -> None:
    """Train language models, from a laptop to a fleet.

    \b
      colossus train                     a first model in three minutes, from text that is on this machine
      colossus train --data my/texts     the same on your own text
      colossus generate latest --prompt 'import '
      colossus runs                      all runs, and how they went
      colossus plan llama3.1-405b --fleet colossus-200k --tokens 15T    how to train on a fleet, and what it takes

    Every command has its own help, with examples: colossus train --help
    """


@app.command()
def version() -> None:
    """Show the version."""
    # A command, not an option of the group: typer would import pydantic for it ahead of every command's help.
    from importlib import metadata

    try:
        typer.echo(metadata.version("colossus-llm"))
    except metadata.PackageNotFoundError:
        typer.echo("not installed; running from source")


def main() -> None:
    """The entry point: errors written for people are shown without a traceback, all others with theirs."""
    try:
        app()
    except ColossusError as error:
        _complain(str(error))
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        _complain(f"{str(error.filename)[:100]!r} cannot be a file: {error.strerror}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def printable(message: str) -> str:
    """Without what would steer a terminal or cannot be written: names out of files can have anything in them."""
    shown = (one if one.isprintable() or one in "\n\t" else repr(one)[1:-1] for one in message)
    return "".join(shown)


def _complain(message: str) -> None:
    message = printable(message)
    if not sys.stderr.isatty():
        print(f"error: {message}", file=sys.stderr)  # as it is: what reads a pipe wants no folded lines
        return
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, highlight=False).print(Text.assemble(("error: ", "bold red"), message))
