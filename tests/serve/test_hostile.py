"""Clients that are wrong, large, many, or gone; and ends."""

import json
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from colossus.generate import Sampling, generate

from .conftest import COMMAND, CONTEXT_TOKENS, Server, serving

TALK = "/v1/chat/completions"
WRITE = "/v1/completions"


def still_right(server: Server) -> bool:
    """It answers as if nothing had happened."""
    asked = {"prompt": "the cat", "temperature": 0, "max_tokens": 8}
    status, answer = server.ask(WRITE, asked)
    sampling = Sampling(temperature=0, max_tokens=8)
    loaded = server.loaded
    text = "".join(generate(loaded.model, loaded.tokenizer, "the cat", sampling))
    return status == 200 and answer["choices"][0]["text"] == text


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        (WRITE, b"{", 400, "JSON"),
        (WRITE, b"", 400, "JSON"),
        (WRITE, b"\xff\xfe{}", 400, "JSON"),
        (WRITE, b"[1]", 400, ""),
        (WRITE, b"[" * 100_000, 400, ""),
        (WRITE, {"prompt": 5}, 400, "prompt"),
        (WRITE, {"prompt": {}}, 400, "prompt"),
        (WRITE, {"prompt": []}, 400, "empty"),
        (WRITE, {"prompt": [[]]}, 400, "no ids"),
        (WRITE, {"prompt": [10**9]}, 400, "from 0 to"),
        (WRITE, {"prompt": [-1]}, 400, "from 0 to"),
        (WRITE, {"prompt": [1, "a"]}, 400, "prompt"),
        (WRITE, b'{"prompt": "\\ud800"}', 400, ""),
        (WRITE, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        (WRITE, {"prompt": "a", "max_tokens": "9"}, 400, "max_tokens"),
        (WRITE, {"prompt": "a", "temperature": -1}, 400, "temperature"),
        (WRITE, b'{"prompt": "a", "temperature": NaN}', 400, ""),
        (WRITE, b'{"prompt": "a", "temperature": 1e999}', 400, ""),
        (WRITE, {"prompt": "a", "top_p": 0}, 400, "top_p"),
        (WRITE, {"prompt": "a", "top_k": 0}, 400, "top_k"),
        (WRITE, {"prompt": "a", "n": 100_000}, 400, "n: "),
        (WRITE, {"prompt": ["a"] * 65}, 400, "65 answers"),
        (WRITE, {"prompt": "a", "seed": 2**70}, 400, "seed"),
        (WRITE, {"prompt": "a", "stop": ""}, 400, "empty stop"),
        (WRITE, {"prompt": "a", "stop": ["x"] * 100}, 400, "stop has 100"),
        (WRITE, {"prompt": "a", "stream": "yes"}, 400, "stream"),
        (WRITE, {"prompt": "a", "echo": True}, 400, "echo is not supported"),
        (WRITE, {"prompt": "x1y " * CONTEXT_TOKENS}, 400, "no room for an answer"),
        (TALK, {}, 400, "messages"),
        (TALK, {"messages": []}, 400, "messages"),
        (TALK, {"messages": [{"role": "king", "content": "a"}]}, 400, "role"),
        (TALK, {"messages": [{"content": "a"}]}, 400, "role"),
        (TALK, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "content"),
        (TALK, {"messages": [{"role": "user", "content": "x1y " * CONTEXT_TOKENS}]}, 400, "no room"),
        ("/v1/nothing", {}, 404, "/v1/nothing"),
        ("/v1/models", {}, 405, "does not take POST"),
        (WRITE, None, 405, "does not take GET"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_openais_form(
    path: str, body: Any, status: int, words: str, server: Server
) -> None:
    got, answer = server.ask(path, body)
    assert got == status, answer
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert words in answer["error"]["message"]
    assert "Traceback" not in answer["error"]["message"]


def test_too_large_by_its_header_and_as_it_comes(server: Server) -> None:
    head = f"POST {WRITE} HTTP/1.1\r\nHost: localhost\r\n"
    with server.connect() as connection:
        connection.sendall(f"{head}Content-Length: 99999999999\r\n\r\n".encode())
        assert b" 413 " in connection.recv(100)
    with server.connect() as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        try:
            for _ in range(6):
                connection.sendall(chunk)
        except OSError:  # it hangs up while we talk on
            pass
        else:
            assert b" 413 " in connection.recv(100)
    assert still_right(server)


def test_noise_and_other_names_for_this_machine(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00 hello \x00\r\n\r\n")
        connection.settimeout(5)
        assert b"200" not in connection.recv(1000)[:20]
    status, answer = server.ask("/v1/models", headers={"Host": "evil.example"})
    assert status == 400
    assert "'evil.example'" in answer["error"]["message"]
    assert server.ask("/v1/models", headers={"Host": "LOCALHOST:1"})[0] == 200
    assert still_right(server)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(stream: bool, server: Server) -> None:
    body = json.dumps({"prompt": "the", "max_tokens": CONTEXT_TOKENS, "n": 8, "stream": stream, "seed": 1})
    head = f"POST {WRITE} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with server.connect() as connection:
        connection.sendall((head + body).encode())
        deadline = time.monotonic() + 10
        while not server.busy():
            assert time.monotonic() < deadline
        if stream:
            assert b"200 OK" in connection.recv(200)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # as a killed process
    server.wait_until_idle()
    assert still_right(server)


def test_beyond_the_queue_is_503_and_nothing_is_lost(run_path: Path) -> None:
    with serving(run_path, "--max-batch", "1", "--max-waiting", "2") as server:
        answers: list[tuple[int, Any]] = []

        def ask() -> None:
            answers.append(server.ask(WRITE, {"prompt": "the", "max_tokens": 60, "seed": 1}))

        clients = [threading.Thread(target=ask) for _ in range(12)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        statuses = sorted(status for status, _ in answers)
        assert set(statuses) == {200, 503}
        assert len({a["choices"][0]["text"] for status, a in answers if status == 200}) == 1
        assert all(a["error"]["code"] == "busy" for status, a in answers if status == 503)
        assert server.ask(WRITE, {"prompt": ["a"] * 3})[0] == 503
        assert still_right(server)
        # It ends when the answer at hand is whole.
        last = threading.Thread(target=ask)
        last.start()
        while not server.busy() and last.is_alive():
            pass
        server.process.send_signal(signal.SIGTERM)
        last.join()
        assert answers[-1][0] == 200
        assert server.process.wait(10) in (0, -signal.SIGTERM)


def test_an_engine_that_breaks_fails_its_requests_and_the_server_lives_on(run_path: Path) -> None:
    # A prompt with token 5 twice in a row breaks the model.
    breaking = COMMAND.replace(
        "app = typer",
        "from colossus.models import Decoder; forward = Decoder.forward; "
        "Decoder.forward = lambda self, tokens, *a, **k: forward(self, tokens, *a, **k) "
        "if '5, 5' not in str(tokens.tolist()) else 1 / 0; app = typer",
    )
    with serving(run_path, command=breaking) as server:
        assert still_right(server)
        status, answer = server.ask(WRITE, {"prompt": [5, 5]})
        assert status == 500
        assert answer["error"]["type"] == "server_error"
        assert still_right(server)
        assert server.busy() == 0


def test_a_port_that_is_taken(server: Server) -> None:
    from colossus.errors import RunError
    from colossus.serve.run import listen

    with pytest.raises(RunError, match=r"cannot listen on 127\.0\.0\.1 port"):
        listen("127.0.0.1", int(server.url.rpartition(":")[2]))
