"""How the next token is chosen from the model's prediction."""

import math
from collections.abc import Sequence
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
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}; it is 0 or more, 1 is as the model says")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; at least the 1 likeliest token must be left to choose")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it is a probability above 0 and up to 1")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; it is at least 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it is from 0 up to 2^63 - 1")
        if "" in self.stop:
            raise ConfigError("an empty stop text would stop before the first token")


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The id chosen by logits (vocab_size,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # From the largest down, in float64: the lowest temperature then gives 0 and -inf, and never inf - inf.
    logits, ids = logits.double().sort(descending=True, stable=True)
    probabilities = ((logits - logits[0]) / sampling.temperature)[: sampling.top_k].softmax(-1)
    if sampling.top_p is not None:
        # A token stays if those likelier than it do not reach top_p yet; so the likeliest always stays.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def next_tokens(
    logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> list[int]:
    """The id chosen for each row of logits (rows, vocab_size), by a sampling and a generator of its own."""
    tokens: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        logits = logits.cpu()
    for row in drawn:
        tokens[row] = next_token(logits[row], samplings[row], generators[row])
    return tokens
