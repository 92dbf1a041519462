"""Models small enough to check by hand, in every variety."""

from typing import Any

import torch

from colossus.models import Decoder, build
from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec, NgramSpec, NormSpec, RecallSpec

GQA = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=6)


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
