"""What clients may ask for, as OpenAI names it, and how they hear what is wrong with it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from colossus.errors import ConfigError
from colossus.generate import Sampling

MAX_N = 16
MAX_STOPS = 16
DEFAULT_MAX_TOKENS = 256


class RequestError(Exception):
    """A request that cannot be served: HTTP status, and OpenAI's `message`, `type`, `param` and `code`."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    # Fields that have no meaning here are passed over, as other servers do; a wrong type is an error.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class StreamOptions(_Strict):
    """`include_usage`: one more piece at the end, with the numbers of tokens."""

    include_usage: bool = False


class _Asked(_Strict):
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: int | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def asked_tokens(self) -> int | None:
        """How many tokens the client wants at the most."""
        return self.max_tokens

    def samplings(self, max_tokens: int, more_stops: tuple[str, ...] = ()) -> list[Sampling]:
        """One for each of `n` answers; with a seed each has its own, so that they differ. Raises RequestError."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MAX_STOPS:
            raise RequestError(400, f"stop has {len(stops)} texts; {MAX_STOPS} at the most", param="stop")
        try:
            return [
                Sampling(
                    temperature=1.0 if self.temperature is None else self.temperature,
                    top_p=self.top_p,
                    top_k=self.top_k if self.top_k != -1 else None,
                    max_tokens=max_tokens,
                    seed=None if self.seed is None else (self.seed + i) % 2**63,
                    stop=stops + more_stops,
                )
                for i in range(self.n)
            ]
        except ConfigError as error:
            raise RequestError(400, str(error)) from None


class CompletionRequest(_Asked):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each a text, or token ids. Raises RequestError for what this server does not do."""
        for name, what in (("echo", "repeating the prompt"), ("suffix", "writing before a suffix")):
            if getattr(self, name):
                raise RequestError(
                    400, f"{name} is not supported: {what} is not what this server does", param=name
                )
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError(400, "best_of is not supported; ask for n answers and choose", param="best_of")
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise RequestError(400, "prompt is an empty list", param="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, str]:
        """Role and text."""
        parts = self.content if isinstance(self.content, list) else None
        text = "\n".join(part.text for part in parts) if parts is not None else self.content
        return {"role": self.role, "content": text or ""}  # type: ignore[dict-item]


class ChatRequest(_Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None

    @property
    def asked_tokens(self) -> int | None:
        """`max_completion_tokens`, or what it was called before."""
        return self.max_completion_tokens or self.max_tokens


def parse(kind: type[_Asked], content: bytes) -> Any:
    """The request in a body. Raises RequestError that names the first field that is wrong."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        inner = ("str", "TextPart")  # which of the types that a field may have: of no interest to a client
        where = ".".join(str(part) for part in first["loc"] if part not in inner and "[" not in str(part))
        message = f"{where}: {first['msg']}" if where else first["msg"]
        raise RequestError(400, message[:500], param=where or None) from None
    except RecursionError:
        raise RequestError(400, "the body is nested too deeply") from None


def check_text(text: str, param: str) -> None:
    """Raises RequestError for half a surrogate pair, which JSON can spell and text cannot have."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(
            400, f"{param} has half of a surrogate pair, which is no text", param=param
        ) from None


def usage(prompt_tokens: int, completion_tokens: int) -> Mapping[str, int]:
    """OpenAI's account of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
