"""DeepSeek-V3 and Kimi K2: latent attention, many small experts beside a shared one, the first layers dense.

DeepSeek-V3's layer for predicting a second token, 14 billion parameters more, is not counted.
"""

from colossus.spec.model import (
    FirstLayers,
    LatentAttentionSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    RopeSpec,
    RouterGroups,
    RouterSpec,
    SharedMlpSpec,
    YarnScaling,
)
from colossus.zoo.entry import Entry


def _attention(num_heads: int, rope: RopeSpec) -> LatentAttentionSpec:
    return LatentAttentionSpec(
        num_heads=num_heads,
        q_lora_rank=1536,
        kv_lora_rank=512,
        nope_head_dim=128,
        rope_head_dim=64,
        value_head_dim=128,
        rope=rope,
    )


def _experts(num_experts: int, weight_multiplier: float, groups: RouterGroups | None = None) -> MoeSpec:
    return MoeSpec(
        num_experts=num_experts,
        top_k=8,
        intermediate_size=2048,
        shared=SharedMlpSpec(intermediate_size=2048),
        router=RouterSpec(
            scoring="sigmoid", weight_multiplier=weight_multiplier, balancing_bias=True, groups=groups
        ),
    )


def deepseek_v3() -> ModelSpec:
    return ModelSpec(
        name="deepseek-v3",
        vocab_size=129_280,
        context_tokens=163_840,
        num_layers=61,
        hidden_size=7168,
        attention=_attention(
            128, RopeSpec(base=10_000.0, scaling=YarnScaling(factor=40.0, original_context_tokens=4096))
        ),
        mlp=_experts(256, 2.5, RouterGroups(num_groups=8, top_groups=4)),
        first_layers=FirstLayers(num_layers=3, mlp=MlpSpec(intermediate_size=18_432)),
        zero_init_outputs=False,
    )


def kimi_k2() -> ModelSpec:
    scaling = YarnScaling(factor=32.0, original_context_tokens=4096, beta_fast=1.0)
    return ModelSpec(
        name="kimi-k2",
        vocab_size=163_840,
        context_tokens=131_072,
        num_layers=61,
        hidden_size=7168,
        attention=_attention(64, RopeSpec(base=50_000.0, scaling=scaling)),
        mlp=_experts(384, 2.827),
        first_layers=FirstLayers(num_layers=1, mlp=MlpSpec(intermediate_size=18_432)),
        zero_init_outputs=False,
    )


ENTRIES = {
    "deepseek-v3": Entry(
        "DeepSeek",
        "deepseek-ai/DeepSeek-V3 inference/configs; arXiv:2412.19437; router, RoPE scaling and context: recall",
        deepseek_v3,
    ),
    "kimi-k2": Entry(
        "Kimi", "THUDM/slime scripts/models/kimi-k2.sh; one dense layer, router and RoPE: recall", kimi_k2
    ),
}
