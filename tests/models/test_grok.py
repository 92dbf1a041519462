"""Grok-1 and Grok-2 against a plain decoder of their own, written from what is published of them and nothing else.

xai-org/grok-1, model.py and run.py; xai-org/grok-2, config.json, as it is run in sgl-project/sglang. Nothing in the
reference is from colossus.models; the zoo's own settings are tested, and only sizes are smaller.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from colossus import zoo
from colossus.models import Decoder
from colossus.spec.model import ModelSpec, MoeSpec
from tests.helpers import random_tokens, scrambled

EPSILON = 1e-5
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_EXPERTS = 4, 2, 128, 8
Weights = Mapping[str, Tensor]


def smaller(name: str) -> ModelSpec:
    """The zoo's model with small sizes; heads stay as wide as they are, as 1/√128 is the scale of their scores."""
    spec = zoo.find(name)
    assert isinstance(spec.mlp, MoeSpec)
    attention = spec.attention.model_copy(update={"num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS})
    mlp = spec.mlp.model_copy(update={"intermediate_size": 24})
    if mlp.shared is not None:
        shared = mlp.shared.model_copy(update={"intermediate_size": 40})
        mlp = mlp.model_copy(update={"shared": shared})
    return spec.model_copy(
        update={"num_layers": 2, "hidden_size": 32, "vocab_size": 50, "attention": attention, "mlp": mlp}
    )


@dataclass(frozen=True)
class Facts:
    """What the two do not have in common."""

    width: int
    """Of the model as published: embeddings are multiplied by its root."""
    rope_base: float
    router_cap: float | None
    has_dense: bool
    tied: bool
    logit_multiplier: float
    logit_cap: float | None
    original_tokens: int | None


GROK_1 = Facts(6144, 10_000, None, False, True, 1 / math.sqrt(3), None, None)
GROK_2 = Facts(8192, 208_533_496, 30, True, False, 0.5, 50, 1024)
BOTH = pytest.mark.parametrize(
    ("name", "facts"), [("grok-1", GROK_1), ("grok-2", GROK_2)], ids=["grok-1", "grok-2"]
)


def logits_on_paper(facts: Facts, weights: Weights, tokens: list[int]) -> Tensor:
    x = weights["embedding.weight"][torch.tensor(tokens)] * math.sqrt(facts.width)
    for number in range(2):
        layer = {
            name.removeprefix(f"layers.{number}."): weight
            for name, weight in weights.items()
            if name.startswith(f"layers.{number}.")
        }
        mixed = attention(facts, layer, rms(x, layer["attention_norm.weight"]))
        x = x + rms(mixed, layer["attention_output_norm.weight"])
        inner = rms(x, layer["mlp_norm.weight"])
        made = experts(facts, layer, inner)
        if facts.has_dense:
            made = (made + geglu(layer, "mlp.shared", None, inner)) / math.sqrt(2)
        x = x + rms(made, layer["mlp_output_norm.weight"])
    head = weights["embedding.weight" if facts.tied else "head.weight"]
    logits = rms(x, weights["final_norm.weight"]) @ head.T * facts.logit_multiplier
    return logits if facts.logit_cap is None else facts.logit_cap * torch.tanh(logits / facts.logit_cap)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPSILON) * weight


def attention(facts: Facts, layer: Weights, x: Tensor) -> Tensor:
    length = len(x)
    query = (x @ layer["attention.query.weight"].T).view(length, NUM_HEADS, HEAD_DIM)
    key = (x @ layer["attention.key.weight"].T).view(length, NUM_KV_HEADS, HEAD_DIM)
    value = (x @ layer["attention.value.weight"].T).view(length, NUM_KV_HEADS, HEAD_DIM)
    query, key = turned(facts, query), turned(facts, key)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    temperatures = torch.ones(length, 1, dtype=torch.float64)
    if facts.original_tokens is not None:
        for position in range(facts.original_tokens + 1, length):
            temperatures[position] = math.log(position) / math.log(facts.original_tokens)
    heads = []
    for head in range(NUM_HEADS):
        of_kv = head // (NUM_HEADS // NUM_KV_HEADS)
        scores = query[:, head] @ key[:, of_kv].T / math.sqrt(128)
        scores = 30 * torch.tanh(scores / 30) * temperatures
        heads.append(torch.softmax(scores.masked_fill(later, -math.inf), -1) @ value[:, of_kv])
    return torch.cat(heads, -1) @ layer["attention.output.weight"].T


def turned(facts: Facts, x: Tensor) -> Tensor:
    """x: (tokens, heads, 128). Channel i and channel i + 64 turn together."""
    speeds = facts.rope_base ** (-torch.arange(64, dtype=torch.float64) / 64)
    angles = (torch.arange(len(x), dtype=torch.float64)[:, None] * speeds)[:, None]
    first, second = x[..., :64], x[..., 64:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def experts(facts: Facts, layer: Weights, x: Tensor) -> Tensor:
    """x: (tokens, width). Every expert sees every token; what it makes of those it was not chosen for counts 0."""
    logits = x @ layer["mlp.router.weight"].T
    if facts.router_cap is not None:
        logits = facts.router_cap * torch.tanh(logits / facts.router_cap)
    shares = torch.softmax(logits, -1)
    second = shares.detach().sort(-1).values[:, -2]
    made = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        weight = shares[:, expert] * (shares[:, expert] >= second)
        made = made + weight[:, None] * geglu(layer, "mlp.experts", expert, x)
    return made


def geglu(layer: Weights, name: str, expert: int | None, x: Tensor) -> Tensor:
    gate, up, down = (
        layer[f"{name}.{part}.weight"] if expert is None else layer[f"{name}.{part}.weight"][expert]
        for part in ("gate", "up", "down")
    )
    inner = x @ gate.T
    inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return (inner * (x @ up.T)) @ down.T


def with_large_scores(spec: ModelSpec) -> Decoder:
    """Random, with queries so long that the caps bend scores and logits."""
    model = scrambled(spec).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".query." in name or ".key." in name:
                parameter *= 2
            if "router" in name:
                parameter *= 4
            if name in ("embedding.weight", "head.weight"):
                parameter *= 3
    return model


@BOTH
def test_published_sizes(name: str, facts: Facts) -> None:
    spec = zoo.find(name)
    published = {"grok-1": 315_684_820_992, "grok-2": 269_515_497_472}
    assert spec.num_params() == published[name]
    assert (spec.hidden_size, spec.num_layers, spec.vocab_size) == (facts.width, 64, 131_072)


@BOTH
def test_logits_and_gradients(name: str, facts: Facts) -> None:
    compare(name, facts, num_tokens=24)


def test_queries_beyond_1024_have_a_temperature() -> None:
    """Its position counts from 0: the 1,026th token is the first with one."""
    compare("grok-2", GROK_2, num_tokens=1030)


def compare(name: str, facts: Facts, num_tokens: int) -> None:
    spec = smaller(name)
    model = with_large_scores(spec)
    tokens = random_tokens(spec, 1, num_tokens)
    hidden = model(tokens, dtype=torch.float64)
    # `Decoder.logits` ends in float32, and rotations go by way of it.
    logits = model.logits(hidden)[0]
    weights = {key: weight.detach().clone().requires_grad_() for key, weight in model.named_parameters()}
    expected = logits_on_paper(facts, weights, tokens[0].tolist())
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits.double() * towards).sum().backward()
    gradients = torch.autograd.grad((expected * towards).sum(), list(weights.values()))
    for (key, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        scale = gradient.abs().max().item()
        assert scale > 0, key
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, key=key: f"{key}: {m}"
        )
