"""A decoder as one would write it on paper: float64, one position after another, no batches, no tricks.

Written from the docstrings of colossus/spec and the papers that they name, and not from colossus/models. Weights are
tensors and autograd goes through everything, so it is a reference of gradients, too. Attention is in
reference_attention.py, feed-forward parts and mixtures in reference_mlp.py.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from colossus.models import Decoder
from colossus.spec.model import ModelSpec, MoeSpec
from tests.models.reference_attention import attention
from tests.models.reference_mlp import Routed, mixture, mlp
from tests.models.reference_norm import norm

MULTIPLIERS = (0x9E3779B97F4A7C15, 2685821657736338717, 6364136223846793005, 1442695040888963407)


def weights_of(model: Decoder) -> dict[str, Tensor]:
    """Copies in float64, leaves of a graph of their own."""
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def reference_logits(model: Decoder, tokens: Sequence[int], documents: Sequence[int]) -> Tensor:
    """(tokens, vocab_size) of one row."""
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    return logits_of(model.spec, weights, hidden_states(model.spec, weights, tokens, documents))


def logits_of(spec: ModelSpec, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    head = weights["embedding.weight"] if spec.tied_embeddings else weights["head.weight"]
    logits = hidden @ head.T * spec.logit_multiplier
    cap = spec.logit_soft_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def hidden_states(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    tokens: Sequence[int],
    documents: Sequence[int],
    routed: list[list[Routed]] | None = None,
) -> Tensor:
    """(tokens, hidden_size) of one row, after the last norm. `routed`: a list that is given, for each mixture, what
    its router said of each token."""
    # Each document counts its positions from 0.
    positions = [i - list(documents).index(documents[i]) for i in range(len(tokens))]
    residual = _embedded(spec, weights, tokens, positions)
    for number in range(spec.num_layers):
        prefix = f"layers.{number}."
        layer = {
            name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)
        }
        inputs = [_before(spec, layer, x, "attention") for x in residual]
        mixed = attention(spec, layer, number, inputs, documents, positions)
        residual = [x + _after(spec, layer, y, "attention") for x, y in zip(residual, mixed, strict=True)]
        made = []
        of_this_layer: list[Routed] = []
        for x in residual:
            inner = _before(spec, layer, x, "mlp")
            part = spec.mlp
            if spec.first_layers is not None and number < spec.first_layers.num_layers:
                part = spec.first_layers.mlp
            if isinstance(part, MoeSpec):
                result, choice = mixture(part, layer, inner)
                of_this_layer.append(choice)
            else:
                result = mlp(part, layer, "mlp", inner)
            made.append(result)
        if routed is not None and of_this_layer:
            routed.append(of_this_layer)
        residual = [x + _after(spec, layer, y, "mlp") for x, y in zip(residual, made, strict=True)]
    return torch.stack([norm(spec.norm, x, weights, "final_norm") for x in residual])


def _before(spec: ModelSpec, layer: Mapping[str, Tensor], x: Tensor, block: str) -> Tensor:
    """A block's input: normalised, except where a norm stands behind the block alone."""
    return x if spec.norm_placement == "post" else norm(spec.norm, x, layer, f"{block}_norm")


def _after(spec: ModelSpec, layer: Mapping[str, Tensor], x: Tensor, block: str) -> Tensor:
    """What a block adds: normalised, except where a norm stands before the block alone."""
    return x if spec.norm_placement == "pre" else norm(spec.norm, x, layer, f"{block}_output_norm")


def _embedded(
    spec: ModelSpec, weights: Mapping[str, Tensor], tokens: Sequence[int], positions: Sequence[int]
) -> list[Tensor]:
    residual = []
    for i, token in enumerate(tokens):
        x = weights["embedding.weight"][token] * spec.embedding_multiplier
        history = tokens[i - positions[i] : i + 1]
        if spec.learned_positions:
            x = x + weights["position_embedding.weight"][positions[i]]
        if spec.ngrams is not None:
            for row in ngram_rows(spec, history):
                x = x + weights["ngram_embedding.weight"][row]
        if spec.recall is not None:
            x = x + weights["recall_embedding.weight"][recall_row(spec, history)]
        residual.append(norm(spec.norm, x, weights, "embedding_norm") if spec.embedding_norm else x)
    return residual


# --- lookups ---


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
