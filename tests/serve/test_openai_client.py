"""The server as OpenAI's own client meets it."""

import asyncio
from typing import Any

import pytest

from colossus.generate import Sampling, generate
from colossus.generate.chat import chat_format
from colossus.generate.generate import generate_tokens
from colossus.generate.text import TextWriter

from .conftest import Server

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def alone(server: Server, prompt: str, **sampling: Any) -> str:
    loaded = server.loaded
    return "".join(generate(loaded.model, loaded.tokenizer, prompt, Sampling(**sampling)))


def test_the_one_model(client: Any, server: Server) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-001"]
    assert client.models.retrieve("tiny-001").owned_by == "colossus"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9'"):
        client.models.retrieve("gpt-9")


def test_a_completion_is_what_generate_writes(client: Any, server: Server) -> None:
    answer = client.completions.create(model="tiny-001", prompt="the cat", temperature=0, max_tokens=24)
    assert answer.choices[0].text == alone(server, "the cat", temperature=0, max_tokens=24)
    assert answer.model == "tiny-001"
    assert answer.usage.completion_tokens <= 24
    tokens = len(server.loaded.tokenizer.encode("the cat")) + 1
    assert answer.usage.prompt_tokens == tokens
    assert answer.usage.total_tokens == tokens + answer.usage.completion_tokens


def test_seeds_prompts_and_answers(client: Any, server: Server) -> None:
    asked = {
        "model": "x",
        "prompt": ["a", "the"],
        "n": 2,
        "seed": 7,
        "temperature": 1.5,
        "top_p": 0.9,
        "max_tokens": 9,
    }
    first, again = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert texts == [choice.text for choice in again.choices]
    sampling = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 9}
    assert texts == [
        alone(server, prompt, seed=seed, **sampling) for prompt in ("a", "the") for seed in (7, 8)
    ]


def test_token_ids_and_stops(client: Any, server: Server) -> None:
    ids = [server.loaded.tokenizer.end_of_document, *map(int, server.loaded.tokenizer.encode("the mat"))]
    whole = alone(server, "the mat", temperature=0, max_tokens=40)
    stop = whole[5:8]
    answer = client.completions.create(model="x", prompt=ids, temperature=0, max_tokens=40, stop=stop)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs_are_of_the_models_distribution(client: Any) -> None:
    answer = client.completions.create(model="x", prompt="on", temperature=0, max_tokens=5, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 5
    for value, likeliest in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value == max(likeliest.values()) < 0
    chat = client.chat.completions.create(
        model="x",
        messages=[{"role": "user", "content": "on"}],
        temperature=0,
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs.content
    assert all(one.logprob == one.top_logprobs[0].logprob for one in content)


def test_a_conversation_is_written_by_the_template(client: Any, server: Server) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "the cat"}]},
    ]
    answer = client.chat.completions.create(
        model="x", messages=messages, temperature=0, max_completion_tokens=20
    )
    form = chat_format(server.loaded)
    plain = [messages[0], {"role": "user", "content": "the cat"}]
    sampling = Sampling(temperature=0, max_tokens=20, stop=form.stop)
    writer, text = TextWriter(server.loaded.tokenizer, sampling, form.ends), ""
    for token in generate_tokens(server.loaded.model, form.ids(plain), sampling):
        text += writer.push(token)
        if writer.finish_reason:
            break
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == writer.finish_reason
    assert answer.usage.prompt_tokens == len(form.ids(plain))
    pieces = list(
        client.chat.completions.create(
            model="x",
            messages=messages,
            temperature=0,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].choices == []
    assert pieces[-1].usage == answer.usage


def test_a_streamed_completion_comes_in_pieces(client: Any, server: Server) -> None:
    pieces = list(
        client.completions.create(model="x", prompt="the", temperature=0, max_tokens=30, stream=True)
    )
    assert len(pieces) > 5
    assert "".join(piece.choices[0].text for piece in pieces) == alone(
        server, "the", temperature=0, max_tokens=30
    )
    assert [piece.choices[0].finish_reason for piece in pieces][-1] in ("length", "stop")
    assert all(piece.usage is None for piece in pieces)


def test_64_clients_at_once_get_their_own_answers(server: Server) -> None:
    prompts = [f"{'the cat sat '[: i % 12]}{i}" for i in range(64)]

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60
        ) as client:

            async def ask(i: int) -> str:
                asked = {"model": "x", "prompt": prompts[i], "temperature": 0, "max_tokens": 10 + i % 7}
                if i % 2:
                    return str((await client.completions.create(**asked)).choices[0].text)
                return "".join(
                    [p.choices[0].text async for p in await client.completions.create(**asked, stream=True)]
                )

            return await asyncio.gather(*(ask(i) for i in range(64)))

    answers = asyncio.run(all_at_once())
    assert answers == [alone(server, prompts[i], temperature=0, max_tokens=10 + i % 7) for i in range(64)]
    assert server.health() == {"status": "ok", "active": 0, "waiting": 0, "max_batch": 8}


def test_what_the_server_does_not_do_is_said(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="echo is not supported"):
        client.completions.create(model="x", prompt="a", echo=True)
    with pytest.raises(openai.BadRequestError, match="tools are not supported"):
        client.chat.completions.create(
            model="x",
            messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
