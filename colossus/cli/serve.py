"""`colossus serve`."""

from pathlib import Path
from typing import Annotated

import typer

from colossus.cli.options import (
    ModelArgument,
    RunsOption,
)
from colossus.errors import ConfigError

EPILOG = """\b
Examples:
  colossus serve latest
  colossus serve Llama-3.2-1B --port 9000 --max-batch 32
  curl localhost:8000/v1/completions -d '{"prompt": "import ", "max_tokens": 20}'
"""


def serve(
    model: ModelArgument,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen. Only this machine reaches 127.0.0.1.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0: any that is free.")] = 8000,
    max_batch: Annotated[
        int, typer.Option(metavar="N", min=1, max=4096, help="Answers that are written at once.")
    ] = 16,
    max_waiting: Annotated[
        int, typer.Option(metavar="N", min=1, help="Answers that wait for their turn; beyond, 503.")
    ] = 256,
    runs: RunsOption = Path("runs"),
) -> None:
    """Serve a model over HTTP, in the way of OpenAI's interface, for trying it.

    /v1/models, /v1/completions, /v1/chat/completions (also streamed) and /health. There are no keys and no
    limits by client: it is for a machine or a network that you trust.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise ConfigError(
            "serving takes the packages starlette and uvicorn: pip install 'colossus-llm[serve]'"
        ) from None
    from colossus.generate import load_model
    from colossus.serve.run import listen
    from colossus.serve.run import serve as run

    listening = listen(host, port)
    loaded = load_model(model, runs)
    for damaged in loaded.rejected:
        typer.echo(f"warning: {damaged.path} is damaged ({damaged.reason}); using an older one", err=True)
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"serving {loaded.name} on http://{shown}:{listening.getsockname()[1]}/v1")
    run(loaded, listening, max_rows=max_batch, max_waiting=max_waiting)
