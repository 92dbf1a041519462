"""The table of a model's parameters: every weight's name, shape, role and initial spread.

A layer's table is made once for all layers that are alike, with names relative to the layer, so that counting a model
of hundreds of layers takes no longer than counting one; `ModelSpec.parameters()` spells them all out.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from colossus.spec.parts import AttentionSpec, LatentAttentionSpec, LayerNormSpec, MlpSpec, MoeSpec

if TYPE_CHECKING:
    from colossus.spec.model import ModelSpec

Role = Literal["embedding", "sparse_embedding", "head", "matrix", "vector", "balance"]


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter tensor.

    `role` says how it is used, and so how it is optimised: `embedding` (rows looked up), `sparse_embedding`
    (rows looked up, of which a step touches few), `head` (projection to the vocabulary), `matrix` (any other
    matmul), `vector` (norm weights, biases and other elementwise ones: no decay), `balance` (moved by the experts'
    load; it has no gradient). `std` is the spread of its normal initial values; 0 means that it starts as the
    constant `start`. `expert`: one tensor for all experts, whose first dim is the expert.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    std: float = 0.0
    start: float = 0.0
    expert: bool = False

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Consecutive layers with the same parameters, whose names here are those within a layer."""

    first_layer: int
    num_layers: int
    mlp: MlpSpec | MoeSpec
    parameters: tuple[ParameterSpec, ...]


Table = Iterator[ParameterSpec]


@lru_cache(maxsize=256)
def input_parameters(spec: "ModelSpec") -> tuple[ParameterSpec, ...]:
    """What stands before the layers."""
    return tuple(_inputs(spec))


@lru_cache(maxsize=256)
def output_parameters(spec: "ModelSpec") -> tuple[ParameterSpec, ...]:
    """What stands after the layers."""
    return tuple(_outputs(spec))


@lru_cache(maxsize=256)
def layer_groups(spec: "ModelSpec") -> tuple[LayerGroup, ...]:
    """All layers, those that are alike together, in order."""
    first = spec.first_layers
    parts: list[tuple[int, int, MlpSpec | MoeSpec]] = []
    if first is not None:
        parts.append((0, first.num_layers, first.mlp))
    parts.append((sum(count for _, count, _ in parts), 0, spec.mlp))
    return tuple(
        LayerGroup(start, count or spec.num_layers - start, mlp, tuple(_layer(spec, mlp)))
        for start, count, mlp in parts
    )


@lru_cache(maxsize=32)
def all_parameters(spec: "ModelSpec") -> tuple[ParameterSpec, ...]:
    """Every parameter, in the built model's order."""
    layers = [
        replace(parameter, name=f"layers.{i}.{parameter.name}")
        for group in layer_groups(spec)
        for i in range(group.first_layer, group.first_layer + group.num_layers)
        for parameter in group.parameters
    ]
    return (*input_parameters(spec), *layers, *output_parameters(spec))


def layer_of(name: str) -> int | None:
    """The number of the layer that a parameter of this name is in; None for what stands before or after them."""
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "layers" else None


# --- before and after the layers ---


def _inputs(spec: "ModelSpec") -> Table:
    hidden = spec.hidden_size
    # A tied embedding is also the head, whose logits must start small. The first layer gets unit spread else.
    std = hidden**-0.5 if spec.tied_embeddings else 1.0 / spec.embedding_multiplier
    yield ParameterSpec("embedding.weight", (spec.vocab_size, hidden), "embedding", std)
    if spec.learned_positions:
        yield ParameterSpec("position_embedding.weight", (spec.context_tokens, hidden), "embedding", std)
    if spec.ngrams is not None:
        rows = len(spec.ngrams.orders) * spec.ngrams.num_rows
        yield ParameterSpec("ngram_embedding.weight", (rows, hidden), "sparse_embedding")
    if spec.recall is not None:
        rows = len(spec.recall.orders) * spec.vocab_size + 1
        yield ParameterSpec("recall_embedding.weight", (rows, hidden), "sparse_embedding")
    if spec.embedding_norm:
        yield from _norm(spec, "embedding_norm")


def _outputs(spec: "ModelSpec") -> Table:
    yield from _norm(spec, "final_norm")
    if not spec.tied_embeddings:
        std = 0.0 if spec.zero_init_outputs else spec.hidden_size**-0.5
        yield ParameterSpec("head.weight", (spec.vocab_size, spec.hidden_size), "head", std)


# --- one layer ---


def _layer(spec: "ModelSpec", mlp: MlpSpec | MoeSpec) -> Table:
    before, after = spec.norm_placement != "post", spec.norm_placement != "pre"
    if before:
        yield from _norm(spec, "attention_norm")
    if isinstance(spec.attention, LatentAttentionSpec):
        yield from _latent_attention(spec, spec.attention)
    else:
        yield from _attention(spec, spec.attention)
    if after:
        yield from _norm(spec, "attention_output_norm")
    if before:
        yield from _norm(spec, "mlp_norm")
    if isinstance(mlp, MoeSpec):
        yield from _experts(spec, mlp)
    else:
        yield from _mlp(spec, "mlp", mlp, mlp.intermediate_size)
    if after:
        yield from _norm(spec, "mlp_output_norm")


def _attention(spec: "ModelSpec", attention: AttentionSpec) -> Table:
    hidden, bias = spec.hidden_size, attention.bias is not None
    query_size = attention.num_heads * attention.head_dim
    kv_size = attention.num_kv_heads * attention.head_dim
    if attention.sinks:
        yield ParameterSpec("attention.sinks", (attention.num_heads,), "vector")
    yield from _linear(spec, "attention.query", query_size, hidden, bias=bias)
    yield from _linear(spec, "attention.key", kv_size, hidden, bias=bias)
    yield from _linear(spec, "attention.value", kv_size, hidden, bias=bias)
    yield from _linear(
        spec, "attention.output", hidden, query_size, bias=attention.bias == "all", writes_residual=True
    )
    if attention.qk_norm_weights is not None:
        of_all = attention.qk_norm_weights == "all_heads"
        for name, size in (("query_norm", query_size), ("key_norm", kv_size)):
            shape = (size if of_all else attention.head_dim,)
            yield ParameterSpec(f"attention.{name}.weight", shape, "vector", start=1.0)


def _latent_attention(spec: "ModelSpec", attention: LatentAttentionSpec) -> Table:
    hidden, heads = spec.hidden_size, attention.num_heads
    query_size = heads * attention.head_dim
    if attention.q_lora_rank is None:
        yield from _linear(spec, "attention.query", query_size, hidden)
    else:
        yield from _linear(spec, "attention.query_down", attention.q_lora_rank, hidden)
        yield from _norm(spec, "attention.query_norm", attention.q_lora_rank)
        yield from _linear(spec, "attention.query_up", query_size, attention.q_lora_rank)
    rank, value_size = attention.kv_lora_rank, heads * attention.value_head_dim
    yield from _linear(spec, "attention.key_value_down", rank + attention.rope_head_dim, hidden)
    yield from _norm(spec, "attention.key_value_norm", rank)
    yield from _linear(spec, "attention.key_value_up", heads * attention.nope_head_dim + value_size, rank)
    yield from _linear(spec, "attention.output", hidden, value_size, writes_residual=True)


def _mlp(spec: "ModelSpec", name: str, part: MlpSpec | MoeSpec, inner: int, experts: int = 0) -> Table:
    hidden, bias = spec.hidden_size, part.bias
    if part.gated:
        yield from _linear(spec, f"{name}.gate", inner, hidden, bias=bias, experts=experts)
    yield from _linear(spec, f"{name}.up", inner, hidden, bias=bias, experts=experts)
    yield from _linear(spec, f"{name}.down", hidden, inner, bias=bias, experts=experts, writes_residual=True)


def _experts(spec: "ModelSpec", moe: MoeSpec) -> Table:
    if moe.router.balancing_bias:
        yield ParameterSpec("mlp.balance", (moe.num_experts,), "balance")
    yield from _linear(spec, "mlp.router", moe.num_experts, spec.hidden_size, bias=moe.router.bias)
    yield from _mlp(spec, "mlp.experts", moe, moe.intermediate_size, moe.num_experts)
    if moe.shared is not None:
        yield from _mlp(spec, "mlp.shared", moe, moe.shared.intermediate_size)


# --- what layers are made of ---


def _linear(
    spec: "ModelSpec",
    name: str,
    outputs: int,
    inputs: int,
    *,
    bias: bool = False,
    experts: int = 0,
    writes_residual: bool = False,
) -> Table:
    """A linear map, weights (outputs, inputs); for several experts, theirs stacked."""
    std = 0.0 if writes_residual and spec.zero_init_outputs else inputs**-0.5
    if writes_residual and not spec.zero_init_outputs:
        std /= math.sqrt(2 * spec.num_layers)  # GPT-2's scaling: the residual sum keeps its spread
    stack = (experts,) if experts else ()
    yield ParameterSpec(f"{name}.weight", (*stack, outputs, inputs), "matrix", std, expert=experts > 0)
    if bias:
        yield ParameterSpec(f"{name}.bias", (*stack, outputs), "vector", expert=experts > 0)


def _norm(spec: "ModelSpec", name: str, size: int | None = None) -> Table:
    shape = (size or spec.hidden_size,)
    if spec.norm.weighted:
        yield ParameterSpec(f"{name}.weight", shape, "vector", start=1.0)
    if isinstance(spec.norm, LayerNormSpec) and spec.norm.bias:
        yield ParameterSpec(f"{name}.bias", shape, "vector")
