"""Norms on paper: of one vector."""

import math
from collections.abc import Mapping

from torch import Tensor

from colossus.spec.model import LayerNormSpec, NormSpec


def norm(spec: NormSpec | LayerNormSpec, x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """x normalised; times the weight and plus the bias of this name, where the model has them."""
    if isinstance(spec, LayerNormSpec):
        x = x - x.sum() / len(x)
    x = x / (x.square().sum() / len(x) + spec.epsilon).sqrt()
    if f"{name}.weight" in weights:
        x = x * weights[f"{name}.weight"]
    if f"{name}.bias" in weights:
        x = x + weights[f"{name}.bias"]
    return x


def linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """The matrix of this name times x, plus its bias where there is one."""
    made = weights[f"{name}.weight"] @ x
    return made + weights[f"{name}.bias"] if f"{name}.bias" in weights else made


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())
