"""`colossus chat`, spoken to through a pipe."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import colossus.generate
from colossus.cli.chat import chat
from colossus.data import Tokenizer
from colossus.errors import ConfigError
from colossus.generate import Borders, LoadedModel, Sampling, generate_tokens
from colossus.generate.chat import chat_format
from colossus.generate.text import TextWriter
from tests.helpers import scrambled, tiny

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def loaded(tokenizer: Tokenizer) -> LoadedModel:
    model = scrambled(tiny(vocab_size=tokenizer.vocab_size, context_tokens=128))
    borders = Borders.of_run(tokenizer)
    return LoadedModel(model, tokenizer, "tiny", Path(), None, (), borders, {})


def talk(
    loaded: LoadedModel, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, **options: Any
) -> tuple[str, str]:
    monkeypatch.setattr(colossus.generate, "load_model", lambda *_: loaded)
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    chat("tiny", temperature=0.0, max_tokens=MAX_TOKENS, **options)
    captured = capsys.readouterr()
    return captured.out, captured.err


def answer(loaded: LoadedModel, *contents: str, system: str | None = None) -> str:
    """To the last of what user and assistant said in turn."""
    form = chat_format(loaded)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    writer = TextWriter(loaded.tokenizer, Sampling(max_tokens=MAX_TOKENS, stop=form.stop), form.ends)
    text = ""
    for token in generate_tokens(loaded.model, form.ids(messages), Sampling(temperature=0)):
        text += writer.push(token)
        if writer.finish_reason:
            return text.strip()
    raise AssertionError


def test_what_was_said_is_remembered_until_it_is_reset(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    first = answer(loaded, "a", system="mat")
    second = answer(loaded, "a", first, "b", system="mat")
    assert second != answer(loaded, "b", system="mat")
    out, err = talk(loaded, "a\nb\n\n/reset\nb\n/exit\na\n", monkeypatch, capsys, system="mat")
    expected = [first, second, answer(loaded, "b", system="mat")]
    assert "".join(out.split()) == "".join("".join(expected).split())
    assert err == "forgotten\n"


def test_the_oldest_turns_go_when_the_context_is_full(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    long = "the mat on the cat sat on a b c d e f g"
    out, err = talk(loaded, f"{long}\n{long}\n{long}\n{long}\n", monkeypatch, capsys)
    assert "the context of 128 tokens is full: the oldest 2 messages are left out" in err
    assert out
    _, err = talk(loaded, f"{'xyz ' * 100}\na\n", monkeypatch, capsys)
    assert "error: the conversation takes" in err


def test_ctrl_c_stops_the_answer_and_not_the_conversation(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = []

    def stopped(model: Any, ids: list[int], sampling: Sampling) -> Iterator[int]:
        asked.append(ids)
        yield ord("h") - ord("!") + 1
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield loaded.tokenizer.end_of_document

    monkeypatch.setattr(colossus.generate, "generate_tokens", stopped)
    out, _ = talk(loaded, "a\nb\n", monkeypatch, capsys)
    written = loaded.tokenizer.decode([ord("h") - ord("!") + 1])
    assert out == f"{written} … stopped\n{written}\n"
    messages = [("user", "a"), ("assistant", written), ("user", "b")]
    form = chat_format(loaded)
    assert asked[1] == form.ids([{"role": role, "content": content} for role, content in messages])


def test_mistakes_are_said_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="temperature is -1"):
        chat("nowhere", temperature=-1.0)
