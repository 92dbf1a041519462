"""Mixtral and DBRX: mixtures of experts in every layer, without shared ones."""

from functools import partial

from colossus.spec.model import AttentionSpec, LayerNormSpec, ModelSpec, MoeSpec, NormSpec, RopeSpec
from colossus.zoo.entry import Entry


def mixtral_8x7b() -> ModelSpec:
    return ModelSpec(
        name="mixtral-8x7b",
        vocab_size=32_000,
        context_tokens=32_768,
        num_layers=32,
        hidden_size=4096,
        attention=AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, rope=RopeSpec(base=1e6)),
        mlp=MoeSpec(num_experts=8, top_k=2, intermediate_size=14_336),
        norm=NormSpec(epsilon=1e-5),
        zero_init_outputs=False,
    )


def mixtral_8x22b() -> ModelSpec:
    return ModelSpec(
        name="mixtral-8x22b",
        vocab_size=32_768,
        context_tokens=65_536,
        num_layers=56,
        hidden_size=6144,
        attention=AttentionSpec(num_heads=48, num_kv_heads=8, head_dim=128, rope=RopeSpec(base=1e6)),
        mlp=MoeSpec(num_experts=8, top_k=2, intermediate_size=16_384),
        norm=NormSpec(epsilon=1e-5),
        zero_init_outputs=False,
    )


def dbrx() -> ModelSpec:
    """Its queries, keys and values are also clamped to ±8, which a ModelSpec does not say."""
    return ModelSpec(
        name="dbrx",
        vocab_size=100_352,
        context_tokens=32_768,
        num_layers=40,
        hidden_size=6144,
        attention=AttentionSpec(num_heads=48, num_kv_heads=8, head_dim=128, rope=RopeSpec(base=500_000.0)),
        mlp=MoeSpec(num_experts=16, top_k=4, intermediate_size=10_752),
        norm=LayerNormSpec(bias=False),
        zero_init_outputs=False,
    )


_LITGPT = partial(Entry, "Mixtral", "Lightning-AI/litgpt config.py")
ENTRIES = {
    "mixtral-8x7b": _LITGPT(mixtral_8x7b),
    "mixtral-8x22b": _LITGPT(mixtral_8x22b),
    "dbrx": Entry("DBRX", "databricks/dbrx-base configuration; recall", dbrx),
}
