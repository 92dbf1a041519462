"""Causal grouped-query attention over packed documents, with a cache for generation."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colossus.models.parts import Linear, Rope
from colossus.spec.model import AttentionSpec, NormSpec

EXPLICIT_ATTENTION_MAX_TOKENS = 512
"""Up to this length a CPU computes attention faster by three plain operations than by the fused kernel, whose
blocking costs more than it saves while the scores still fit the cache (benchmarks/throughput.md)."""


def attention_mask(query_documents: Tensor, key_documents: Tensor, first_position: int) -> Tensor:
    """Which key each query sees: those of its own document, up to its own position.

    query_documents: (batch, queries), key_documents: (batch, keys), both the index of the document that a
    token belongs to; query i stands at position first_position + i. Returns bool (batch, 1, queries, keys).
    """
    positions = torch.arange(key_documents.shape[1], device=key_documents.device)
    causal = positions <= positions[first_position : first_position + query_documents.shape[1], None]
    same_document = query_documents[:, :, None] == key_documents[:, None, :]
    return (same_document & causal).unsqueeze(1)


class _ExplicitAttention(torch.autograd.Function):
    """softmax(q·kᵀ + bias)·v in plain operations, keeping the probabilities for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        scores = torch.matmul(query, key.transpose(-1, -2))
        scores += bias
        probabilities = torch.softmax(scores, -1)
        ctx.save_for_backward(query, key, value, probabilities)
        return torch.matmul(probabilities, value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, probabilities = ctx.saved_tensors
        grad_probabilities = torch.matmul(gradient, value.transpose(-1, -2))
        grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
        return (
            torch.matmul(grad_scores, key),
            torch.matmul(grad_scores.transpose(-1, -2), query),
            torch.matmul(probabilities.transpose(-1, -2), gradient),
            None,
        )


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """query: (batch, heads, queries, head_dim), key and value: (batch, kv_heads, keys, head_dim), mask: bool,
    broadcastable to (batch, heads, queries, keys). Returns the shape of query."""
    num_groups = query.shape[1] // key.shape[1]
    if query.device.type == "cpu" and key.shape[2] <= EXPLICIT_ATTENTION_MAX_TOKENS:
        if num_groups > 1:
            key, value = key.repeat_interleave(num_groups, 1), value.repeat_interleave(num_groups, 1)
        bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -1e9)
        return _ExplicitAttention.apply(query * query.shape[-1] ** -0.5, key, value, bias)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=num_groups > 1)


class LayerCache:
    """Keys and values of what one layer has seen: (batch, kv_heads, context_tokens, head_dim) each."""

    def __init__(self, batch: int, spec: AttentionSpec, context_tokens: int, like: Tensor) -> None:
        shape = (batch, spec.num_kv_heads, context_tokens, spec.head_dim)
        self.key, self.value = like.new_empty(shape), like.new_empty(shape)

    def extend(self, key: Tensor, value: Tensor, first_position: int) -> tuple[Tensor, Tensor]:
        """Adds the keys and values of new tokens and returns those of all tokens so far."""
        end = first_position + key.shape[2]
        self.key[:, :, first_position:end] = key
        self.value[:, :, first_position:end] = value
        return self.key[:, :, :end], self.value[:, :, :end]


class Attention(nn.Module):
    def __init__(self, hidden_size: int, spec: AttentionSpec, norm: NormSpec, context_tokens: int) -> None:
        super().__init__()
        self.spec = spec
        self.norm_epsilon = norm.epsilon
        self.query = Linear(hidden_size, spec.num_heads * spec.head_dim)
        self.key = Linear(hidden_size, spec.num_kv_heads * spec.head_dim)
        self.value = Linear(hidden_size, spec.num_kv_heads * spec.head_dim)
        self.output = Linear(spec.num_heads * spec.head_dim, hidden_size)
        self.rope = Rope(spec.rope, spec.head_dim, context_tokens) if spec.rope is not None else None

    def forward(
        self, x: Tensor, mask: Tensor, first_position: int = 0, cache: LayerCache | None = None
    ) -> Tensor:
        """x: (batch, tokens, hidden_size); mask as of `attention_mask`."""
        heads = (*x.shape[:2], -1, self.spec.head_dim)
        query, key, value = self.query(x).view(heads), self.key(x).view(heads), self.value(x).view(heads)
        if self.spec.qk_norm:
            query, key = self._normalise(query), self._normalise(key)
        if self.rope is not None:
            query, key = self.rope(query, first_position), self.rope(key, first_position)
        if self.spec.score_scale is not None:
            query = query * (self.spec.score_scale * math.sqrt(self.spec.head_dim))
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.extend(key, value, first_position)
        mixed = attend(query, key, value, mask)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _normalise(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self.norm_epsilon)
