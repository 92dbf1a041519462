"""From tokens to text, as they come: up to a stop text, the end of the document, or so many tokens."""

from typing import Literal

from colossus.data import Tokenizer
from colossus.generate.sampling import Sampling

FinishReason = Literal["stop", "length"]


class TextWriter:
    """Takes a row's tokens one by one and gives the text that is certain so far.

    Attributes:
        num_tokens: how many came, a closing one among them.
        finish_reason: `stop` at a stop text or a token that ends, `length` at `sampling.max_tokens`; None: goes on.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, ends: frozenset[int]) -> None:
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._ends, self._vocab_size = ends, tokenizer.vocab_size
        self._decoder = tokenizer.stream()
        self._stop, self._max_tokens = sampling.stop, sampling.max_tokens
        self._held = ""

    def push(self, token: int) -> str:
        """The text that can be shown now: not what may be the beginning of a stop text."""
        self.num_tokens += 1
        if token in self._ends or token >= self._vocab_size:
            self.finish_reason = "stop"
            return self.close()
        text = self._take(self._decoder.push(token))
        if self.finish_reason is None and self.num_tokens >= self._max_tokens:
            self.finish_reason = "length"
            text += self.close()
        return text

    def close(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._take(self._decoder.finish())
        text, self._held = text + self._held, ""
        return text

    def _take(self, piece: str) -> str:
        held = self._held + piece
        found = [(held.find(text) + len(text), held.find(text)) for text in self._stop if text in held]
        if found:  # the one that is whole first
            self.finish_reason, self._held = "stop", ""
            return held[: min(found)[1]]
        safe = len(held) - max((_begun(held, text) for text in self._stop), default=0)
        self._held = held[safe:]
        return held[:safe]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
