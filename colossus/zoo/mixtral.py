"""Mistral 7B, and with experts in every layer, none of them shared: Mixtral and DBRX."""

from functools import partial

from colossus.spec.model import (
    AttentionSpec,
    LayerNormSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RopeSpec,
    WindowSpec,
)
from colossus.zoo.entry import Entry


def mistral_7b() -> ModelSpec:
    """The first release; v0.2 has no window, and another RoPE base."""
    return _mistral("mistral-7b", 32_000, RopeSpec(base=10_000.0), WindowSpec(tokens=4096))


def mistral_7b_v0_3() -> ModelSpec:
    return _mistral("mistral-7b-v0.3", 32_768, RopeSpec(base=1e6), None)


def _mistral(name: str, vocab_size: int, rope: RopeSpec, window: WindowSpec | None) -> ModelSpec:
    return ModelSpec(
        name=name,
        vocab_size=vocab_size,
        context_tokens=32_768,
        num_layers=32,
        hidden_size=4096,
        attention=AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, rope=rope, window=window),
        mlp=MlpSpec(intermediate_size=14_336),
        norm=NormSpec(epsilon=1e-5),
        zero_init_outputs=False,
    )


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
_MISTRAL = partial(Entry, "Mistral", "Lightning-AI/litgpt config.py; RoPE base of v0.3: recall")
ENTRIES = {
    "mistral-7b": _MISTRAL(mistral_7b),
    "mistral-7b-v0.3": _MISTRAL(mistral_7b_v0_3),
    "mixtral-8x7b": _LITGPT(mixtral_8x7b),
    "mixtral-8x22b": _LITGPT(mixtral_8x22b),
    "dbrx": Entry("DBRX", "databricks/dbrx-base configuration; recall", dbrx),
}
