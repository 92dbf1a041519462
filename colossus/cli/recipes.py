"""`colossus recipes`."""

import typer


def recipes() -> None:
    """List the recipes: whole runs that are ready to train.

    \b
      colossus train NAME                     run one
      colossus train NAME --print-config      see all that it decides
    """
    import inspect

    from colossus.spec.config import recipes as known

    width = max((len(name) for name in known()), default=0)
    for name, recipe in known().items():
        typer.echo(f"{name:<{width}}  {(inspect.getdoc(recipe) or '').partition(chr(10))[0]}".rstrip())
