"""Attention on paper: every query looks at every key that it may see, one after the other."""

import math
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from colossus.spec.model import (
    AttentionSpec,
    LatentAttentionSpec,
    Llama3Scaling,
    ModelSpec,
    NormSpec,
    RopeSpec,
    YarnScaling,
)
from tests.models.reference_norm import linear, norm

Layer = Mapping[str, Tensor]
Heads = list[Tensor]
"""Of one token: a vector for each head."""


def attention(
    spec: ModelSpec,
    layer: Layer,
    number: int,
    inputs: Sequence[Tensor],
    documents: Sequence[int],
    positions: Sequence[int],
) -> list[Tensor]:
    """What attention gives each token of one row, in layer `number`."""
    part = spec.attention
    heads = _latent_heads if isinstance(part, LatentAttentionSpec) else _heads
    made = [heads(spec, layer, x, position) for x, position in zip(inputs, positions, strict=True)]
    window = None
    if part.window is not None:
        every = part.window.full_every
        sees_all = every is not None and (number + 1) % every == 0
        window = None if sees_all else part.window.tokens
    outputs = []
    for i in range(len(inputs)):
        visible = [j for j in range(i + 1) if documents[j] == documents[i]]
        if window is not None:
            visible = [j for j in visible if i - j < window]
        mixed = []
        for head in range(part.num_heads):
            keys = [made[j][1][head * part.num_kv_heads // part.num_heads] for j in visible]
            values = [made[j][2][head * part.num_kv_heads // part.num_heads] for j in visible]
            sink = layer["attention.sinks"][head] if "attention.sinks" in layer else None
            scores = [_score(part, made[i][0][head], key, positions[i]) for key in keys]
            mixed.append(_weighted(scores, values, sink))
        outputs.append(linear(torch.cat(mixed), layer, "attention.output"))
    return outputs


def _score(
    part: AttentionSpec | LatentAttentionSpec, query: Tensor, key: Tensor, query_position: int
) -> Tensor:
    scale = part.score_scale or 1 / math.sqrt(part.head_dim)
    if part.rope is not None and isinstance(part.rope.scaling, YarnScaling):
        yarn = part.rope.scaling
        scale *= (0.1 * yarn.magnitude * math.log(yarn.factor) + 1) ** 2
    score = query @ key * scale
    if isinstance(part, AttentionSpec):
        if part.score_soft_cap is not None:
            score = part.score_soft_cap * (score / part.score_soft_cap).tanh()
        first = part.score_temperature_tokens
        if first is not None and query_position > first:
            score = score * math.log(query_position) / math.log(first)
    return score


def _weighted(scores: list[Tensor], values: list[Tensor], sink: Tensor | None) -> Tensor:
    """Softmax over scores and sink, times values; the sink's own value is nothing."""
    raised = [score.exp() for score in scores]
    total = sum(raised) if sink is None else sum(raised) + sink.exp()
    return sum(weight / total * value for weight, value in zip(raised, values, strict=True))


# --- queries, keys and values of one token ---


def _heads(spec: ModelSpec, layer: Layer, x: Tensor, position: int) -> tuple[Heads, Heads, Heads]:
    part = spec.attention
    assert isinstance(part, AttentionSpec)
    size = part.head_dim

    def split(name: str) -> Heads:
        made = linear(x, layer, f"attention.{name}")
        # Root mean square over all heads together, or over each by itself.
        own_norm = NormSpec(epsilon=spec.norm.epsilon)
        if name != "value" and part.qk_norm_weights == "all_heads":
            made = norm(own_norm, made, layer, f"attention.{name}_norm")
        heads = [made[start : start + size] for start in range(0, len(made), size)]
        if name == "value":
            return heads
        if part.qk_norm and part.qk_norm_weights != "all_heads":
            heads = [norm(own_norm, head, layer, f"attention.{name}_norm") for head in heads]
        return heads if part.rope is None else [turn(head, position, part.rope) for head in heads]

    return split("query"), split("key"), split("value")


def _latent_heads(spec: ModelSpec, layer: Layer, x: Tensor, position: int) -> tuple[Heads, Heads, Heads]:
    """arXiv:2405.04434, equations 37 to 47."""
    part = spec.attention
    assert isinstance(part, LatentAttentionSpec)
    if part.q_lora_rank is None:
        all_queries = linear(x, layer, "attention.query")
    else:
        short = norm(spec.norm, linear(x, layer, "attention.query_down"), layer, "attention.query_norm")
        all_queries = linear(short, layer, "attention.query_up")
    down = linear(x, layer, "attention.key_value_down")
    latent = norm(spec.norm, down[: part.kv_lora_rank], layer, "attention.key_value_norm")
    shared = turn(down[part.kv_lora_rank :], position, part.rope)
    up = linear(latent, layer, "attention.key_value_up")
    queries, keys, values = [], [], []
    for head in range(part.num_heads):
        query = all_queries[head * part.head_dim : (head + 1) * part.head_dim]
        turned = turn(query[part.nope_head_dim :], position, part.rope)
        queries.append(torch.cat([query[: part.nope_head_dim], turned]))
        size = part.nope_head_dim + part.value_head_dim
        own = up[head * size : (head + 1) * size]
        keys.append(torch.cat([own[: part.nope_head_dim], shared]))
        values.append(own[part.nope_head_dim :])
    return queries, keys, values


# --- rotations ---


def turn(x: Tensor, position: int, rope: RopeSpec) -> Tensor:
    """One head's vector: channel i and channel i + half, of those that turn, are a point of the plane."""
    turning = round(rope.rotated_fraction * len(x))
    half = turning // 2
    made = list(x)
    for i in range(half):
        angle = position * speed(i, turning, rope)
        made[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        made[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return torch.stack(made)


@cache
def speed(pair: int, num_channels: int, rope: RopeSpec) -> float:
    """Radians per token of a pair of channels."""

    def plain(number: float) -> float:
        return rope.base ** (-2 * number / num_channels)

    if rope.scaling is None:
        return plain(pair)
    wavelength = 2 * math.pi / plain(pair)
    original, factor = rope.scaling.original_context_tokens, rope.scaling.factor
    if isinstance(rope.scaling, Llama3Scaling):
        longest_kept = original / rope.scaling.high_frequency_factor
        shortest_stretched = original / rope.scaling.low_frequency_factor
        if wavelength < longest_kept:
            return plain(pair)
        if wavelength > shortest_stretched:
            return plain(pair) / factor
        low, high = rope.scaling.low_frequency_factor, rope.scaling.high_frequency_factor
        share = (original / wavelength - low) / (high - low)
        return (1 - share) * plain(pair) / factor + share * plain(pair)

    def where_turns(times: float) -> float:
        """The pair, as a real number, that turns so often within the original context: found by halving."""
        low, high = -float(num_channels), 2.0 * num_channels
        for _ in range(100):
            middle = (low + high) / 2
            more = original * plain(middle) / (2 * math.pi) > times
            low, high = (middle, high) if more else (low, middle)
        return low

    first, last = where_turns(rope.scaling.beta_fast), where_turns(rope.scaling.beta_slow)
    if rope.scaling.whole_channels:
        first, last = math.floor(first), math.ceil(last)
    # As in the authors' code: within the channels there are.
    first, last = max(first, 0), min(last, num_channels - 1)
    stretched = min(max((pair - first) / (last - first), 0), 1)
    return stretched * plain(pair) / factor + (1 - stretched) * plain(pair)
