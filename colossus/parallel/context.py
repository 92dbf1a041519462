"""Context parallelism: attention over sequences that several ranks hold parts of.

Each rank makes the queries, keys and values of its own tokens, and what it returns is for these. Later tokens see more
than early ones; so a sequence is cut into twice as many chunks as there are ranks, and each rank holds one from either
end, which gives all of them as much to do (arXiv:2407.21783, section 3.3.2).

How queries meet the keys of other ranks is one of three exchanges, each a function with the signature of `attend`:

 all-gather   keys and values come together on every rank; queries stay
 all-to-all   every rank gets all tokens of some of the heads, and gives back what they have made (arXiv:2309.14509)
 ring         keys and values go round, and each rank adds up what its queries see in them (arXiv:2310.01889)
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import lcm
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.weak import WeakTensorKeyDictionary

from colossus.errors import ConfigError
from colossus.models.attend import Sees, attend, attention_bias, who_sees
from colossus.parallel.collectives import Team, all_gather, all_to_all, own_part
from colossus.spec.plan import ContextExchange

_BLOCK_QUERIES = 512
"""Queries whose scores with a chunk of keys stand in memory at once, while keys and values go round."""


def attended_index(num_tokens: int, size: int, place: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Which of a sequence's tokens the rank at `place` of `size` attends from: int64 (1, num_tokens / size)."""
    if size == 1:
        return torch.arange(num_tokens, device=device)[None]
    if num_tokens % (2 * size) != 0:
        less = num_tokens - num_tokens % (2 * size)
        raise ConfigError(
            f"sequences of {num_tokens:,} tokens cannot be split over cp {size}: each rank holds two chunks of them, "
            f"and {num_tokens:,} is no multiple of {2 * size}. {less + 2 * size:,} tokens would do"
            + (f", or {less:,}" if less else "")
        )
    chunk = num_tokens // (2 * size)
    starts = torch.tensor(_chunks(place, size), device=device) * chunk
    return (starts[:, None] + torch.arange(chunk, device=device)).view(1, -1)


def _chunks(place: int, size: int) -> tuple[int, int]:
    """Those that a rank holds, of 2 · size."""
    return place, 2 * size - 1 - place


def attend_over(exchange: ContextExchange, team: Team | None, num_tokens: int) -> Callable[..., Tensor]:
    """What stands for `attend` where `team` shares sequences of `num_tokens`; its arguments are this rank's part.

    Who sees whom, by `sight_over`, and temperatures are for the queries that meet keys here: those of the rank's own
    tokens and, with "all-to-all", all of the sequence's; with all keys in their order. Sinks are those of all heads;
    their gradient is this rank's share.
    """
    if team is None:
        return attend
    match exchange:
        case "all-gather":
            return partial(_attend_gathered, team)
        case "all-to-all":
            return partial(_attend_traded, team)
        case "ring":
            return partial(_attend_round, team, num_tokens, WeakTensorKeyDictionary())


def sight_over(exchange: ContextExchange) -> Callable[..., Sees]:
    """What stands for `who_sees` there: keys that go round are met in plain operations, which want a number for each
    pair of tokens."""
    return attention_bias if exchange == "ring" else who_sees


# --- tokens in their order ---


def _in_order(parts: Tensor) -> Tensor:
    """parts: (size, rows, heads, own tokens, channels), of each rank. Returns (rows, heads, tokens, channels)."""
    early, late = parts.unflatten(3, (2, -1)).unbind(3)
    return torch.cat([early, late.flip(0)]).movedim(0, 2).flatten(2, 3)


def _in_parts(x: Tensor, size: int) -> Tensor:
    """The way back: (rows, heads, tokens, channels) to (size, rows, heads, own tokens, channels)."""
    early, late = x.unflatten(2, (2 * size, -1)).movedim(2, 0).chunk(2)
    return torch.stack([early, late.flip(0)], 3).flatten(3, 4)


# --- all-gather ---


def _attend_gathered(
    team: Team,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees: Sees,
    *,
    scale: float,
    soft_cap: float | None = None,
    temperatures: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    widths = [key.shape[-1], value.shape[-1]]
    parts = all_gather(torch.cat([key, value], -1)[None], 0, team)
    key, value = _in_order(parts).split(widths, -1)
    if isinstance(sees, BlockMask):  # what a chunk does not see costs nothing
        return attend(
            query, key, value, sees, scale=scale, soft_cap=soft_cap, temperatures=temperatures, sinks=sinks
        )
    chunk, made = query.shape[2] // 2, []
    for number, position in enumerate(_chunks(team.place, team.size)):
        # A chunk of queries sees nothing after itself. So it is the end of its keys, as `attend` wants it.
        here, seen = slice(number * chunk, (number + 1) * chunk), slice((position + 1) * chunk)
        made.append(
            attend(
                query[:, :, here],
                key[:, :, seen],
                value[:, :, seen],
                sees[:, :, here, seen],
                scale=scale,
                soft_cap=soft_cap,
                temperatures=None if temperatures is None else temperatures[:, here],
                sinks=sinks,
            )
        )
    return torch.cat(made, 2)


# --- all-to-all ---


def _attend_traded(
    team: Team,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees: Sees,
    *,
    scale: float,
    soft_cap: float | None = None,
    temperatures: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % team.size != 0:
        raise ConfigError(
            f"context exchange 'all-to-all' deals out heads: {heads} of them cannot be split over cp {team.size}. "
            f"'ring' and 'all-gather' would do"
        )
    copies = lcm(kv_heads, team.size) // kv_heads
    if copies > 1:
        key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
    # By the rank that heads go to; all three in one exchange.
    dealt = [x.unflatten(1, (team.size, -1)).transpose(0, 1) for x in (query, key, value)]
    rows = torch.cat([x.flatten(1) for x in dealt], 1)
    once = [1] * team.size
    came = all_to_all(rows, once, once, team).split([x[0].numel() for x in dealt], 1)
    query, key, value = (_in_order(part.view(x.shape)) for part, x in zip(came, dealt, strict=True))
    made = attend(
        query,
        key,
        value,
        sees,
        scale=scale,
        soft_cap=soft_cap,
        temperatures=temperatures,
        sinks=None if sinks is None else own_part(sinks, 0, team),
    )
    back = all_to_all(_in_parts(made, team.size), once, once, team)
    return back.transpose(0, 1).flatten(1, 2)


# --- ring ---


@torch.compiler.disable  # exchanges that are under way while other things are computed are no part of a graph
def _attend_round(
    team: Team,
    num_tokens: int,
    seen_chunks: WeakTensorKeyDictionary,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    scale: float,
    soft_cap: float | None = None,
    temperatures: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """seen_chunks: `_seen_chunks` of the biases at hand, which layers share: a chip is asked once for each."""
    if bias not in seen_chunks:
        seen_chunks[bias] = _seen_chunks(bias, team.place, team.size)
    course = _Course(team, num_tokens // (2 * team.size), seen_chunks[bias])
    return _RingAttention.apply(query, key, value, bias, temperatures, sinks, scale, soft_cap, course)


class _Tile(NamedTuple):
    """Queries that meet keys: where they stand in this rank's part, in the block that is here, and in the bias."""

    queries: slice
    keys: slice
    columns: slice


class _Course(NamedTuple):
    """What one rank meets on the way round."""

    team: Team
    chunk_tokens: int
    seen_chunks: list[list[bool]]

    def tiles(self, origin: int) -> Iterator[_Tile]:
        """All that this rank's queries see of the block that the rank at `origin` has made."""
        size, place, chunk = self.team.size, self.team.place, self.chunk_tokens
        for (position, queries), seen in zip(
            _query_blocks(place, size, chunk), self.seen_chunks, strict=True
        ):
            for number, other in enumerate(_chunks(origin, size)):
                if seen[other]:
                    # Of its own chunk a query sees nothing after itself.
                    length = chunk if other < position else (queries.stop - 1) % chunk + 1
                    keys = slice(number * chunk, number * chunk + length)
                    yield _Tile(queries, keys, slice(other * chunk, other * chunk + length))


def _query_blocks(place: int, size: int, chunk: int) -> Iterator[tuple[int, slice]]:
    """Blocks of a rank's queries, each with the position of the chunk that it is of."""
    for number, position in enumerate(_chunks(place, size)):
        for start in range(0, chunk, _BLOCK_QUERIES):
            stop = min(start + _BLOCK_QUERIES, chunk)
            yield position, slice(number * chunk + start, number * chunk + stop)


def _seen_chunks(bias: Tensor, place: int, size: int) -> list[list[bool]]:
    """Of each block of queries, whether it sees anything in each chunk of the sequence; windows and documents leave
    much unseen. Of a tensor without values nothing is known but that it is causal; in a dry run, which only asks what
    is held and sent, the last block is enough: it sees all that others do, and most of it."""
    chunk = bias.shape[-1] // (2 * size)
    blocks = list(_query_blocks(place, size, chunk))
    causal = [[other <= position for other in range(2 * size)] for position, _ in blocks]
    if isinstance(bias, FakeTensor):
        return [[False] * (2 * size) for _ in blocks[:-1]] + causal[-1:]
    if bias.is_meta:
        return causal
    most = bias.unflatten(-1, (2 * size, -1)).amax((0, 1, 4))
    known = torch.stack([most[queries].amax(0) == 0 for _, queries in blocks]).tolist()
    return [[a and b for a, b in zip(*both, strict=True)] for both in zip(causal, known, strict=True)]


def _start_exchange(team: Team, sent: Tensor, received: Tensor) -> list[dist.Work]:
    """To the next rank, and from the one before."""
    group, place, size = team.process_group, team.place, team.size
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, group=group, group_peer=(place + 1) % size),
            dist.P2POp(dist.irecv, received, group=group, group_peer=(place - 1) % size),
        ]
    )


def _wait(exchange: list[dist.Work]) -> None:
    for work in exchange:
        work.wait()


def _passing(team: Team, block: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The block of every rank, with the place of the one that has made it, from this one's own backwards. The next is
    on its way while one is computed with."""
    for step in range(team.size):
        last = step == team.size - 1
        coming = block if last else torch.empty_like(block)
        exchange = [] if last else _start_exchange(team, block, coming)
        yield (team.place - step) % team.size, block
        _wait(exchange)
        block = coming


class _RingAttention(torch.autograd.Function):
    """Softmax over keys that come block by block. For the backward pass it keeps the logarithm of each query's sum of
    raised scores, from which a block's probabilities are made again when it comes by once more.

    What is exchanged is one message: a block's keys and then its values; on the way back, their gradients in float32,
    which end where the block is from.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor,
        temperatures: Tensor | None,
        sinks: Tensor | None,
        scale: float,
        soft_cap: float | None,
        course: _Course,
    ) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        grouped = query.unflatten(1, (key.shape[1], -1))  # (rows, kv_heads, groups, queries, head_dim)
        made = torch.zeros(*grouped.shape[:-1], value.shape[-1], dtype=wide, device=query.device)
        # Of the scores so far: the largest, and the sum of all raised above it. Where a larger one comes, what is there
        # shrinks. A sink is a score that is there from the start and adds nothing.
        largest = torch.full((*grouped.shape[:-1], 1), -torch.inf, dtype=wide, device=query.device)
        raised_sum = torch.zeros_like(largest)
        if sinks is not None:
            largest.copy_(_of_heads(sinks, grouped))
            raised_sum.fill_(1)
        for origin, block in _passing(course.team, torch.cat([key.flatten(), value.flatten()])):
            keys, values = _unpacked(block, key, value)
            for tile in course.tiles(origin):
                here = (slice(None), slice(None), slice(None), tile.queries)
                scores, _ = _scores(grouped, keys, bias, temperatures, scale, soft_cap, tile)
                before = largest[here]
                after = torch.maximum(before, scores.amax(-1, keepdim=True))
                raised, left = scores.sub_(after).exp_(), (before - after).exp()
                seen = _product(raised.flatten(2, 3), values[:, :, tile.keys]).view(*after.shape[:-1], -1)
                made[here].mul_(left).add_(seen)
                raised_sum[here].mul_(left).add_(raised.sum(-1, keepdim=True))
                largest[here] = after
        made = made.div_(raised_sum).to(query.dtype).flatten(1, 2)
        log_sum = largest.add_(raised_sum.log_())
        ctx.save_for_backward(query, key, value, bias, temperatures, sinks, made, log_sum)
        ctx.scale, ctx.soft_cap, ctx.course = scale, soft_cap, course
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, temperatures, sinks, made, log_sum = ctx.saved_tensors
        course, wide = ctx.course, log_sum.dtype
        grouped = query.unflatten(1, (key.shape[1], -1))
        lost = (gradient.to(wide) * made).sum(-1, keepdim=True).view(log_sum.shape)  # Σ p·g of each query
        gradient = gradient.unflatten(1, (key.shape[1], -1))
        grad_query = torch.zeros(grouped.shape, dtype=wide, device=query.device)
        own: Tensor | None = None
        exchange: list[dist.Work] = []
        for origin, block in _passing(course.team, torch.cat([key.flatten(), value.flatten()])):
            keys, values = _unpacked(block, key, value)
            to_block = torch.zeros(block.shape, dtype=wide, device=block.device)
            grad_keys, grad_values = _unpacked(to_block, key, value)
            for tile in course.tiles(origin):
                queries, here = tile.queries, (slice(None), slice(None), tile.keys)
                asked = grouped[:, :, :, queries].flatten(2, 3)
                towards = gradient[:, :, :, queries].flatten(2, 3)
                scores, squashed = _scores(grouped, keys, bias, temperatures, ctx.scale, ctx.soft_cap, tile)
                probabilities = scores.sub_(log_sum[:, :, :, queries]).exp_()
                grad_values[here] += _product(probabilities.flatten(2, 3).transpose(-1, -2), towards)
                grad_scores = _product(towards, values[here].transpose(-1, -2)).view(scores.shape)
                grad_scores.sub_(lost[:, :, :, queries]).mul_(probabilities).mul_(ctx.scale)
                if temperatures is not None:
                    grad_scores.mul_(_of_queries(temperatures, queries))
                if squashed is not None:
                    grad_scores.mul_(1 - squashed.square())
                flat = grad_scores.flatten(2, 3)
                grad_query[:, :, :, queries] += _product(flat, keys[here]).view(*scores.shape[:-1], -1)
                grad_keys[here] += _product(flat.transpose(-1, -2), asked)
            # What ranks before this one have found for the block came meanwhile; the sum goes on with it.
            _wait(exchange)
            if own is not None:
                to_block += own
            own = torch.empty_like(to_block)
            exchange = _start_exchange(course.team, to_block, own)
        _wait(exchange)
        grad_sinks = None
        if sinks is not None:
            taken = (_of_heads(sinks, grouped).to(wide) - log_sum).exp()
            grad_sinks = -(taken * lost).sum((0, 3, 4)).flatten().to(sinks.dtype)
        grad_key, grad_value = _unpacked(own.to(key.dtype), key, value)
        return (
            grad_query.to(query.dtype).flatten(1, 2), grad_key, grad_value, None, None, grad_sinks, None, None, None,
        )  # fmt: skip


def _unpacked(block: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of a block, shaped like this rank's own."""
    keys, values = block.split([key.numel(), value.numel()])
    return keys.view(key.shape), values.view(value.shape)


def _scores(
    grouped: Tensor,
    keys: Tensor,
    bias: Tensor,
    temperatures: Tensor | None,
    scale: float,
    soft_cap: float | None,
    tile: _Tile,
) -> tuple[Tensor, Tensor | None]:
    """(rows, kv_heads, groups, queries, keys) of a tile, and tanh of what was capped."""
    asked = grouped[:, :, :, tile.queries]
    flat = _product(asked.flatten(2, 3), keys[:, :, tile.keys].transpose(-1, -2))
    scores = flat.view(*asked.shape[:-1], -1).mul_(scale)
    squashed = None
    if soft_cap is not None:
        squashed = scores.div_(soft_cap).tanh_()
        scores = squashed * soft_cap
    if temperatures is not None:
        scores.mul_(_of_queries(temperatures, tile.queries))
    return scores.add_(bias[:, :, None, tile.queries, tile.columns]), squashed


def _of_heads(sinks: Tensor, grouped: Tensor) -> Tensor:
    return sinks.view(1, *grouped.shape[1:3], 1, 1)


def _of_queries(temperatures: Tensor, queries: slice) -> Tensor:
    return temperatures[:, None, None, queries, None]


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Of (rows, kv_heads, …), in at least float32: a GPU multiplies narrow numbers as such and adds up in float32."""
    narrow = other.dtype
    if narrow.itemsize >= 4:
        return one @ other
    if other.is_cuda:
        made = torch.bmm(one.to(narrow).flatten(0, 1), other.flatten(0, 1), out_dtype=torch.float32)
        return made.unflatten(0, one.shape[:2])
    return one.float() @ other.float()
