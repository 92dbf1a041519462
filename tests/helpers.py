"""Models small enough to check by hand, in every variety."""

from typing import Any

import torch

from colossus.models import Decoder, build
from colossus.spec.model import (
    AttentionSpec,
    FirstLayers,
    LatentAttentionSpec,
    LayerNormSpec,
    Llama3Scaling,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NgramSpec,
    NormSpec,
    RecallSpec,
    RopeSpec,
    RouterGroups,
    RouterSpec,
    SharedMlpSpec,
    WindowSpec,
    YarnScaling,
)

GQA = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=6)
LATENT = LatentAttentionSpec(
    num_heads=3, q_lora_rank=8, kv_lora_rank=10, nope_head_dim=5, rope_head_dim=4, value_head_dim=6
)


def _rope(scaling: Llama3Scaling | YarnScaling) -> AttentionSpec:
    return GQA.model_copy(update={"head_dim": 8, "rope": RopeSpec(base=100.0, scaling=scaling)})


def tiny(**changes: Any) -> ModelSpec:
    """Two layers of width 12 over 23 tokens, every matrix random from the start."""
    parts: dict[str, Any] = {
        "name": "tiny",
        "vocab_size": 23,
        "context_tokens": 16,
        "num_layers": 2,
        "hidden_size": 12,
        "attention": AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=6),
        "mlp": MlpSpec(intermediate_size=20),
        "zero_init_outputs": False,
    }
    return ModelSpec(**{**parts, **changes})


VARIETIES = {
    "plain": tiny(),
    "tied": tiny(tied_embeddings=True),
    "grouped": tiny(attention=GQA),
    "one_key": tiny(attention=AttentionSpec(num_heads=3, num_kv_heads=1, head_dim=4, qk_norm=True)),
    "no_positions": tiny(attention=AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=5, rope=None)),
    "scaled": tiny(attention=AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=6, score_scale=0.7)),
    "geglu": tiny(mlp=MlpSpec(intermediate_size=20, activation="geglu")),
    "gelu": tiny(mlp=MlpSpec(intermediate_size=20, activation="gelu")),
    "squared_relu": tiny(mlp=MlpSpec(intermediate_size=20, activation="squared_relu")),
    "no_norm_weights": tiny(norm=NormSpec(weighted=False), embedding_norm=True),
    "capped": tiny(logit_soft_cap=1.5, embedding_norm=True),
    "ngrams": tiny(ngrams=NgramSpec(orders=(2, 4), num_rows=31)),
    "recall": tiny(recall=RecallSpec(orders=(1, 3)), vocab_size=3),
    "everything": tiny(
        attention=GQA.model_copy(update={"qk_norm": True, "score_scale": 0.3}),
        mlp=MlpSpec(intermediate_size=20, activation="squared_relu"),
        embedding_norm=True,
        ngrams=NgramSpec(orders=(2, 3), num_rows=37),
        recall=RecallSpec(orders=(1, 2)),
        vocab_size=7,
        logit_soft_cap=3.0,
        tied_embeddings=True,
        num_layers=3,
    ),
    "biases": tiny(
        attention=GQA.model_copy(update={"bias": "all"}),
        mlp=MlpSpec(intermediate_size=20, activation="gelu", bias=True),
    ),
    "query_biases": tiny(attention=GQA.model_copy(update={"bias": "qkv"})),
    "layer_norm": tiny(norm=LayerNormSpec()),
    "layer_norm_without_bias": tiny(norm=LayerNormSpec(bias=False)),
    "learned_positions": tiny(attention=GQA.model_copy(update={"rope": None}), learned_positions=True),
    "post": tiny(norm_placement="post"),
    "sandwich": tiny(norm_placement="sandwich"),
    "multipliers": tiny(embedding_multiplier=3.5, logit_multiplier=0.6, logit_soft_cap=2.0),
    "llama3_rope": tiny(attention=_rope(Llama3Scaling(factor=4.0, original_context_tokens=8))),
    "yarn": tiny(attention=_rope(YarnScaling(factor=4.0, original_context_tokens=40))),
    "yarn_between_channels": tiny(
        attention=_rope(
            YarnScaling(factor=4.0, original_context_tokens=40, beta_fast=4.0, whole_channels=False)
        )
    ),
    "half_turned": tiny(
        attention=AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8, rope=RopeSpec(rotated_fraction=0.5))
    ),
    "head_norm_weights": tiny(attention=GQA.model_copy(update={"qk_norm": True, "qk_norm_weights": "head"})),
    "all_heads_norm": tiny(
        attention=GQA.model_copy(update={"qk_norm": True, "qk_norm_weights": "all_heads"})
    ),
    "capped_scores": tiny(attention=GQA.model_copy(update={"score_soft_cap": 0.8})),
    "temperature": tiny(attention=GQA.model_copy(update={"score_temperature_tokens": 3})),
    "window": tiny(attention=GQA.model_copy(update={"window": WindowSpec(tokens=4)})),
    "some_windows": tiny(
        num_layers=3, attention=GQA.model_copy(update={"window": WindowSpec(tokens=3, full_every=2)})
    ),
    "sinks": tiny(attention=GQA.model_copy(update={"sinks": True})),
    "latent": tiny(attention=LATENT),
    "latent_with_plain_queries": tiny(
        attention=LATENT.model_copy(
            update={
                "q_lora_rank": None,
                "rope": RopeSpec(scaling=YarnScaling(factor=4.0, original_context_tokens=40)),
            }
        )
    ),
    "mixture": tiny(mlp=MoeSpec(num_experts=5, top_k=2, intermediate_size=8)),
    "not_renormalized": tiny(
        mlp=MoeSpec(
            num_experts=4,
            top_k=2,
            intermediate_size=8,
            activation="geglu",
            router=RouterSpec(renormalized=False, soft_cap=0.7, weight_multiplier=1.7),
        )
    ),
    "balancing_bias": tiny(
        mlp=MoeSpec(
            num_experts=4,
            top_k=2,
            intermediate_size=8,
            router=RouterSpec(scoring="sigmoid", balancing_bias=True),
        )
    ),
    "expert_biases": tiny(
        mlp=MoeSpec(
            num_experts=3,
            top_k=1,
            intermediate_size=8,
            activation="clamped_swiglu",
            bias=True,
            shared=SharedMlpSpec(intermediate_size=4),
            router=RouterSpec(bias=True),
        )
    ),
    "grouped_experts": tiny(
        mlp=MoeSpec(
            num_experts=6,
            top_k=2,
            intermediate_size=8,
            activation="squared_relu",
            router=RouterSpec(groups=RouterGroups(num_groups=3, top_groups=2)),
        )
    ),
    "gpt": tiny(
        attention=AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=6, rope=None, bias="all"),
        mlp=MlpSpec(intermediate_size=20, activation="gelu", bias=True),
        norm=LayerNormSpec(),
        learned_positions=True,
        tied_embeddings=True,
    ),
    "gpt_oss": tiny(
        num_layers=3,
        attention=GQA.model_copy(
            update={
                "window": WindowSpec(tokens=3, full_every=2),
                "sinks": True,
                "bias": "all",
                "rope": RopeSpec(
                    scaling=YarnScaling(factor=4.0, original_context_tokens=40, whole_channels=False)
                ),
            }
        ),
        mlp=MoeSpec(
            num_experts=4,
            top_k=2,
            intermediate_size=8,
            activation="clamped_swiglu",
            bias=True,
            router=RouterSpec(bias=True),
        ),
    ),
    "deepseek": tiny(
        num_layers=3,
        attention=LATENT,
        first_layers=FirstLayers(num_layers=1, mlp=MlpSpec(intermediate_size=20)),
        mlp=MoeSpec(
            num_experts=6,
            top_k=2,
            intermediate_size=8,
            shared=SharedMlpSpec(intermediate_size=8),
            router=RouterSpec(
                scoring="sigmoid",
                weight_multiplier=2.5,
                balancing_bias=True,
                groups=RouterGroups(num_groups=3, top_groups=2),
            ),
        ),
    ),
    "grok": tiny(
        attention=GQA.model_copy(update={"score_soft_cap": 1.5, "score_temperature_tokens": 4}),
        mlp=MoeSpec(
            num_experts=4,
            top_k=2,
            intermediate_size=8,
            activation="geglu",
            shared=SharedMlpSpec(intermediate_size=12, sum_multiplier=2**-0.5),
            router=RouterSpec(renormalized=False, soft_cap=1.0),
        ),
        norm_placement="sandwich",
        embedding_multiplier=12**0.5,
        logit_multiplier=0.5,
        logit_soft_cap=2.0,
    ),
}
"""Every field of ModelSpec that changes the arithmetic, away from its default at least once."""


def scrambled(spec: ModelSpec, seed: int = 0) -> Decoder:
    """A model in which no parameter is a constant, so that none can be left out unseen."""
    model = build(spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def random_tokens(spec: ModelSpec, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(spec.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
