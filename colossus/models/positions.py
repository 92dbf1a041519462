"""Where a token stands: rotary positions, and counting within a document."""

import math

import torch
from torch import Tensor, nn

from colossus.spec.model import Llama3Scaling, RopeSpec, YarnScaling

Rotation = tuple[Tensor, Tensor]
"""Cosines and signed sines for each channel that turns: (rows or 1, tokens, 1, channels), as `Rope` makes them."""


class Rope(nn.Module):
    """Rotary positions (arXiv:2104.09864): channels i, i + size/2 turn by position · base^(-2i/size).

    One for all layers of a model: it makes the rotation of a pass, which `rotate` applies in each.
    """

    frequencies: Tensor

    def __init__(self, spec: RopeSpec, head_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.num_channels = int(spec.rotated_fraction * head_dim)
        self.register_buffer(
            "frequencies", torch.empty(self.num_channels // 2, dtype=torch.float64), persistent=False
        )

    def reset_buffers(self) -> None:
        """Fills the frequencies; to be called once the module is on a real device."""
        self.frequencies.copy_(frequencies(self.spec, self.num_channels))

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """positions: (rows or 1, tokens). In float64 up to here: far positions keep their angle."""
        angles = positions[..., None].double() * self.frequencies
        cosines, sines = angles.cos(), angles.sin()
        cosines, sines = torch.cat([cosines, cosines], -1), torch.cat([-sines, sines], -1)
        # By way of float32, as kernels that keep tables do, also where the model runs in float64.
        return cosines.float().to(dtype).unsqueeze(2), sines.float().to(dtype).unsqueeze(2)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x: (rows, tokens, heads, head_dim). Its first channels turn, as many as the rotation has."""
    cosines, sines = rotation
    num_channels = cosines.shape[-1]
    all_turn = num_channels == x.shape[-1]
    turning = x if all_turn else x[..., :num_channels]
    turned = turning * cosines + turning.roll(num_channels // 2, -1) * sines
    return turned if all_turn else torch.cat([turned, x[..., num_channels:]], -1)


def frequencies(spec: RopeSpec, num_channels: int) -> Tensor:
    """Radians per token of each pair of channels, fastest first: float64 (num_channels / 2,)."""
    plain = spec.base ** -(torch.arange(0, num_channels, 2, dtype=torch.float64) / num_channels)
    match spec.scaling:
        case None:
            return plain
        case Llama3Scaling():
            return _llama3(plain, spec.scaling)
        case YarnScaling():
            return _yarn(plain, spec.scaling, spec.base)


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    turns = scaling.original_context_tokens * plain / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept + plain / scaling.factor * (1 - kept)


def _yarn(plain: Tensor, scaling: YarnScaling, base: float) -> Tensor:
    def channel(turns: float) -> float:
        """The pair of channels, as a real number, that turns so often within the original context."""
        wavelength = scaling.original_context_tokens / (turns * 2 * math.pi)
        return len(plain) * math.log(wavelength) / math.log(base)

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.whole_channels:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * len(plain) - 1)
    if first == last:
        last += 0.001  # a step in place of a ramp
    slowed = ((torch.arange(len(plain), dtype=torch.float64) - first) / (last - first)).clamp(0, 1)
    return plain * (1 - slowed) + plain / scaling.factor * slowed


def score_multiplier(rope: RopeSpec | None) -> float:
    """What YaRN multiplies scores by, for their entropy to stay (arXiv:2309.00071, section 3.4)."""
    if rope is None or not isinstance(rope.scaling, YarnScaling):
        return 1.0
    return (0.1 * rope.scaling.magnitude * math.log(rope.scaling.factor) + 1) ** 2


def positions_in_document(documents: Tensor) -> Tensor:
    """How many tokens of its own document stand before each token: int64, the shape of documents, (rows, tokens)."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    opens = torch.ones_like(documents, dtype=torch.bool)
    opens[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(opens, index, 0).cummax(1).values


def score_temperatures(positions: Tensor, num_tokens: int) -> Tensor:
    """What scores of a query at each position are multiplied by: ln(position) / ln(num_tokens) from there on."""
    return (positions.clamp(min=num_tokens).float().log() / math.log(num_tokens)).float()
