"""From a loss to parameters and tokens, and back: L(N, D) = E + A / N^α + B / D^β, in nats per token.

Hoffmann et al. 2022 ("Chinchilla") fitted this law to runs of up to 16B parameters; Besiroglu et al. 2024 read the
same runs off the paper's figure and fitted it again. The second fit is what the likely value comes from, because it
agrees with the first paper's own two other methods and with its 70B model; how far the two differ is the range. Both
are of one corpus and one tokenizer: on other text the loss is another, and what stays is how it falls.
"""

import math
from typing import NamedTuple

from colossus.errors import ConfigError
from colossus.spec.base import Frozen
from colossus.spec.goal import Amount
from colossus.spec.ranged import Ranged
from colossus.units import format_count

FLOPS_PER_PARAMETER_AND_TOKEN = 6
"""C = 6 N D, as both papers count compute."""


class Optimum(NamedTuple):
    """The size and the tokens that reach the least loss for their compute."""

    num_params: float
    tokens: float

    @property
    def flops(self) -> float:
        return FLOPS_PER_PARAMETER_AND_TOKEN * self.num_params * self.tokens


class ScalingLaw(Frozen):
    """One fit of L(N, D) = E + A / N^α + B / D^β."""

    name: str
    source: str
    irreducible: Amount
    """E: what no size and no number of tokens gets below."""
    params_factor: Amount
    params_exponent: Amount
    tokens_factor: Amount
    tokens_exponent: Amount

    def loss(self, num_params: float, tokens: float) -> float:
        """Nats per token of `num_params` parameters trained on `tokens` tokens, each seen once."""
        _positive(num_params=num_params, tokens=tokens)
        return self.floor(num_params) + float(self.tokens_factor / tokens**self.tokens_exponent)

    def floor(self, num_params: float) -> float:
        """What this size tends to on endless tokens: E + A / N^α."""
        return self.irreducible + float(self.params_factor / num_params**self.params_exponent)

    def smallest_size(self, loss: float) -> float:
        """The parameters that would reach `loss` on endless tokens; fewer never do."""
        self._above_irreducible(loss)
        return float((self.params_factor / (loss - self.irreducible)) ** (1 / self.params_exponent))

    def tokens_for_loss(self, num_params: float, loss: float) -> float:
        """Tokens after which `num_params` parameters reach `loss`. Raises ConfigError when they never do."""
        _positive(num_params=num_params, loss=loss)
        smallest = self.smallest_size(loss)
        left = loss - self.floor(num_params)
        if left <= 0:
            raise ConfigError(
                f"a loss of {loss:g} is below the {self.floor(num_params):.3f} that "
                f"{format_count(num_params)} parameters reach on endless tokens ({self.name}); it takes more than "
                f"{format_count(smallest)} parameters, and the least compute with "
                f"{format_count(self.optimum_for_loss(loss).num_params)}"
            )
        return float((self.tokens_factor / left) ** (1 / self.tokens_exponent))

    def optimum_for_flops(self, flops: float) -> Optimum:
        """The size and tokens of the least loss that `flops` buy (Hoffmann et al. 2022, equation 4)."""
        _positive(flops=flops)
        a, b = self.params_exponent, self.tokens_exponent
        gain = (a * self.params_factor / (b * self.tokens_factor)) ** (1 / (a + b))
        product = flops / FLOPS_PER_PARAMETER_AND_TOKEN
        return Optimum(gain * product ** (b / (a + b)), product ** (a / (a + b)) / gain)

    def optimum_for_loss(self, loss: float) -> Optimum:
        """The size and tokens that reach `loss` with the least compute.

        There α A / N^α = β B / D^β, so the loss above E divides between size and tokens as β to α.
        """
        _positive(loss=loss)
        self._above_irreducible(loss)
        a, b = self.params_exponent, self.tokens_exponent
        above = loss - self.irreducible
        num_params = (self.params_factor * (a + b) / (above * b)) ** (1 / a)
        tokens = (self.tokens_factor * (a + b) / (above * a)) ** (1 / b)
        return Optimum(float(num_params), float(tokens))

    def _above_irreducible(self, loss: float) -> None:
        if not loss > self.irreducible:
            raise ConfigError(
                f"a loss of {loss:g} is not above {self.irreducible:g}, which by the law of {self.name} no size and "
                f"no number of tokens gets below; ask for a higher loss, or give the goal in tokens"
            )


_SOURCE = "Constants from memory, found the same in several public files that quote the papers."
HOFFMANN = ScalingLaw(
    name="Hoffmann et al. 2022",
    source=f"arXiv:2203.15556, approach 3, rounded as printed. {_SOURCE}",
    irreducible=1.69, params_factor=406.4, params_exponent=0.34, tokens_factor=410.7, tokens_exponent=0.28,
)  # fmt: skip
BESIROGLU = ScalingLaw(
    name="Besiroglu et al. 2024",
    source=f"arXiv:2404.10102; standard errors E 0.03, A 125, B 1293, α 0.02, β 0.02. {_SOURCE}",
    irreducible=1.8172, params_factor=482.01, params_exponent=0.3478, tokens_factor=2085.43,
    tokens_exponent=0.3658,
)  # fmt: skip


def loss(num_params: float, tokens: float) -> Ranged:
    """Nats per token: likely as by the replication, from the lower to the higher of the two fits."""
    return _between(BESIROGLU.loss(num_params, tokens), HOFFMANN.loss(num_params, tokens))


def tokens_for_loss(num_params: float, loss: float) -> Ranged:
    """Tokens after which `num_params` parameters reach `loss`.

    Raises ConfigError, with the smallest size that would do, when the likely law says they never do.
    """
    # The replication's floor is the higher one at every size, so where it has an answer the other has one too.
    likely = BESIROGLU.tokens_for_loss(num_params, loss)
    return _between(likely, HOFFMANN.tokens_for_loss(num_params, loss))


def compute_optimal_for_flops(flops: float) -> Optimum:
    """Parameters and tokens of the least loss for `flops`, by the likely law."""
    return BESIROGLU.optimum_for_flops(flops)


def compute_optimal_for_loss(loss: float) -> Optimum:
    """Parameters and tokens that reach `loss` with the least compute, by the likely law."""
    return BESIROGLU.optimum_for_loss(loss)


def _between(likely: float, other: float) -> Ranged:
    return Ranged(low=min(likely, other), likely=likely, high=max(likely, other))


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name} is {value}; a scaling law needs it positive and finite")
