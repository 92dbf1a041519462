"""Attention in blocks, as a GPU computes it; here its scores stand in memory, the functions are the same."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from colossus.models import blocks as module
from colossus.models.attend import attend, attention_bias
from colossus.models.attention import Portion
from colossus.models.blocks import BLOCK_TOKENS, attention_blocks
from colossus.parallel import recompute as recomputing
from colossus.spec.model import ModelSpec
from colossus.spec.plan import Recompute
from tests.helpers import VARIETIES, random_tokens, scrambled
from tests.models.test_attend import LONG, PARTS, on_paper


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled as it is there, into torch's plain operations. Torch refuses its gradients on a CPU, for which it has no
    fast kernel; plain operations have them."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    compiled = torch.compile(flex.flex_attention, backend="aot_eager", dynamic=False)
    monkeypatch.setattr(module, "_compiled", lambda: compiled)
    kernel = module._kernel
    monkeypatch.setattr(module, "_kernel", lambda _: kernel(True))
    yield
    torch._dynamo.reset()


def documents_of(num_tokens: int, starts: list[list[int]]) -> Tensor:
    """(rows, tokens): the index of each token's document, for rows whose documents start there."""
    return (torch.arange(num_tokens) >= torch.tensor(starts)[:, :, None]).sum(1)


def visible(documents: Tensor, index: Tensor, window: int | None) -> Tensor:
    """(rows, queries, keys), by the rule itself."""
    keys = torch.arange(documents.shape[1])
    seen = (keys <= index[0, :, None]) & (documents[:, index[0], None] == documents[:, None])
    return seen if window is None else seen & (keys > index[0, :, None] - window)


ORDERS: dict[str, Callable[[int], Tensor]] = {
    "as they come": lambda tokens: torch.arange(tokens)[None],
    # As a rank of two holds them, for whom others made the rest: the first and the last quarter.
    "two of four chunks": lambda tokens: torch.cat(
        [torch.arange(tokens // 4), torch.arange(3 * (tokens // 4), 4 * (tokens // 4))]
    )[None],
    "the end alone": lambda tokens: torch.arange(tokens - 40, tokens)[None],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("window", [None, 1, 90, 300])
@pytest.mark.parametrize("num_tokens", [64, 700, 1024])
def test_blocks_hold_what_is_seen_and_no_more_than_they_must(
    num_tokens: int, window: int | None, order: str
) -> None:
    documents = documents_of(num_tokens, [[0, 0, 0], [0, num_tokens // 3, num_tokens - 7], [0, 256, 512]])
    index = ORDERS[order](num_tokens)
    blocks = attention_blocks(documents[:, index[0]], documents, index, window)
    seen = visible(documents, index, window)

    def chosen(counts: Tensor, which: Tensor) -> Tensor:
        """(rows, tokens, tokens) of blocks that are named."""
        there = torch.zeros(which.shape, dtype=torch.bool)
        number = torch.arange(which.shape[-1])
        there.scatter_(-1, which.long(), number < counts[..., None])
        wide = there[:, 0].repeat_interleave(BLOCK_TOKENS, 1).repeat_interleave(BLOCK_TOKENS, 2)
        return wide[:, : seen.shape[1], : seen.shape[2]]

    some = chosen(blocks.kv_num_blocks, blocks.kv_indices)
    every = chosen(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not (some & every).any()
    assert seen[every].all()
    assert not (seen & ~some & ~every).any()
    row, query, key = (torch.arange(n).view(shape) for n, shape in zip(seen.shape, _APART, strict=True))
    assert torch.equal(blocks.mask_mod(row, torch.tensor(0), query, key), seen)
    # Torch's own, which looks at every pair, finds no block that is not here, and hardly one less.
    theirs = create_block_mask(
        lambda r, _, q, k: seen[r, q, k], len(seen), None, seen.shape[1], num_tokens, device="cpu"
    )
    ours = blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum()
    needed = theirs.kv_num_blocks.sum() + theirs.full_kv_num_blocks.sum()
    assert needed <= ours <= needed + len(seen) * 2


_APART = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))


def test_most_of_what_documents_do_not_see_is_never_computed() -> None:
    """32 documents of one block each: of 32 · 33 / 2 causal blocks there are 32, none of them as a whole."""
    documents = (torch.arange(32 * BLOCK_TOKENS) // BLOCK_TOKENS)[None]
    blocks = attention_blocks(documents, documents, torch.arange(documents.shape[1])[None])
    assert (blocks.kv_num_blocks == 1).all()
    assert (blocks.full_kv_num_blocks == 0).all()
    alone = torch.zeros_like(documents)
    blocks = attention_blocks(alone, alone, torch.arange(documents.shape[1])[None])
    assert blocks.kv_num_blocks.sum() == 32
    assert blocks.full_kv_num_blocks.sum() == 32 * 31 / 2


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("name", PARTS)
def test_attention_in_blocks_is_that_on_paper_with_its_gradients(name: str, window: int | None) -> None:
    """Of tokens that fill no whole number of blocks, two heads on each key, and narrower heads than a kernel takes."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    num_tokens = 300
    query, key, value = random(2, 4, num_tokens, 6), random(2, 2, num_tokens, 6), random(2, 2, num_tokens, 5)
    parts: dict[str, Any] = dict(PARTS[name])
    leaves = [query, key, value]
    if "temperatures" in parts:
        parts["temperatures"] = random(2, num_tokens).detach().abs() + 0.5
    if "sinks" in parts:
        parts["sinks"] = random(4)
        leaves.append(parts["sinks"])
    documents = documents_of(num_tokens, [[0, 0], [0, 170]])
    index = torch.arange(num_tokens)[None]
    made = attend(
        query, key, value, attention_blocks(documents, documents, index, window), scale=0.4, **parts
    )
    expected = on_paper(query, key, value, visible(documents, index, window), 0.4, parts)
    torch.testing.assert_close(made, expected, rtol=1e-8, atol=1e-9)
    towards = random(*made.shape).detach()
    for ours, theirs in zip(
        torch.autograd.grad(made, leaves, towards),
        torch.autograd.grad(expected, leaves, towards),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_tokens", "window", "soft_cap"), [(300, None, None), (700, None, 0.9), (1024, 90, None)]
)
def test_a_compiled_kernel_that_leaves_blocks_out_makes_the_same(
    num_tokens: int, window: int | None, soft_cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch has such kernels for a CPU, of forward passes alone: what is whole, and what is left out, shows here."""
    monkeypatch.undo()
    monkeypatch.setattr(module, "_kernel", lambda _: module._compiled())
    query, key, value = (torch.randn(2, heads, num_tokens, 32) for heads in (4, 2, 2))
    documents = documents_of(num_tokens, [[0, num_tokens // 3], [0, num_tokens - 7]])
    index = torch.arange(num_tokens)[None]
    parts = {"scale": 0.3, "soft_cap": soft_cap}
    with torch.no_grad():
        made = attend(query, key, value, attention_blocks(documents, documents, index, window), **parts)
    bias = attention_bias(documents, documents, index, torch.float32, window)
    torch.testing.assert_close(made, attend(query, key, value, bias, **parts), rtol=1e-4, atol=1e-5)


def blocks_here(q: Tensor, k: Tensor, index: Tensor, _: torch.dtype, window: int | None = None) -> BlockMask:
    """`who_sees` of a GPU."""
    return attention_blocks(q, k, index, window)


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        *((name, "none") for name in LONG),
        *(("grok", recompute) for recompute in ("selective", "alternate", "full")),
    ],
)
def test_models_see_by_blocks_what_they_see_by_numbers(
    name: str, recompute: Recompute, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled layers take the kernel in: torch's compiler follows it into their graphs."""
    monkeypatch.setattr(recomputing, "_compiled", partial(torch.compile, backend="aot_eager", dynamic=False))
    spec: ModelSpec = VARIETIES[name]
    model = scrambled(spec)
    tokens = random_tokens(spec, 2, 150)
    documents = documents_of(150, [[0, 0], [0, 100]])
    index = torch.arange(150)[None]
    results = []
    for who_sees in (attention_bias, blocks_here):
        if who_sees is blocks_here:
            for layer in model.layers:
                recomputing.prepare_layer(layer, recompute, compiled=compiled)
        model.zero_grad()
        hidden = model(tokens, documents, portion=Portion(index, index, index, who_sees=who_sees))
        hidden.square().sum().backward()
        results.append([hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5 * other.abs().max().item())
