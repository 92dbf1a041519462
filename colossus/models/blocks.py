"""Attention in one fused kernel, as a GPU wants it: documents, windows, soft caps, temperatures and sinks included.

The kernel is torch's flex attention (arXiv:2412.05496), compiled for the scores at hand. It goes by blocks of queries
and keys: those where nobody sees anything are never computed, and only where some see and some do not is it asked who
does. So there is no tensor of all pairs of tokens, and documents cost no more than their own squares.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK_TOKENS = 128
"""Of queries and of keys, in one block: what the kernel is fastest with."""

_LEAST_WIDTH = 16
"""Channels of a head that the kernel wants at least."""


def attention_blocks(
    query_documents: Tensor,
    key_documents: Tensor,
    query_index: Tensor,
    window_tokens: int | None = None,
) -> BlockMask:
    """Who sees whom, for `attend_in_blocks`: keys of a query's own document, up to itself, in the window.

    query_documents: (rows, queries), key_documents: (rows, keys), both the index of the document that a token belongs
    to; query_index: (1, queries), the index among the keys of each query's own. Queries may stand in any order.
    """
    of_queries, of_keys, index = query_documents.int(), key_documents.int(), query_index[0].int()
    num_queries, num_keys = of_queries.shape[1], of_keys.shape[1]

    def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= index[query]) & (of_queries[row, query] == of_keys[row, key])
        return seen if window_tokens is None else seen & (key > index[query] - window_tokens)

    # Of each block: its first and last document, and index. (rows, blocks of queries, 1) and (rows, 1, blocks of keys).
    first, last = (bound[:, :, None] for bound in _bounds(of_queries))
    earliest, latest = (bound[:, :, None] for bound in _bounds(index[None]))
    first_key, last_key = (bound[:, None, :] for bound in _bounds(of_keys))
    begin, end = (
        bound[:, None, :] for bound in _bounds(torch.arange(num_keys, device=index.device)[None].int())
    )
    some = (begin <= latest) & (first <= last_key) & (first_key <= last)
    every = (end <= earliest) & (first == last) & (first_key == last_key) & (first == first_key)
    if window_tokens is not None:
        some &= end > earliest - window_tokens
        every &= begin > latest - window_tokens
    # The kernel does not look for the end of the tokens in a block that is seen as a whole.
    every &= (_is_whole(num_queries, index.device)[:, None] & _is_whole(num_keys, index.device))[None]
    counts, which = _in_order(some & ~every)
    full_counts, full_which = _in_order(every)
    return BlockMask.from_kv_blocks(
        counts, which, full_counts, full_which, BLOCK_TOKENS, sees, seq_lengths=(num_queries, num_keys)
    )


def attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockMask,
    *,
    scale: float,
    soft_cap: float | None = None,
    temperatures: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `attend`, which see, for who sees whom in `blocks`. On a CPU all scores stand in memory: for tests alone."""
    if temperatures is not None:
        temperatures = temperatures.expand(query.shape[0], -1)

    def change(score: Tensor, row: Tensor, _: Tensor, at: Tensor, __: Tensor) -> Tensor:
        if soft_cap is not None:
            score = soft_cap * torch.tanh(score / soft_cap)
        return score if temperatures is None else score * temperatures[row, at]

    width, lacking = value.shape[-1], max(0, _LEAST_WIDTH - min(query.shape[-1], value.shape[-1]))
    if lacking:
        query, key, value = (F.pad(x, (0, lacking)) for x in (query, key, value))
    made, more = _kernel(query.is_cuda)(
        query,
        key,
        value,
        score_mod=None if soft_cap is None and temperatures is None else change,
        block_mask=blocks,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=sinks is not None),
    )
    if lacking:
        made = made[..., :width]
    if sinks is None:
        return made
    # A sink is one more raised score below the line: all that is seen together is left this share of the whole.
    left = torch.sigmoid(more.lse - sinks[None, :, None].to(more.lse.dtype))
    return (made * left[..., None]).to(made.dtype)


@cache
def _compiled() -> Callable[..., Any]:
    # Whole or not at all: where it gave up, all scores would stand in memory, in silence.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _kernel(on_gpu: bool) -> Callable[..., Any]:
    """Layers that are compiled as a whole take it in as it is."""
    return _compiled() if on_gpu and not torch.compiler.is_compiling() else flex_attention


def _bounds(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest of each block: (rows, tokens) to twice (rows, blocks)."""
    lacking = -numbers.shape[1] % BLOCK_TOKENS
    whole = torch.cat([numbers, numbers[:, -1:].expand(-1, lacking)], 1) if lacking else numbers
    blocks = whole.unflatten(1, (-1, BLOCK_TOKENS))
    return blocks.amin(2), blocks.amax(2)


def _is_whole(num_tokens: int, device: torch.device) -> Tensor:
    """Of each block, whether it has all of its tokens."""
    return (torch.arange(-(-num_tokens // BLOCK_TOKENS), device=device) + 1) * BLOCK_TOKENS <= num_tokens


def _in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, blocks of queries, blocks of keys) that are chosen or not: how many of each row's are, and, after a dim
    for heads, the chosen ones first."""
    counts = chosen.sum(2, dtype=torch.int32)
    which = torch.argsort(chosen.int(), dim=2, descending=True, stable=True).int()
    return counts[:, None].contiguous(), which[:, None].contiguous()
