"""DeepSeek-V3, and Kimi K2, whose files say that they are DeepSeek-V3s.

The channels of a head that turn are stored as pairs, one beside the other; here the two of a pair lie in the two
halves, so rows change places. Read beside transformers' models/deepseek_v3 (5.23) and deepseek-ai/DeepSeek-V3."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from colossus.errors import ConfigError
from colossus.spec.model import (
    FirstLayers,
    LatentAttentionSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RouterGroups,
    RouterSpec,
    SharedMlpSpec,
)
from colossus.zoo.hugging_face.architecture import Architecture
from colossus.zoo.hugging_face.common import OtherParts, decoder_fields, experts, moe
from colossus.zoo.hugging_face.fields import MAX_SIZE, Fields
from colossus.zoo.hugging_face.rope import read_rope, write_rope
from colossus.zoo.hugging_face.tables import EXPERTS, MLP, PRE_NORMS, Row, decoder, row
from colossus.zoo.hugging_face.tensors import StoredTensor

_EPSILON = 1e-6
"""transformers normalises the short vectors with this one, whatever the configuration says of the others."""

_SHARED = tuple(
    row(f"mlp.shared_experts.{part}_proj.weight", f"mlp.shared.{part}.weight")
    for part in ("gate", "up", "down")
)


def _read(fields: Fields, name: str) -> ModelSpec:
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    fields.only("rope_interleave", True)
    fields.only("rms_norm_eps", _EPSILON)
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    fields.only("moe_layer_freq", 1)
    num_heads = fields.integer("num_attention_heads")
    if fields.integer("num_key_value_heads", num_heads) != num_heads:
        raise ConfigError(
            f"num_key_value_heads is {fields.integer('num_key_value_heads')}, but num_attention_heads is "
            f"{num_heads}; latent attention makes keys and values for every head"
        )
    head_dim = fields.integer("qk_nope_head_dim") + fields.integer("qk_rope_head_dim")
    if num_heads * head_dim > MAX_SIZE:
        raise ConfigError(f"{num_heads} heads of {head_dim} channels are more than any model has")
    return ModelSpec(
        name=name,
        vocab_size=fields.integer("vocab_size"),
        context_tokens=fields.integer("max_position_embeddings", 4096),
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=fields.integer("hidden_size"),
        attention=LatentAttentionSpec(
            num_heads=num_heads,
            q_lora_rank=fields.integer("q_lora_rank") if fields.has("q_lora_rank") else None,
            kv_lora_rank=fields.integer("kv_lora_rank"),
            nope_head_dim=fields.integer("qk_nope_head_dim"),
            rope_head_dim=fields.integer("qk_rope_head_dim"),
            value_head_dim=fields.integer("v_head_dim"),
            rope=read_rope(fields, "scores"),
        ),
        mlp=_experts(fields),
        first_layers=_first_layers(fields),
        norm=NormSpec(epsilon=_EPSILON),
        tied_embeddings=fields.truth("tie_word_embeddings", False),
        zero_init_outputs=False,
    )


def _experts(fields: Fields) -> MoeSpec:
    num_experts, top_k = experts(fields, "n_routed_experts", 8)
    size = fields.integer("moe_intermediate_size")
    return MoeSpec(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=size,
        shared=SharedMlpSpec(intermediate_size=fields.integer("n_shared_experts", 1) * size),
        router=RouterSpec(
            scoring="sigmoid",
            renormalized=fields.truth("norm_topk_prob", True),
            weight_multiplier=fields.positive("routed_scaling_factor", 2.5),
            balancing_bias=True,
            groups=_groups(fields, num_experts, top_k),
        ),
    )


def _groups(fields: Fields, num_experts: int, top_k: int) -> RouterGroups | None:
    num_groups = fields.integer("n_group", 1 if "n_group" in fields.values else 8)
    top_groups = fields.integer("topk_group", 1 if "topk_group" in fields.values else 4)
    if num_experts % num_groups or num_experts < 2 * num_groups:
        raise ConfigError(
            f"n_routed_experts is {num_experts}, but n_group is {num_groups}; groups are judged by their two best "
            f"experts, so it must be a multiple of n_group, and at least twice it"
        )
    if top_groups > num_groups or top_groups * (num_experts // num_groups) < top_k:
        raise ConfigError(
            f"topk_group is {top_groups} of {num_groups} groups of {num_experts // num_groups} experts, from which "
            f"a token cannot choose {top_k}"
        )
    return RouterGroups(num_groups=num_groups, top_groups=top_groups) if num_groups > 1 else None


def _first_layers(fields: Fields) -> FirstLayers | None:
    num_dense = fields.count("first_k_dense_replace", 3)
    if num_dense == 0:
        return None
    num_layers = fields.integer("num_hidden_layers")
    if num_dense >= num_layers:
        raise ConfigError(
            f"first_k_dense_replace is {num_dense}, but num_hidden_layers is {num_layers}; at least one layer must "
            f"have experts"
        )
    return FirstLayers(
        num_layers=num_dense, mlp=MlpSpec(intermediate_size=fields.integer("intermediate_size"))
    )


def _write(model: ModelSpec) -> dict[str, Any]:
    attention, mlp, first = model.attention, moe(model), model.first_layers
    if not isinstance(attention, LatentAttentionSpec):
        raise OtherParts("attention.kind is 'grouped'; this architecture has latent attention")
    if mlp.shared is None or mlp.shared.intermediate_size % mlp.intermediate_size:
        raise ConfigError(
            "mlp.shared must be a whole number of shared experts, of mlp.intermediate_size each"
        )
    groups = mlp.router.groups
    return {
        **decoder_fields(model),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.nope_head_dim,
        "qk_rope_head_dim": attention.rope_head_dim,
        "v_head_dim": attention.value_head_dim,
        "attention_bias": False,
        "rope_interleave": True,
        **write_rope(attention.rope, "scores"),
        # Of dense layers; where there are none, any number will do.
        "intermediate_size": mlp.intermediate_size if first is None else first.mlp.intermediate_size,
        "first_k_dense_replace": 0 if first is None else first.num_layers,
        "moe_layer_freq": 1,
        "moe_intermediate_size": mlp.intermediate_size,
        "n_routed_experts": mlp.num_experts,
        "n_shared_experts": mlp.shared.intermediate_size // mlp.intermediate_size,
        "num_experts_per_tok": mlp.top_k,
        "n_group": 1 if groups is None else groups.num_groups,
        "topk_group": 1 if groups is None else groups.top_groups,
        "norm_topk_prob": mlp.router.renormalized,
        "routed_scaling_factor": mlp.router.weight_multiplier,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
    }


def _tensors(model: ModelSpec) -> Iterator[StoredTensor]:
    assert isinstance(model.attention, LatentAttentionSpec)
    return decoder(
        model,
        (
            *_attention(model.attention),
            *MLP,
            row("mlp.gate.e_score_correction_bias", "mlp.balance"),
            *EXPERTS,
            *_SHARED,
            *PRE_NORMS,
        ),
    )


def _attention(attention: LatentAttentionSpec) -> tuple[Row, ...]:
    pairs = tuple(i // 2 + (i % 2) * (attention.rope_head_dim // 2) for i in range(attention.rope_head_dim))
    query = tuple(
        head * attention.head_dim + channel
        for head in range(attention.num_heads)
        for channel in (
            *range(attention.nope_head_dim),
            *(attention.nope_head_dim + channel for channel in pairs),
        )
    )
    key = (*range(attention.kv_lora_rank), *(attention.kv_lora_rank + channel for channel in pairs))
    return (
        replace(row("self_attn.q_proj.weight", "attention.query.weight"), order=query),
        row("self_attn.q_a_proj.weight", "attention.query_down.weight"),
        row("self_attn.q_a_layernorm.weight", "attention.query_norm.weight"),
        replace(row("self_attn.q_b_proj.weight", "attention.query_up.weight"), order=query),
        replace(row("self_attn.kv_a_proj_with_mqa.weight", "attention.key_value_down.weight"), order=key),
        row("self_attn.kv_a_layernorm.weight", "attention.key_value_norm.weight"),
        row("self_attn.kv_b_proj.weight", "attention.key_value_up.weight"),
        row("self_attn.o_proj.weight", "attention.output.weight"),
    )


DEEPSEEK_V3 = Architecture(
    "DeepseekV3ForCausalLM", "deepseek_v3", _read, _write, _tensors, has_extra_layers=True
)
