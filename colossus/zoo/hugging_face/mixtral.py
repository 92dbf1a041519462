"""Mixtral: experts in every layer, in the form that was released (`block_sparse_moe`, each expert by itself).

transformers 5 fuses the experts as it loads them and takes them apart as it saves. Read beside its models/mixtral and
conversion_mapping.py (5.23)."""

from collections.abc import Iterator
from typing import Any

from colossus.spec.model import AttentionSpec, ModelSpec, MoeSpec, WindowSpec
from colossus.zoo.hugging_face.architecture import Architecture
from colossus.zoo.hugging_face.common import (
    attention_fields,
    decoder_fields,
    experts,
    grouped,
    head_dim,
    heads,
    moe,
    read_decoder_fields,
)
from colossus.zoo.hugging_face.fields import Fields
from colossus.zoo.hugging_face.rope import read_rope
from colossus.zoo.hugging_face.tables import ATTENTION, PRE_NORMS, decoder, row
from colossus.zoo.hugging_face.tensors import StoredTensor

SPARSE_MOE = (
    row("block_sparse_moe.gate.weight", "mlp.router.weight"),
    row("block_sparse_moe.experts.{expert}.w1.weight", "mlp.experts.gate.weight"),
    row("block_sparse_moe.experts.{expert}.w2.weight", "mlp.experts.down.weight"),
    row("block_sparse_moe.experts.{expert}.w3.weight", "mlp.experts.up.weight"),
)


def _read(fields: Fields, name: str) -> ModelSpec:
    fields.only("hidden_act", "silu")
    num_heads, num_kv_heads = heads(fields, 8)
    num_experts, top_k = experts(fields, "num_local_experts", 2)
    return ModelSpec(
        name=name,
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim(fields, num_heads),
            rope=read_rope(fields, default_base=1e6),
            window=WindowSpec(tokens=fields.integer("sliding_window"))
            if fields.has("sliding_window")
            else None,
        ),
        mlp=MoeSpec(
            num_experts=num_experts, top_k=top_k, intermediate_size=fields.integer("intermediate_size")
        ),
        **read_decoder_fields(fields, context=131_072, epsilon=1e-5),
    )


def _write(model: ModelSpec) -> dict[str, Any]:
    mlp, window = moe(model), grouped(model).window
    return {
        **decoder_fields(model),
        **attention_fields(grouped(model)),
        "intermediate_size": mlp.intermediate_size,
        "hidden_act": "silu",
        "sliding_window": None if window is None else window.tokens,
        "num_local_experts": mlp.num_experts,
        "num_experts_per_tok": mlp.top_k,
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
    }


def _tensors(model: ModelSpec) -> Iterator[StoredTensor]:
    return decoder(model, (*ATTENTION, *SPARSE_MOE, *PRE_NORMS))


MIXTRAL = Architecture("MixtralForCausalLM", "mixtral", _read, _write, _tensors)
