"""Answers as OpenAI's objects: whole, or in pieces as they are written."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from colossus.data import Tokenizer
from colossus.serve.requests import RequestError, usage
from colossus.serve.worker import Choice, Failed, Job, Piece


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer says about itself, and whether it is a conversation's."""

    model: str
    tokenizer: Tokenizer
    chat: bool
    prompt_tokens: int
    include_usage: bool = False
    identity: str = ""
    created_s: int = 0

    @classmethod
    def new(cls, **values: Any) -> "Form":
        prefix = "chatcmpl" if values["chat"] else "cmpl"
        return cls(identity=f"{prefix}-{uuid.uuid4().hex}", created_s=int(time.time()), **values)

    def envelope(self, *, piece: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if piece else "chat.completion"
        return {"id": self.identity, "object": kind, "created": self.created_s, "model": self.model}


async def whole(form: Form, jobs: Sequence[Job]) -> dict[str, Any]:
    """All answers once they are written. Raises RequestError (500) where the engine failed."""
    choices, num_tokens = [], 0
    for index, job in enumerate(jobs):
        texts: list[str] = []
        chosen: list[Choice] = []
        while True:
            piece = await job.pieces.get()
            if isinstance(piece, Failed):
                raise RequestError(500, piece.reason)
            texts.append(piece.text)
            if piece.choice is not None:
                chosen.append(piece.choice)
            if piece.finish_reason is not None:
                break
        num_tokens += piece.num_tokens
        choice: dict[str, Any] = {"index": index, "finish_reason": piece.finish_reason}
        text = "".join(texts)
        choice |= {"message": {"role": "assistant", "content": text}} if form.chat else {"text": text}
        choice["logprobs"] = _logprobs(form, chosen) if chosen else None
        choices.append(choice)
    return {
        **form.envelope(piece=False),
        "choices": choices,
        "usage": usage(form.prompt_tokens, num_tokens),
    }


async def pieces(form: Form, jobs: Sequence[Job]) -> AsyncIterator[str]:
    """Server-sent events of all answers, interleaved as they come."""
    merged: asyncio.Queue[tuple[int, Piece | Failed]] = asyncio.Queue()

    async def forward(index: int, job: Job) -> None:
        while True:
            piece = await job.pieces.get()
            merged.put_nowait((index, piece))
            if isinstance(piece, Failed) or piece.finish_reason is not None:
                return

    tasks = [asyncio.create_task(forward(index, job)) for index, job in enumerate(jobs)]
    num_left, num_tokens = len(jobs), 0
    try:
        if form.chat:
            for index in range(len(jobs)):
                yield _event(_piece(form, index, {"role": "assistant", "content": ""}))
        while num_left:
            index, piece = await merged.get()
            if isinstance(piece, Failed):
                yield _event(RequestError(500, piece.reason).body())
                return
            if piece.finish_reason is not None:
                num_left -= 1
                num_tokens += piece.num_tokens
            if piece.text or piece.finish_reason or piece.choice:
                added = {"content": piece.text} if form.chat else piece.text
                chosen = [piece.choice] if piece.choice else []
                yield _event(_piece(form, index, added, piece.finish_reason, chosen))
        if form.include_usage:
            account = usage(form.prompt_tokens, num_tokens)
            yield _event({**form.envelope(piece=True), "choices": [], "usage": account})
        yield "data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()


def _piece(
    form: Form, index: int, added: Any, finish_reason: str | None = None, chosen: Sequence[Choice] = ()
) -> dict[str, Any]:
    choice = {"index": index, "delta" if form.chat else "text": added, "finish_reason": finish_reason}
    choice["logprobs"] = _logprobs(form, chosen) if chosen else None
    return {**form.envelope(piece=True), "choices": [choice]}


def _event(record: dict[str, Any]) -> str:
    return f"data: {json.dumps(record, ensure_ascii=False)}\n\n"


def _logprobs(form: Form, chosen: Sequence[Choice]) -> dict[str, Any]:
    def text(token: int) -> str:
        return form.tokenizer.decode([token]) if token < form.tokenizer.vocab_size else f"<{token}>"

    if not form.chat:
        return {
            "tokens": [text(one.token) for one in chosen],
            "token_logprobs": [one.logprob for one in chosen],
            # Tokens that are no text by themselves look alike; the likeliest of them stays.
            "top_logprobs": [
                {text(token): value for token, value in reversed(one.likeliest)} for one in chosen
            ],
            "text_offset": [],
        }

    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": text(token), "logprob": value, "bytes": list(text(token).encode())}

    return {
        "content": [
            {**entry(one.token, one.logprob), "top_logprobs": [entry(*pair) for pair in one.likeliest]}
            for one in chosen
        ]
    }
