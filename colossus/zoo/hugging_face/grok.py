"""Grok-1 and Grok-2, in the forms that vLLM loads (its models/grok1.py); Grok-2 also in SGLang's (its models/grok.py).

Grok-1 has the names of the conversion of xai-org/grok-1 to Hugging Face (hpcai-tech/grok-1), Grok-2 those of
xai-org/grok-2. Both are told apart by what Grok-2 adds: `moe_intermediate_size` and `residual_moe`. As every part
is normalised after its experts, dividing their weights by their sum, as vLLM does in Grok-1, changes nothing but for
the norm's epsilon."""

import math
from collections.abc import Iterator
from typing import Any

from colossus.errors import ConfigError
from colossus.spec.model import (
    AttentionSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RopeSpec,
    RouterSpec,
    SharedMlpSpec,
)
from colossus.zoo.hugging_face.architecture import Architecture
from colossus.zoo.hugging_face.common import (
    attention_fields,
    decoder_fields,
    experts,
    grouped,
    head_dim,
    heads,
    moe,
)
from colossus.zoo.hugging_face.fields import Fields
from colossus.zoo.hugging_face.mixtral import SPARSE_MOE
from colossus.zoo.hugging_face.rope import read_rope
from colossus.zoo.hugging_face.tables import ATTENTION, FIRST, LAST, MLP, decoder, row
from colossus.zoo.hugging_face.tensors import StoredTensor

_SHARED_MULTIPLIER = 2**-0.5
"""What Grok-2 multiplies the sum of experts and dense MLP by; no configuration says it."""

_GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh")


def is_grok_2(fields: Fields) -> bool:
    """Whether a configuration of either is Grok-2's, as vLLM tells them apart."""
    return fields.truth("residual_moe", False) or "moe_intermediate_size" in fields.values


def _read_1(fields: Fields, name: str) -> ModelSpec:
    num_heads, num_kv_heads = heads(fields)
    size = head_dim(fields, num_heads)
    hidden_size = fields.integer("hidden_size")
    if size * num_heads != hidden_size:
        raise ConfigError(
            f"head_dim is {size}; Grok-1 splits hidden_size, {hidden_size}, among {num_heads} heads"
        )
    scale = fields.number("attn_output_multiplier", size**-0.5)
    if not math.isclose(scale, size**-0.5, rel_tol=1e-6):
        raise ConfigError(
            f"attn_output_multiplier is {scale:g}; it must be 1/√head_dim, {size**-0.5:g}, as servers take it"
        )
    num_experts, top_k = experts(fields, "num_experts", 2)
    mlp = MoeSpec(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=fields.integer("intermediate_size"),
        activation="geglu",
        router=_router(fields),
    )
    cap = fields.cap("attn_logit_softcapping" if fields.has("attn_logit_softcapping") else "max_attn_value")
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=size,
        rope=_rope(fields),
        score_soft_cap=cap,
    )
    return _model(fields, name, attention, mlp, tied=True)


def _read_2(fields: Fields, name: str) -> ModelSpec:
    fields.only("attn_logit_softcapping_method", "tanh")
    fields.only("rope_rotate_half_dims", False)
    if fields.count("sliding_window_size"):
        raise fields.wrong("sliding_window_size", "-1; Colossus reads this architecture without windows")
    num_heads, num_kv_heads = heads(fields)
    num_experts, top_k = experts(fields, "num_local_experts", 2)
    dense_size = fields.integer("intermediate_size")
    shared = SharedMlpSpec(intermediate_size=dense_size, sum_multiplier=_SHARED_MULTIPLIER)
    mlp = MoeSpec(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=fields.integer("moe_intermediate_size", dense_size),
        activation="geglu",
        shared=shared if fields.truth("residual_moe", False) else None,
        router=_router(fields),
    )
    temperature_tokens = fields.count("attn_temperature_len")
    attention = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=fields.integer("head_dim", 128),
        rope=_rope(fields),
        score_soft_cap=fields.cap("attn_logit_softcapping"),
        score_temperature_tokens=temperature_tokens or None,
    )
    return _model(fields, name, attention, mlp, tied=False)


def _rope(fields: Fields) -> RopeSpec:
    """Never stretched: of the ways that `rope_type`, at the top, may name, `original` leaves rotations as they are,
    whatever `scaling_factor` says beside it, and of the others servers differ."""
    rope = read_rope(_unstretched(fields))
    if rope.scaling is not None:
        raise ConfigError(f"rope_scaling is {rope.scaling.kind!r}; Colossus reads Groks without any")
    return rope


def _unstretched(fields: Fields) -> Fields:
    fields.only("rope_type", "original", "default")
    table = fields.table("rope_parameters")
    if table is None or table.values.get("rope_type") != "original":
        return fields
    return Fields({**fields.values, "rope_parameters": {**table.values, "rope_type": "default"}})


def _router(fields: Fields) -> RouterSpec:
    return RouterSpec(
        renormalized=fields.truth("moe_router_renormalize", False),
        soft_cap=fields.cap("router_logit_softcapping"),
    )


def _model(fields: Fields, name: str, attention: AttentionSpec, mlp: MoeSpec, *, tied: bool) -> ModelSpec:
    fields.only("hidden_act", *_GELUS)
    return ModelSpec(
        name=name,
        vocab_size=fields.integer("vocab_size"),
        context_tokens=fields.integer("max_position_embeddings"),
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=fields.integer("hidden_size"),
        attention=attention,
        mlp=mlp,
        norm=NormSpec(epsilon=fields.positive("rms_norm_eps", 1e-5)),
        norm_placement="sandwich",
        embedding_multiplier=fields.positive("embedding_multiplier_scale", 1.0),
        tied_embeddings=fields.truth("tie_word_embeddings", tied),
        logit_multiplier=fields.positive("output_multiplier_scale", 1.0),
        logit_soft_cap=fields.cap("final_logit_softcapping"),
        zero_init_outputs=False,
    )


def _write_common(model: ModelSpec) -> dict[str, Any]:
    attention, mlp = grouped(model), moe(model)
    return {
        **decoder_fields(model),
        **attention_fields(attention),
        "hidden_act": "gelu",
        "num_experts_per_tok": mlp.top_k,
        "moe_router_renormalize": mlp.router.renormalized,
        "router_logit_softcapping": mlp.router.soft_cap or 0.0,
        "attn_logit_softcapping": attention.score_soft_cap or 0.0,
        "embedding_multiplier_scale": model.embedding_multiplier,
        "output_multiplier_scale": model.logit_multiplier,
        "final_logit_softcapping": model.logit_soft_cap,
    }


def _write_1(model: ModelSpec) -> dict[str, Any]:
    attention, mlp = grouped(model), moe(model)
    return {
        **_write_common(model),
        "intermediate_size": mlp.intermediate_size,
        "num_experts": mlp.num_experts,
        "attn_output_multiplier": attention.head_dim**-0.5,
        "max_attn_value": attention.score_soft_cap or 0.0,
        "output_router_logits": False,
    }


def _write_2(model: ModelSpec) -> dict[str, Any]:
    attention, mlp, context = grouped(model), moe(model), model.context_tokens
    stretched = context % 16 == 0
    return {
        **_write_common(model),
        "intermediate_size": mlp.intermediate_size if mlp.shared is None else mlp.shared.intermediate_size,
        "moe_intermediate_size": mlp.intermediate_size,
        "num_local_experts": mlp.num_experts,
        "residual_moe": mlp.shared is not None,
        "attn_temperature_len": attention.score_temperature_tokens or -1,
        "sliding_window_size": -1,
        "global_attn_every_n": 1,
        # No stretching; SGLang makes its table of rotations as long as the product of the two.
        "rope_type": "original",
        "original_max_position_embeddings": context // 16 if stretched else context,
        "scaling_factor": 16.0 if stretched else 1.0,
        "extrapolation_factor": 1.0,
        "attn_factor": 1.0,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
    }


# --- tensors ---

_NORMS = (
    ("pre_attn_norm", "attention_norm.weight"),
    ("post_attn_norm", "attention_output_norm.weight"),
    ("pre_moe_norm", "mlp_norm.weight"),
    ("post_moe_norm", "mlp_output_norm.weight"),
)
_EXPERT = "moe_block.experts.{expert}."
_LAYER_1 = (
    *(row(one.name.replace("self_attn.", "attn."), *one.parameters) for one in ATTENTION),
    row("moe_block.gate.weight", "mlp.router.weight"),
    row(_EXPERT + "linear.weight", "mlp.experts.gate.weight"),
    row(_EXPERT + "linear_v.weight", "mlp.experts.up.weight"),
    row(_EXPERT + "linear_1.weight", "mlp.experts.down.weight"),
    *(row(f"{name}.scale", parameter) for name, parameter in _NORMS),
)
_LAST_1 = (row("model.norm.scale", "final_norm.weight"), LAST[1])
_LAYER_2 = (
    *ATTENTION,
    *SPARSE_MOE,
    *(row(one.name, *(name.replace("mlp.", "mlp.shared.") for name in one.parameters)) for one in MLP),
    *(row(f"{name}.weight", parameter) for name, parameter in _NORMS),
)


def _tensors_1(model: ModelSpec) -> Iterator[StoredTensor]:
    return decoder(model, _LAYER_1, FIRST, _LAST_1)


def _tensors_2(model: ModelSpec) -> Iterator[StoredTensor]:
    return decoder(model, _LAYER_2)


def _scales(name: str) -> str:
    return name.removesuffix("weight") + "scale" if name.endswith("norm.weight") else name


def _weights(name: str) -> str:
    return name.removesuffix("scale") + "weight" if name.endswith("norm.scale") else name


GROK_1 = Architecture(
    "Grok1ModelForCausalLM", "grok-1", _read_1, _write_1, _tensors_1, canonical=_scales, in_transformers=False
)
GROK_2 = Architecture(
    "Grok1ForCausalLM", "git", _read_2, _write_2, _tensors_2, canonical=_weights, in_transformers=False
)
