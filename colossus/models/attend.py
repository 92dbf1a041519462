"""Attention itself: softmax(query · keyᵀ) · value, in the way that suits the machine and the length."""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from colossus.models.blocks import attend_in_blocks, attention_blocks

Sees = Tensor | BlockMask
"""Who sees whom, in one of two forms: a number for each pair of tokens, or blocks of them."""

EXPLICIT_ATTENTION_MAX_TOKENS = 512
"""Up to this length a CPU computes attention faster by three plain operations than by the fused kernel, whose
blocking costs more than it saves while the scores still fit the cache (docs/LOG.md)."""

_BLOCK_QUERIES = 512
"""Queries whose scores stand in memory at once where no fused kernel can be used."""

_HIDDEN = -1e9
"""Added to scores that a query must not see. Finite, so that a row without anything to see is no NaN."""


def who_sees(
    query_documents: Tensor,
    key_documents: Tensor,
    query_index: Tensor,
    dtype: torch.dtype,
    window_tokens: int | None = None,
) -> Sees:
    """In the form that attention is fastest with on this machine; arguments are those of `attention_bias`."""
    if query_documents.is_cuda and dtype.itemsize <= 4 and _has_triton():
        return attention_blocks(query_documents, key_documents, query_index, window_tokens)
    return attention_bias(query_documents, key_documents, query_index, dtype, window_tokens)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def attention_bias(
    query_documents: Tensor,
    key_documents: Tensor,
    query_index: Tensor,
    dtype: torch.dtype,
    window_tokens: int | None = None,
) -> Tensor:
    """0 where a query sees a key, far below where not: those of its own document, up to itself, in the window.

    query_documents: (rows, queries), key_documents: (rows, keys), both the index of the document that a token
    belongs to; query_index: (rows or 1, queries), the index among the keys of each query's own. Returns (rows, 1,
    queries, keys) in `dtype`.
    """
    key_index = torch.arange(key_documents.shape[1], device=key_documents.device)
    query_index = query_index[..., None]
    visible = (key_index <= query_index) & (query_documents[:, :, None] == key_documents[:, None, :])
    if window_tokens is not None:
        visible &= key_index > query_index - window_tokens
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, _HIDDEN)[
        :, None
    ]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees: Sees | None,
    *,
    scale: float,
    soft_cap: float | None = None,
    temperatures: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query: (rows, heads, queries, head_dim), key and value: (rows, kv_heads, keys, channels). Returns (rows, heads,
    queries, value channels).

    sees: of `who_sees`; None where one query of each row sees all of the row's keys.
    Scores q·k are multiplied by `scale`, capped softly, multiplied by the query's temperature (rows or 1, queries);
    a head's sink, of (heads,), is one more score that adds nothing.
    """
    if isinstance(sees, BlockMask):
        return attend_in_blocks(
            query, key, value, sees, scale=scale, soft_cap=soft_cap, temperatures=temperatures, sinks=sinks
        )
    bias = sees
    plain = soft_cap is None and temperatures is None and sinks is None
    long = key.shape[2] > EXPLICIT_ATTENTION_MAX_TOKENS
    on_cpu, width = query.device.type == "cpu", value.shape[-1]
    single = bias is None and width == query.shape[-1]
    if plain and (not on_cpu or single or (long and width <= query.shape[-1])):
        if on_cpu and width < query.shape[-1] and query.shape[2] > 1:
            # The fused kernel of a CPU wants values as wide as keys: without it all scores would stand in memory.
            value = F.pad(value, (0, query.shape[-1] - width))
        return _fused(query, key, value, bias, scale, repeat=query.is_cuda and bias is not None)[..., :width]
    if not long or query.shape[2] == 1:
        return _explicit(query, key, value, bias, scale, soft_cap, temperatures, sinks)
    # No fused kernel has these parts on every machine. A block of queries at a time, whose scores are made again
    # for the backward pass, needs memory for one block and not for all.
    num_before = key.shape[2] - query.shape[2]
    blocks = []
    for start in range(0, query.shape[2], _BLOCK_QUERIES):
        here = slice(start, start + _BLOCK_QUERIES)
        seen = slice(0, num_before + here.stop)  # queries see nothing after themselves
        blocks.append(
            checkpoint(
                _explicit,
                query[:, :, here],
                key[:, :, seen],
                value[:, :, seen],
                bias[:, :, here, seen],
                scale,
                soft_cap,
                None if temperatures is None else temperatures[:, here],
                sinks,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing is drawn at random
            )
        )
    return torch.cat(blocks, 2)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, *, repeat: bool
) -> Tensor:
    """`repeat`: keys and values are given to each query head of their own, as generation on a GPU wants. Of its fused
    kernels only cuDNN's takes a bias and shared keys, and torch may prefer to it the plain operations that hold all
    scores; others take the bias where no keys are shared."""
    num_shared = query.shape[1] // key.shape[1]
    if repeat and num_shared > 1:
        key, value = key.repeat_interleave(num_shared, 1), value.repeat_interleave(num_shared, 1)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=grouped)


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    soft_cap: float | None,
    temperatures: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """The query heads that share a key are put side by side as queries of one head: nothing is copied for them."""
    rows, num_heads, num_queries, _ = query.shape
    kv_heads = key.shape[1]
    query = (query * scale).reshape(rows, kv_heads, -1, query.shape[-1])
    if temperatures is not None:
        temperatures = temperatures[:, None, None, :, None].to(query.dtype)
    if sinks is not None:
        sinks = sinks.to(query.dtype).view(1, kv_heads, num_heads // kv_heads, 1, 1)
    bias = None if bias is None else bias.unsqueeze(2)
    mixed = _ExplicitAttention.apply(query, key, value, bias, soft_cap, temperatures, sinks)
    return mixed.view(rows, num_heads, num_queries, -1)


class _ExplicitAttention(torch.autograd.Function):
    """softmax(cap(q·kᵀ) · temperature + bias)·v in plain operations, keeping the probabilities for the backward pass.

    query: (rows, kv_heads, groups · queries, head_dim); bias: (rows, 1, 1, queries, keys); temperatures: (rows or 1,
    1, 1, queries, 1); sinks: (1, kv_heads, groups, 1, 1).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        soft_cap: float | None,
        temperatures: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        flat = torch.matmul(query, key.transpose(-1, -2))
        rows, kv_heads, _, keys = flat.shape
        scores = flat.view(rows, kv_heads, -1, 1 if bias is None else bias.shape[3], keys)
        squashed = None
        if soft_cap is not None:
            squashed = torch.tanh(scores / soft_cap)
            scores = squashed * soft_cap
        if temperatures is not None:
            scores = scores * temperatures
        if bias is None:
            pass
        elif soft_cap is None and temperatures is None:
            scores += bias  # in place: `scores` is still the product itself
        else:
            scores = scores + bias
        taken = None
        if sinks is None:
            probabilities = torch.softmax(scores, -1)
        else:
            column = sinks.expand(*scores.shape[:-1], 1)
            with_sink = torch.softmax(torch.cat([scores, column], -1), -1)
            # What a sink has taken is kept too: as the rest of 1 it would be lost in bfloat16.
            probabilities, taken = with_sink[..., :-1].contiguous(), with_sink[..., -1].contiguous()
        ctx.save_for_backward(query, key, value, probabilities, squashed, temperatures, taken)
        return torch.matmul(probabilities.view(flat.shape), value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities, squashed, temperatures, taken = ctx.saved_tensors
        flat = probabilities.view(*query.shape[:3], key.shape[2])
        grad_probabilities = torch.matmul(gradient, value.transpose(-1, -2))
        # p · (g - Σ p·g): also right where a sink has taken a part of the probability, as its own g is 0.
        grad_scores = torch._softmax_backward_data(grad_probabilities, flat, -1, flat.dtype)
        grad_sinks = None
        if taken is not None:
            lost = (flat * grad_probabilities).sum(-1).view(probabilities.shape[:-1])
            grad_sinks = -(taken * lost).sum((0, 3))[None, ..., None, None]
        if temperatures is not None:
            grad_scores = (grad_scores.view(probabilities.shape) * temperatures).view(flat.shape)
        if squashed is not None:
            grad_scores = grad_scores * (1 - squashed.square()).view(flat.shape)
        return (
            torch.matmul(grad_scores, key),
            torch.matmul(grad_scores.transpose(-1, -2), query),
            torch.matmul(flat.transpose(-1, -2), gradient),
            None,
            None,
            None,
            grad_sinks,
        )
