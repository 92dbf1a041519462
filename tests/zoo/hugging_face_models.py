"""A small model of every architecture, with what sets the architecture apart."""

from typing import Any

from colossus.spec.model import (
    AttentionSpec,
    FirstLayers,
    LatentAttentionSpec,
    LayerNormSpec,
    Llama3Scaling,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RopeSpec,
    RouterGroups,
    RouterSpec,
    SharedMlpSpec,
    WindowSpec,
    YarnScaling,
)


def heads(**changes: Any) -> AttentionSpec:
    return AttentionSpec(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, **changes})


def small(
    attention: AttentionSpec | LatentAttentionSpec, mlp: MlpSpec | MoeSpec, **changes: Any
) -> ModelSpec:
    parts: dict[str, Any] = {
        "name": "small",
        "vocab_size": 23,
        "context_tokens": 64,
        "num_layers": 2,
        "hidden_size": 12,
        "zero_init_outputs": False,
    }
    return ModelSpec(attention=attention, mlp=mlp, **{**parts, **changes})


DENSE = MlpSpec(intermediate_size=20)
EXPERTS = MoeSpec(num_experts=4, top_k=2, intermediate_size=8)
GROK = {
    "norm": NormSpec(epsilon=1e-5),
    "norm_placement": "sandwich",
    "embedding_multiplier": 12**0.5,
    "logit_multiplier": 0.6,
}
GELU_EXPERTS = EXPERTS.model_copy(
    update={"activation": "geglu", "router": RouterSpec(renormalized=False, soft_cap=30.0)}
)
LATENT = LatentAttentionSpec(
    num_heads=3,
    q_lora_rank=8,
    kv_lora_rank=10,
    nope_head_dim=5,
    rope_head_dim=4,
    value_head_dim=6,
    rope=RopeSpec(scaling=YarnScaling(factor=4.0, original_context_tokens=16)),
)
BALANCED = EXPERTS.model_copy(
    update={
        "shared": SharedMlpSpec(intermediate_size=16),
        "router": RouterSpec(
            scoring="sigmoid",
            weight_multiplier=2.5,
            balancing_bias=True,
            groups=RouterGroups(num_groups=2, top_groups=1),
        ),
    }
)

MODELS = {
    "gpt2": small(
        AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=6, rope=None, bias="all"),
        MlpSpec(intermediate_size=20, activation="gelu", bias=True),
        norm=LayerNormSpec(),
        learned_positions=True,
        tied_embeddings=True,
    ),
    "llama": small(heads(head_dim=8), DENSE),
    "llama-tied-scaled": small(
        heads(rope=RopeSpec(base=5e5, scaling=Llama3Scaling(factor=8.0, original_context_tokens=16))),
        DENSE,
        tied_embeddings=True,
    ),
    "llama-biases": small(heads(bias="all"), DENSE.model_copy(update={"bias": True})),
    "llama-yarn": small(
        heads(rope=RopeSpec(scaling=YarnScaling(factor=4.0, original_context_tokens=16, magnitude=0.7))),
        DENSE,
    ),
    "mistral": small(heads(window=WindowSpec(tokens=5)), DENSE),
    "qwen2": small(heads(bias="qkv"), DENSE),
    "qwen2-tied": small(heads(bias="qkv"), DENSE, tied_embeddings=True),
    "qwen3": small(heads(qk_norm=True, qk_norm_weights="head"), DENSE),
    "qwen3-moe": small(heads(qk_norm=True, qk_norm_weights="head"), EXPERTS),
    "olmo2": small(heads(qk_norm=True, qk_norm_weights="all_heads"), DENSE, norm_placement="post"),
    "mixtral": small(heads(), EXPERTS),
    "gpt-oss": small(
        heads(
            rope=RopeSpec(
                base=150_000.0,
                scaling=YarnScaling(factor=4.0, original_context_tokens=16, whole_channels=False),
            ),
            window=WindowSpec(tokens=3, full_every=2),
            sinks=True,
            bias="all",
        ),
        EXPERTS.model_copy(
            update={"activation": "clamped_swiglu", "bias": True, "router": RouterSpec(bias=True)}
        ),
        num_layers=3,
    ),
    "deepseek-v3": small(LATENT, BALANCED, num_layers=3, first_layers=FirstLayers(num_layers=1, mlp=DENSE)),
    "deepseek-plain-queries": small(LATENT.model_copy(update={"q_lora_rank": None}), BALANCED),
    "grok-1": small(
        heads(head_dim=6, num_heads=2, score_soft_cap=30.0), GELU_EXPERTS, tied_embeddings=True, **GROK
    ),
    "grok-2": small(
        heads(score_soft_cap=30.0, score_temperature_tokens=16),
        GELU_EXPERTS.model_copy(
            update={"shared": SharedMlpSpec(intermediate_size=20, sum_multiplier=2**-0.5)}
        ),
        logit_soft_cap=50.0,
        **GROK,
    ),
}
"""By name; `transformers` has all but the Groks."""

NAMES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "llama-tied-scaled": "LlamaForCausalLM",
    "llama-biases": "LlamaForCausalLM",
    "llama-yarn": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2-tied": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3-moe": "Qwen3MoeForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
    "deepseek-v3": "DeepseekV3ForCausalLM",
    "deepseek-plain-queries": "DeepseekV3ForCausalLM",
    "grok-1": "Grok1ModelForCausalLM",
    "grok-2": "Grok1ForCausalLM",
}
