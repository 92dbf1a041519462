"""A server process with a tiny model, for all tests of the folder."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from colossus.checkpoint import save
from colossus.data import Tokenizer
from colossus.generate import LoadedModel, load_model
from colossus.observe.run_directory import RunDirectory
from colossus.spec.data import DataConfig, LoadedTokenizer
from colossus.spec.run import Batch, RunConfig
from tests.helpers import scrambled, tiny

CONTEXT_TOKENS = 4096
COMMAND = (
    "import sys, torch, typer; torch.set_num_threads(1); from colossus.cli.serve import serve; "
    "app = typer.Typer(); app.command()(serve); app()"
)


@dataclass(frozen=True)
class Server:
    """A process that answers at `url`, and the model that it has."""

    process: subprocess.Popen[str]
    url: str
    loaded: LoadedModel

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and JSON of a request: GET, or POST where there is a body, as it is if it is bytes."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=30)

    def health(self) -> dict[str, Any]:
        return self.ask("/health")[1]

    def wait_until_idle(self) -> None:
        """Until no row is taken and nothing waits."""
        for _ in range(200):
            if not self.busy():
                return
            time.sleep(0.02)
        raise AssertionError(f"still busy: {self.health()}")

    def busy(self) -> int:
        health = self.health()
        return int(health["active"]) + int(health["waiting"])


@pytest.fixture(scope="session")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.train(["the cat sat on the mat, the cat sat", "naïve 🙂"] * 3, 270)
    model = scrambled(tiny(vocab_size=tokenizer.vocab_size, context_tokens=CONTEXT_TOKENS))
    run = RunDirectory.create(tmp_path_factory.mktemp("runs"), "tiny")
    config = RunConfig(
        name="tiny",
        model=model.spec,
        data=DataConfig(tokenizer=LoadedTokenizer(path="elsewhere")),
        batch=Batch(sequences=2, sequence_tokens=8),
    )
    run.write_description(config)
    tokenizer.save(run.tokenizer_path)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    save(run.checkpoints_path, 1, tensors, {}, model=model.spec)
    return run.path


@contextmanager
def serving(run_path: Path, *arguments: str, command: str = COMMAND) -> Iterator[Server]:
    """A server on a free port; ended by its process id, whatever happens."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", command, str(run_path), "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving "), line + process.stdout.read()
        url = line.split()[-1].removesuffix("/v1")
        yield Server(process, url, load_model(run_path, Path("runs")))
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def server(run_path: Path) -> Iterator[Server]:
    with serving(run_path, "--max-batch", "8") as server:
        yield server
