"""Qwen3, dense and mixtures of experts.

Read beside transformers' models/qwen3 and models/qwen3_moe (5.23)."""

from collections.abc import Iterator
from typing import Any

from colossus.errors import ConfigError
from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec, MoeSpec, RouterSpec
from colossus.zoo.hugging_face.architecture import Architecture
from colossus.zoo.hugging_face.common import (
    attention_fields,
    decoder_fields,
    dense,
    experts,
    grouped,
    head_dim,
    heads,
    moe,
    no_window,
    read_decoder_fields,
)
from colossus.zoo.hugging_face.fields import Fields
from colossus.zoo.hugging_face.rope import read_rope
from colossus.zoo.hugging_face.tables import ATTENTION, EXPERTS, MLP, PRE_NORMS, decoder
from colossus.zoo.hugging_face.tensors import StoredTensor


def _read_dense(fields: Fields, name: str) -> ModelSpec:
    num_heads, num_kv_heads = heads(fields, 32)
    size = fields.integer("head_dim", 128)
    mlp = MlpSpec(intermediate_size=fields.integer("intermediate_size"))
    return _model(fields, name, num_heads, num_kv_heads, size, mlp)


def _read_moe(fields: Fields, name: str) -> ModelSpec:
    num_heads, num_kv_heads = heads(fields, 4)
    num_experts, top_k = experts(fields, _experts_key(fields), 8)
    if fields.integer("decoder_sparse_step", 1) != 1 or fields.values.get("mlp_only_layers"):
        raise ConfigError(
            "some layers are dense (decoder_sparse_step, mlp_only_layers); Colossus reads this architecture with "
            "experts in every layer"
        )
    mlp = MoeSpec(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=fields.integer("moe_intermediate_size", 768),
        router=RouterSpec(renormalized=fields.truth("norm_topk_prob", False)),
    )
    return _model(fields, name, num_heads, num_kv_heads, head_dim(fields, num_heads), mlp)


def _experts_key(fields: Fields) -> str:
    """transformers 5 writes `num_local_experts` where releases have `num_experts`."""
    return "num_experts" if fields.has("num_experts") else "num_local_experts"


def _model(
    fields: Fields, name: str, num_heads: int, num_kv_heads: int, size: int, mlp: MlpSpec | MoeSpec
) -> ModelSpec:
    fields.only("hidden_act", "silu")
    no_window(fields)
    return ModelSpec(
        name=name,
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=size,
            rope=read_rope(fields),
            qk_norm=True,
            qk_norm_weights="head",
            bias="all" if fields.truth("attention_bias", False) else None,
        ),
        mlp=mlp,
        **read_decoder_fields(fields, context=32_768, epsilon=1e-6),
    )


def _write_common(model: ModelSpec) -> dict[str, Any]:
    attention = grouped(model)
    return {
        **decoder_fields(model),
        **attention_fields(attention),
        "attention_bias": attention.bias is not None,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": model.num_layers,
    }


def _write_dense(model: ModelSpec) -> dict[str, Any]:
    return {**_write_common(model), "intermediate_size": dense(model).intermediate_size}


def _write_moe(model: ModelSpec) -> dict[str, Any]:
    mlp = moe(model)
    return {
        **_write_common(model),
        "intermediate_size": mlp.intermediate_size,  # of dense layers, of which there are none
        "moe_intermediate_size": mlp.intermediate_size,
        "num_experts": mlp.num_experts,
        "num_experts_per_tok": mlp.top_k,
        "norm_topk_prob": mlp.router.renormalized,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
    }


def _tensors(model: ModelSpec) -> Iterator[StoredTensor]:
    mlp = EXPERTS if isinstance(model.mlp, MoeSpec) else MLP
    return decoder(model, (*ATTENTION, *mlp, *PRE_NORMS))


QWEN3 = Architecture("Qwen3ForCausalLM", "qwen3", _read_dense, _write_dense, _tensors)
QWEN3_MOE = Architecture("Qwen3MoeForCausalLM", "qwen3_moe", _read_moe, _write_moe, _tensors)
