"""The process: listens, serves, and drains at its end."""

import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator

from starlette.applications import Starlette

from colossus.errors import RunError
from colossus.generate.load import LoadedModel
from colossus.serve.app import build_app
from colossus.serve.worker import Worker

DRAIN_S = 30
"""How long answers at hand may take at the end."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises RunError where it is taken or not ours to have."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise RunError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


def serve(loaded: LoadedModel, listening: socket.socket, *, max_rows: int, max_waiting: int) -> None:
    """Serves until SIGTERM or Ctrl-C; then takes no more requests, and ends when those at hand are answered."""
    import uvicorn

    worker = Worker(loaded.model, loaded.tokenizer, max_rows=max_rows, max_waiting=max_waiting)
    address = ipaddress.ip_address(listening.getsockname()[0])
    app = build_app(loaded, worker, local=address.is_loopback)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    app.router.lifespan_context = lifespan
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=65_536,
    )
    uvicorn.Server(config).run(sockets=[listening])
