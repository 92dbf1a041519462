"""Grok-1 and Grok-2: eight large experts, norms on both sides of each block, soft-capped attention."""

from colossus.spec.model import (
    AttentionSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RopeSpec,
    RouterSpec,
    SharedMlpSpec,
)
from colossus.zoo.entry import Entry


def grok_1() -> ModelSpec:
    return ModelSpec(
        name="grok-1",
        vocab_size=131_072,
        context_tokens=8192,
        num_layers=64,
        hidden_size=6144,
        attention=AttentionSpec(
            num_heads=48, num_kv_heads=8, head_dim=128, rope=RopeSpec(base=10_000.0), score_soft_cap=30.0
        ),
        mlp=MoeSpec(
            num_experts=8,
            top_k=2,
            intermediate_size=32_768,
            activation="geglu",
            router=RouterSpec(scoring="softmax", renormalized=False),
        ),
        norm=NormSpec(epsilon=1e-5),
        norm_placement="sandwich",
        embedding_multiplier=6144**0.5,
        tied_embeddings=True,
        logit_multiplier=3**-0.5,
        zero_init_outputs=False,
    )


def grok_2() -> ModelSpec:
    """Its configuration names a stretching of rotations by 16, and the method `original`, which stretches nothing."""
    return ModelSpec(
        name="grok-2",
        vocab_size=131_072,
        context_tokens=131_072,
        num_layers=64,
        hidden_size=8192,
        attention=AttentionSpec(
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            rope=RopeSpec(base=208_533_496.0),
            score_soft_cap=30.0,
            score_temperature_tokens=1024,
        ),
        mlp=MoeSpec(
            num_experts=8,
            top_k=2,
            intermediate_size=16_384,
            activation="geglu",
            shared=SharedMlpSpec(intermediate_size=32_768, sum_multiplier=2**-0.5),
            router=RouterSpec(scoring="softmax", renormalized=False, soft_cap=30.0),
        ),
        norm=NormSpec(epsilon=1e-5),
        norm_placement="sandwich",
        embedding_multiplier=8192**0.5,
        logit_multiplier=0.5,
        logit_soft_cap=50.0,
        zero_init_outputs=False,
    )


ENTRIES = {
    "grok-1": Entry("Grok", "xai-org/grok-1 run.py and model.py", grok_1),
    "grok-2": Entry(
        "Grok",
        "xai-org/grok-2 config.json as in sgl-project/sglang-jax",
        grok_2,
    ),
}
