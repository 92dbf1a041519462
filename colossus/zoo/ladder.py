"""A ladder of small models, from a CPU's minutes to one GPU's hours: one shape, growing.

Heads of 64; depth and width grow together; squared ReLU and q/k-norm with zero-initialised outputs, which learn
fastest per FLOP at these sizes (docs/LOG.md); n-gram and recall embeddings, which cost no FLOPs at all.
"""

from dataclasses import dataclass

from colossus.errors import ConfigError, did_you_mean
from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec, NgramSpec, NormSpec, RecallSpec


@dataclass(frozen=True, slots=True)
class Rung:
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_tokens: int
    ngram_rows: int


RUNGS = {
    "spark": Rung(2, 128, 1024, 256, 2**15),
    "candle": Rung(3, 128, 2048, 256, 2**15),
    "lamp": Rung(6, 384, 4096, 512, 2**16),
    "beacon": Rung(12, 768, 32_768, 1024, 2**17),
    "lighthouse": Rung(24, 1024, 32_768, 2048, 2**18),
}


def ladder(rung: str) -> ModelSpec:
    """The model of a rung, `spark` to `lighthouse`. Raises ConfigError for an unknown one."""
    if rung not in RUNGS:
        raise ConfigError(f"the ladder has no rung {rung!r}.{did_you_mean(rung, RUNGS)}")
    size = RUNGS[rung]
    heads = size.hidden_size // 64
    return ModelSpec(
        name=rung,
        vocab_size=size.vocab_size,
        context_tokens=size.context_tokens,
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        attention=AttentionSpec(
            num_heads=heads, num_kv_heads=heads, head_dim=64, qk_norm=True, score_scale=0.12
        ),
        mlp=MlpSpec(intermediate_size=4 * size.hidden_size, activation="squared_relu"),
        norm=NormSpec(weighted=False),
        embedding_norm=True,
        ngrams=NgramSpec(orders=(2, 3, 4), num_rows=size.ngram_rows),
        recall=RecallSpec(),
    )
