"""Causal grouped-query attention over packed documents."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from colossus.models.attend import Sees, attend, who_sees
from colossus.models.cache import LayerCache
from colossus.models.parts import Linear, RmsNorm
from colossus.models.positions import Rotation, rotate, score_multiplier
from colossus.spec.model import AttentionSpec, NormSpec


@dataclass(frozen=True, slots=True)
class Sight:
    """What the attention of all layers of one pass shares: who sees whom, and where each token stands.

    Of `who_sees`, or None where one token of each row sees all keys: `full` for layers that see all of a document,
    `windowed` for those with a window. `rotation` and `temperatures`
    where the model has them. `attend` is attention itself, wherever keys and values are.
    """

    full: Sees | None
    windowed: Sees | None
    rotation: Rotation | None
    temperatures: Tensor | None
    attend: Callable[..., Tensor] = attend


@dataclass(frozen=True, slots=True)
class Portion:
    """Which tokens of each row a pass computes, by index: int64 (1, tokens) each.

    `held`: whose hidden states stand here; `attended`: whose queries, keys and values are made here; `queries`: whose
    queries meet keys here, when `attend` has brought both together.
    """

    held: Tensor
    attended: Tensor
    queries: Tensor
    attend: Callable[..., Tensor] = attend
    who_sees: Callable[..., Sees] = who_sees


class Attention(nn.Module):
    """Several heads of queries share keys and values (arXiv:2305.13245)."""

    def __init__(self, hidden_size: int, spec: AttentionSpec, norm_epsilon: float, *, windowed: bool) -> None:
        super().__init__()
        self.spec, self.windowed = spec, windowed
        self.scale = (spec.score_scale or spec.head_dim**-0.5) * score_multiplier(spec.rope)
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.sinks = nn.Parameter(torch.empty(spec.num_heads)) if spec.sinks else None
        self.query = Linear(hidden_size, query_size, bias=spec.bias is not None)
        self.key = Linear(hidden_size, kv_size, bias=spec.bias is not None)
        self.value = Linear(hidden_size, kv_size, bias=spec.bias is not None)
        self.output = Linear(query_size, hidden_size, bias=spec.bias == "all")
        self.query_norm = _head_norm(spec, spec.num_heads, norm_epsilon)
        self.key_norm = _head_norm(spec, spec.num_kv_heads, norm_epsilon)

    def forward(self, x: Tensor, sight: Sight, cache: LayerCache | None = None) -> Tensor:
        """x: (rows, tokens, hidden_size)."""
        heads = (*x.shape[:2], -1, self.spec.head_dim)
        query = self.query_norm(self.query(x)).view(heads)
        key = self.key_norm(self.key(x)).view(heads)
        value = self.value(x).view(heads)
        if sight.rotation is not None:
            query, key = rotate(query, sight.rotation), rotate(key, sight.rotation)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.extend(key, value)
        mixed = sight.attend(
            query,
            key,
            value,
            sight.windowed if self.windowed else sight.full,
            scale=self.scale,
            soft_cap=self.spec.score_soft_cap,
            temperatures=sight.temperatures,
            sinks=self.sinks,
        )
        return self.output(mixed.transpose(1, 2).flatten(2))


class _NormOfEachHead(RmsNorm):
    """Of the channels of one head, the same weights for all heads."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(-1, (-1, self.head_dim))).flatten(-2)

    def __init__(self, head_dim: int, spec: NormSpec) -> None:
        super().__init__(head_dim, spec)
        self.head_dim = head_dim


def _head_norm(spec: AttentionSpec, num_heads: int, epsilon: float) -> nn.Module:
    """Normalises the queries or keys of `num_heads` heads, side by side in the last dim."""
    if not spec.qk_norm:
        return nn.Identity()
    norm = NormSpec(epsilon=epsilon, weighted=spec.qk_norm_weights is not None)
    if spec.qk_norm_weights == "all_heads":
        return RmsNorm(num_heads * spec.head_dim, norm)
    return _NormOfEachHead(spec.head_dim, norm)
