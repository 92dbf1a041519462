"""Small models of families that others' tools load too: to train here, and to export."""

from colossus.spec.data import DataConfig, TrainedTokenizer
from colossus.spec.duration import Duration
from colossus.spec.model import (
    AttentionSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RopeSpec,
    RouterSpec,
    SharedMlpSpec,
)
from colossus.spec.run import AdamW, Batch, Checkpoints, Cosine, Evaluation, RunConfig

VOCAB_SIZE = 2048


def small_llama() -> RunConfig:
    """Two minutes on a laptop: a Llama of 2.4 million parameters that `colossus export` hands to any other tool."""
    return _on_the_standard_library("small-llama", llama_model())


def small_grok() -> RunConfig:
    """Two minutes on a laptop: Grok-2's blocks, small: eight experts beside a dense MLP, capped scores, four norms."""
    return _on_the_standard_library("small-grok", grok_model())


def llama_model() -> ModelSpec:
    """Llama's parts at a size for a laptop."""
    return ModelSpec(
        name="small-llama",
        vocab_size=VOCAB_SIZE,
        context_tokens=512,
        num_layers=4,
        hidden_size=192,
        attention=AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=32, rope=RopeSpec(base=10_000.0)),
        mlp=MlpSpec(intermediate_size=512),
        norm=NormSpec(epsilon=1e-5),
        tied_embeddings=True,
        zero_init_outputs=False,
    )


def grok_model() -> ModelSpec:
    """Grok-2's parts at a size for a laptop."""
    return ModelSpec(
        name="small-grok",
        vocab_size=VOCAB_SIZE,
        context_tokens=512,
        num_layers=3,
        hidden_size=192,
        attention=AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=32, score_soft_cap=30.0),
        mlp=MoeSpec(
            num_experts=8,
            top_k=2,
            intermediate_size=192,
            activation="geglu",
            shared=SharedMlpSpec(intermediate_size=384, sum_multiplier=2**-0.5),
            router=RouterSpec(renormalized=False, soft_cap=30.0),
        ),
        norm=NormSpec(epsilon=1e-5),
        norm_placement="sandwich",
        embedding_multiplier=192**0.5,
        logit_multiplier=0.5,
        logit_soft_cap=50.0,
        zero_init_outputs=False,
    )


def _on_the_standard_library(name: str, model: ModelSpec) -> RunConfig:
    return RunConfig(
        name=name,
        model=model,
        data=DataConfig(tokenizer=TrainedTokenizer(vocab_size=model.vocab_size)),
        batch=Batch(sequences=8, sequence_tokens=256),
        budget=Duration.parse("2 minutes"),
        optimizer=AdamW(learning_rate=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
        schedule=Cosine(warmup_steps=20, final_scale=0.1),
        checkpoints=Checkpoints(every=Duration.parse("1 minute")),
        evaluation=Evaluation(every=Duration.parse("30 seconds"), max_tokens=32_768),
    )
