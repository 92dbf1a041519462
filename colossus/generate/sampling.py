"""How the next token is chosen from the model's prediction."""

from dataclasses import dataclass

import torch
from torch import Tensor

from colossus.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """`temperature` 0 always takes the likeliest token; `top_k` and `top_p` then have nothing to choose from.

    Raises ConfigError for values that leave no token to choose.
    """

    temperature: float = 0.8
    top_k: int | None = None
    """Choose among the k likeliest tokens; None: among all."""
    top_p: float | None = None
    """Choose among the likeliest tokens that together reach this probability; None: among all."""
    max_tokens: int = 128
    seed: int | None = None
    """The same seed writes the same text; None: another one every time."""
    stop: tuple[str, ...] = ()
    """Texts to stop before."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; it is 0 or more, 1 is as the model says")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; at least the 1 likeliest token must be left to choose")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it is a probability above 0 and up to 1")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; it is at least 1")
        if "" in self.stop:
            raise ConfigError("an empty stop text would stop before the first token")


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The id chosen by float32 logits (vocab_size,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.numel():
        smallest = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # A token stays if those likelier than it do not reach top_p yet; so the likeliest always stays.
        dropped = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.scatter(0, order[dropped], -torch.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
