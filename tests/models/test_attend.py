"""Attention by itself: beyond the length where it goes block by block, and with every part that changes scores."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from colossus.models import attend as module
from colossus.models.attend import attend, attention_bias
from colossus.spec.model import ModelSpec
from tests.helpers import VARIETIES, random_tokens, scrambled

LONG = {
    name: VARIETIES[name]
    for name in (
        "plain",
        "temperature",
        "capped_scores",
        "window",
        "some_windows",
        "sinks",
        "latent",
        "gpt_oss",
        "grok",
    )
}

PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft_cap": {"soft_cap": 1.3},
    "temperatures": {"temperatures": True},
    "sinks": {"sinks": True},
    "all": {"soft_cap": 0.9, "temperatures": True, "sinks": True},
}


def on_paper(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, parts: dict[str, Any]
) -> Tensor:
    """All scores at once; visible: (rows, queries, keys)."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = torch.einsum("bhqc,bhkc->bhqk", query, key) * scale
    if "soft_cap" in parts:
        scores = parts["soft_cap"] * torch.tanh(scores / parts["soft_cap"])
    if "temperatures" in parts:
        scores = scores * parts["temperatures"][:, None, :, None]
    raised = scores.exp() * visible[:, None]
    total = raised.sum(-1, keepdim=True)
    if "sinks" in parts:
        total = total + parts["sinks"].exp()[None, :, None, None]
    return torch.einsum("bhqk,bhkc->bhqc", raised / total, value)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("num_queries", [1, 30, 150])
@pytest.mark.parametrize("name", PARTS)
def test_long_rows_are_those_on_paper_with_their_gradients(
    name: str, num_queries: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is long, and a block of queries, are made shorter here: there are three blocks."""
    monkeypatch.setattr(module, "EXPLICIT_ATTENTION_MAX_TOKENS", 64)
    monkeypatch.setattr(module, "_BLOCK_QUERIES", 64)
    assert_as_on_paper(name, num_queries, window, num_before=100)


def test_rows_that_are_long_indeed() -> None:
    assert_as_on_paper("all", 700, 40, num_before=500)


def assert_as_on_paper(name: str, num_queries: int, window: int | None, *, num_before: int) -> None:
    """Queries of two rows that continue after 13 keys and after more, of two documents, two heads on each key."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    num_keys, second = num_before + num_queries, num_before * 3 // 5
    query, key, value = random(2, 4, num_queries, 6), random(2, 2, num_keys, 6), random(2, 2, num_keys, 5)
    parts = dict(PARTS[name])
    leaves = [query, key, value]
    if "temperatures" in parts:
        parts["temperatures"] = random(2, num_queries).detach().abs() + 0.5
    if "sinks" in parts:
        parts["sinks"] = random(4)
        leaves.append(parts["sinks"])
    index = torch.tensor([13, num_before])[:, None] + torch.arange(num_queries)
    documents = (torch.arange(num_keys) >= second).long().expand(2, -1)
    visible = torch.zeros(2, num_queries, num_keys, dtype=torch.bool)
    for row in range(2):
        for number, place in enumerate(index[row].tolist()):
            first = second if place >= second else 0
            first = first if window is None else max(first, place - window + 1)
            visible[row, number, first : place + 1] = True
    bias = attention_bias(documents.gather(1, index), documents, index, torch.float64, window)
    made = attend(query, key, value, bias, scale=0.4, **parts)
    expected = on_paper(query, key, value, visible, 0.4, parts)
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)
    towards = random(*made.shape).detach()
    for ours, theirs in zip(
        torch.autograd.grad(made, leaves, towards),
        torch.autograd.grad(expected, leaves, towards),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("spec", LONG.values(), ids=LONG)
def test_long_rows_block_by_block_are_what_short_ones_are(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole model over 600 tokens, two blocks, against all scores at once, which is tested on paper."""
    model = scrambled(spec).double()
    tokens = random_tokens(spec, 1, 600)
    documents = (torch.arange(600) >= 450).long()[None]
    results = []
    for longest in (512, 2000):
        monkeypatch.setattr(module, "EXPLICIT_ATTENTION_MAX_TOKENS", longest)
        model.zero_grad()
        hidden = model(tokens, documents, dtype=torch.float64)
        hidden.square().sum().backward()
        results.append([hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7 * other.abs().max().item())


def test_a_sink_that_takes_little_has_its_gradient_in_bfloat16_too() -> None:
    """A probability of some thousandths is lost where it is found as what others leave of 1."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(4, 2, 64, 8, generator=generator) for _ in range(3))
    index = torch.arange(64)[None]
    documents = torch.zeros(4, 64, dtype=torch.long)
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        sinks = torch.tensor([-3.0, -1.0], dtype=torch.float32).requires_grad_()
        bias = attention_bias(documents, documents, index, dtype)
        q, k, v = (tensor.bfloat16().to(dtype) for tensor in (query, key, value))
        made = attend(q, k, v, bias, scale=1 / math.sqrt(8), sinks=sinks)
        made[:, :, 32:].double().square().sum().backward()
        gradients.append(sinks.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.03, atol=0)


def test_keys_repeated_for_each_query_head_are_those_on_paper() -> None:
    """As on a GPU, whose kernels want it so; documents and grouped heads, with the gradients of what is shared."""
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(2, heads, 70, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (6, 2, 2)
    )
    documents = (torch.arange(70) >= 50).long().expand(2, -1)
    index = torch.arange(70)[None]
    bias = attention_bias(documents, documents, index, torch.float64)
    visible = bias[:, 0] == 0
    made = module._fused(query, key, value, bias, 0.3, repeat=True)
    wanted = on_paper(query, key, value, visible, 0.3, {})
    torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-10)
    direction = torch.randn(made.shape, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(one, (query, key, value), direction) for one in (made, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
