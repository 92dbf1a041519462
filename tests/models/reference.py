"""A decoder as one would write it on paper: float64, one position after another, no batches, no tricks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from colossus.models import Decoder
from colossus.spec.model import ModelSpec

MULTIPLIERS = (0x9E3779B97F4A7C15, 2685821657736338717, 6364136223846793005, 1442695040888963407)


def reference_logits(model: Decoder, tokens: Sequence[int], documents: Sequence[int]) -> Tensor:
    """(tokens, vocab_size) of one row."""
    spec = model.spec
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    residual = [weights["embedding.weight"][token] for token in tokens]
    # Each document counts its positions from 0: only differences of positions may matter.
    positions = [i - list(documents).index(documents[i]) for i in range(len(tokens))]
    if spec.ngrams is not None:
        for i in range(len(tokens)):
            history = tokens[i - positions[i] : i + 1]
            for row in ngram_rows(spec, history):
                residual[i] = residual[i] + weights["ngram_embedding.weight"][row]
    if spec.recall is not None:
        for i in range(len(tokens)):
            row = recall_row(spec, tokens[i - positions[i] : i + 1])
            residual[i] = residual[i] + weights["recall_embedding.weight"][row]
    if spec.embedding_norm:
        residual = [_norm(spec, x, weights.get("embedding_norm.weight")) for x in residual]
    for number in range(spec.num_layers):
        layer = {
            name.removeprefix(f"layers.{number}."): weight
            for name, weight in weights.items()
            if name.startswith(f"layers.{number}.")
        }
        inputs = [_norm(spec, x, layer.get("attention_norm.weight")) for x in residual]
        mixed = _attention(spec, layer, inputs, documents, positions)
        residual = [x + y for x, y in zip(residual, mixed, strict=True)]
        inputs = [_norm(spec, x, layer.get("mlp_norm.weight")) for x in residual]
        residual = [x + _mlp(spec, layer, y) for x, y in zip(residual, inputs, strict=True)]
    head = weights["embedding.weight"] if spec.tied_embeddings else weights["head.weight"]
    logits = torch.stack([head @ _norm(spec, x, weights.get("final_norm.weight")) for x in residual])
    cap = spec.logit_soft_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def ngram_rows(spec: ModelSpec, history: Sequence[int]) -> list[int]:
    """The rows for the n-grams that end with a document's last token so far; plain integers of 64 bits."""
    assert spec.ngrams is not None
    code = _signed((history[-1] + 1) * MULTIPLIERS[0])
    rows = []
    for n in range(2, max(spec.ngrams.orders) + 1):
        previous = history[-n] + 1 if len(history) >= n else 0
        code = _signed(code + previous * MULTIPLIERS[n - 1])
        code = _signed(code ^ (code >> 29))
        if n in spec.ngrams.orders:
            row = (_signed(code * MULTIPLIERS[1]) >> 20) % spec.ngrams.num_rows
            rows.append(spec.ngrams.orders.index(n) * spec.ngrams.num_rows + row)
    return rows


def recall_row(spec: ModelSpec, history: Sequence[int]) -> int:
    """The row for the token that followed the last time that the document's last tokens stood together."""
    assert spec.recall is not None
    for number, n in reversed(list(enumerate(spec.recall.orders))):
        for end in range(len(history) - 1, n - 1, -1):
            if list(history[end - n : end]) == list(history[-n:]):
                return 1 + number * spec.vocab_size + history[end]
    return 0


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def _norm(spec: ModelSpec, x: Tensor, weight: Tensor | None) -> Tensor:
    normed = x / math.sqrt(sum(v * v for v in x.tolist()) / len(x) + spec.norm.epsilon)
    return normed if weight is None else normed * weight


def _attention(
    spec: ModelSpec,
    layer: dict[str, Tensor],
    inputs: Sequence[Tensor],
    documents: Sequence[int],
    positions: Sequence[int],
) -> list[Tensor]:
    attention = spec.attention
    size, group = attention.head_dim, attention.num_heads // attention.num_kv_heads
    scale = 1 / math.sqrt(size) if attention.score_scale is None else attention.score_scale

    def head(name: str, token: int, number: int) -> Tensor:
        x = layer[f"attention.{name}.weight"][number * size : (number + 1) * size] @ inputs[token]
        if name == "value":
            return x
        if attention.qk_norm:
            x = _norm(spec, x, None)
        return x if attention.rope is None else _rotate(x, positions[token], attention.rope.base)

    outputs = []
    for i in range(len(inputs)):
        heads = []
        for number in range(attention.num_heads):
            query = head("query", i, number)
            visible = [j for j in range(i + 1) if documents[j] == documents[i]]
            scores = [math.exp(scale * float(query @ head("key", j, number // group))) for j in visible]
            values = [head("value", j, number // group) for j in visible]
            heads.append(sum(s * v for s, v in zip(scores, values, strict=True)) / sum(scores))
        outputs.append(layer["attention.output.weight"] @ torch.cat(heads))
    return outputs


def _rotate(x: Tensor, position: int, base: float) -> Tensor:
    half = len(x) // 2
    turned = [
        complex(x[i], x[i + half]) * math.e ** (1j * position * base ** (-2 * i / len(x)))
        for i in range(half)
    ]
    return torch.tensor([z.real for z in turned] + [z.imag for z in turned], dtype=torch.float64)


def _mlp(spec: ModelSpec, layer: dict[str, Tensor], x: Tensor) -> Tensor:
    def gelu(v: float) -> float:
        return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    def silu(v: float) -> float:
        return v / (1 + math.exp(-v))

    activation = {
        "swiglu": silu,
        "geglu": gelu,
        "gelu": gelu,
        "squared_relu": lambda v: max(v, 0.0) ** 2,
    }[spec.mlp.activation]
    up = layer["mlp.up.weight"] @ x
    inner = layer["mlp.gate.weight"] @ x if spec.mlp.gated else up
    activated = torch.tensor([activation(v) for v in inner.tolist()], dtype=torch.float64)
    return layer["mlp.down.weight"] @ (activated * up if spec.mlp.gated else activated)
