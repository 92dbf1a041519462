"""The routes."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from colossus.errors import ColossusError
from colossus.generate.chat import chat_format
from colossus.generate.generate import prompt_ids
from colossus.generate.load import LoadedModel
from colossus.serve.answers import Form, pieces, whole
from colossus.serve.requests import (
    DEFAULT_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    RequestError,
    check_text,
    parse,
)
from colossus.serve.worker import Busy, Job, Stopping, Worker

MAX_BODY_BYTES = 4_000_000
MAX_JOBS = 64
"""Answers that one request may ask for, over all its prompts."""
RETRY_AFTER_S = 1


def build_app(loaded: LoadedModel, worker: Worker, *, local: bool = True) -> Starlette:
    """OpenAI's routes over a worker that runs; one model, whatever name a request gives it.

    `local` where only this machine is served: then a request must be for this machine by name, too, so that no web page
    reaches the server by a name of its own that leads here.
    """
    tokenizer, context = loaded.tokenizer, loaded.model.spec.context_tokens
    conversation = chat_format(loaded)
    created_s = int(loaded.path.stat().st_mtime)

    async def models(request: Request) -> Response:
        model = {"id": loaded.name, "object": "model", "created": created_s, "owned_by": "colossus"}
        if name := request.path_params.get("name"):
            if name != loaded.name:
                raise RequestError(
                    404, f"there is no model {name!r}; this server has {loaded.name!r}", param="model"
                )
            return JSONResponse(model)
        return JSONResponse({"object": "list", "data": [model]})

    async def health(request: Request) -> Response:
        counts = {"active": worker.num_active, "waiting": worker.num_waiting}
        return JSONResponse({"status": "ok", **counts, "max_batch": worker.max_rows})

    def room(ids: Sequence[int], asked: int | None, param: str) -> int:
        """How many tokens the answer may have."""
        left = context - len(ids)
        if left < 1:
            raise RequestError(
                400,
                f"the prompt has {len(ids):,} tokens; the model's context of {context:,} has no room for an answer",
                param=param,
                code="context_length_exceeded",
            )
        return min(left, asked or DEFAULT_MAX_TOKENS)

    def token_ids(prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            check_text(prompt, "prompt")
            try:
                return prompt_ids(tokenizer, prompt, loaded.borders)
            except ColossusError as error:
                raise RequestError(400, str(error), param="prompt") from None
        if not prompt or not all(0 <= token < tokenizer.vocab_size for token in prompt):
            raise RequestError(
                400,
                f"prompt has no ids, or some that are not from 0 to {tokenizer.vocab_size - 1:,}",
                param="prompt",
            )
        return prompt

    async def completions(request: Request) -> Response:
        asked: CompletionRequest = parse(CompletionRequest, await _body(request))
        prompts = asked.prompts()
        if len(prompts) * asked.n > MAX_JOBS:
            raise RequestError(
                400, f"that is {len(prompts) * asked.n} answers; {MAX_JOBS} at the most", param="prompt"
            )
        encoded = await asyncio.to_thread(lambda: [token_ids(prompt) for prompt in prompts])
        jobs = [
            Job(ids, sampling, loaded.borders.ends, asked.logprobs)
            for ids in encoded
            for sampling in asked.samplings(room(ids, asked.asked_tokens, "prompt"))
        ]
        return await _answer(request, asked, jobs, chat=False, prompt_tokens=sum(map(len, encoded)))

    async def chat(request: Request) -> Response:
        asked: ChatRequest = parse(ChatRequest, await _body(request))
        if asked.tools:
            raise RequestError(400, "tools are not supported", param="tools")
        messages = [message.plain() for message in asked.messages]
        for i, message in enumerate(messages):
            check_text(message["content"], f"messages.{i}.content")
        try:
            ids = await asyncio.to_thread(conversation.ids, messages)
        except ColossusError as error:
            raise RequestError(400, str(error), param="messages") from None
        max_tokens = room(ids, asked.asked_tokens, "messages")
        num_logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        samplings = asked.samplings(max_tokens, conversation.stop)
        jobs = [Job(ids, sampling, conversation.ends, num_logprobs) for sampling in samplings]
        return await _answer(request, asked, jobs, chat=True, prompt_tokens=len(ids))

    async def _answer(
        request: Request, asked: Any, jobs: Sequence[Job], *, chat: bool, prompt_tokens: int
    ) -> Response:
        options = asked.stream_options
        form = Form.new(
            model=loaded.name,
            tokenizer=tokenizer,
            chat=chat,
            prompt_tokens=prompt_tokens,
            include_usage=options is not None and options.include_usage,
        )
        worker.submit(jobs)
        if asked.stream:
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(_until_gone(form, jobs), media_type="text/event-stream", headers=headers)
        writing = asyncio.create_task(whole(form, jobs))
        watching = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait((writing, watching), return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                raise ClientDisconnect
            return JSONResponse(await writing)
        finally:
            writing.cancel()
            watching.cancel()
            worker.cancel(jobs)

    async def _until_gone(form: Form, jobs: Sequence[Job]) -> AsyncIterator[str]:
        try:
            async for piece in pieces(form, jobs):
                yield piece
        finally:  # a client that goes away cancels this
            worker.cancel(jobs)

    return Starlette(
        middleware=[Middleware(_LocalNames)] if local else [],
        routes=[
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", models),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/health", health),
        ],
        exception_handlers={
            RequestError: _refused,
            Busy: _busy,
            Stopping: _stopping,
            HTTPException: _http,
            ClientDisconnect: _nobody,
            Exception: _unexpected,
        },
    )


class _LocalNames:
    """Turns away requests whose Host is not this machine's own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "").rpartition("@")[2]
            name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
            if name.lower() not in ("localhost", "127.0.0.1", "[::1]"):
                refused = RequestError(400, f"the Host {name[:100]!r} is not this machine's", code="host")
                await JSONResponse(refused.body(), 400)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _gone(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """All of it, unless it is too large, by its header or as it comes."""
    too_large = RequestError(413, f"the body has more than {MAX_BODY_BYTES:,} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
        raise too_large
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MAX_BODY_BYTES:
            raise too_large
    return bytes(content)


# --- errors ---


async def _refused(request: Request, error: Any) -> Response:
    headers = {"Connection": "close"} if error.status == 413 else None
    return JSONResponse(error.body(), error.status, headers)


async def _busy(request: Request, error: Exception) -> Response:
    refused = RequestError(503, "the server has all the requests that it can hold; try again", code="busy")
    return JSONResponse(refused.body(), 503, {"Retry-After": str(RETRY_AFTER_S)})


async def _stopping(request: Request, error: Exception) -> Response:
    refused = RequestError(503, "the server is ending", code="stopping")
    return JSONResponse(refused.body(), 503, {"Connection": "close"})


async def _http(request: Request, error: Any) -> Response:
    message = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }
    refused = RequestError(error.status_code, message.get(error.status_code, str(error.detail)))
    return JSONResponse(refused.body(), error.status_code, error.headers)


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _unexpected(request: Request, error: Exception) -> Response:
    return JSONResponse(RequestError(500, "the server failed on this request; its log says how").body(), 500)
