"""One step, and a few, of small models under any layout: `gradients(case)`, compared with one process's."""

from typing import Any

import numpy as np

from colossus.data import Batch
from colossus.spec.job import Job, Share
from colossus.spec.layout import Layout
from colossus.spec.model import (
    AttentionSpec,
    FirstLayers,
    LatentAttentionSpec,
    LayerNormSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NgramSpec,
    RecallSpec,
    RouterGroups,
    RouterSpec,
    SharedMlpSpec,
    WindowSpec,
)


def dense(**changes: Any) -> ModelSpec:
    parts: dict[str, Any] = {
        "name": "dense",
        "vocab_size": 96,
        "context_tokens": 64,
        "num_layers": 4,
        "hidden_size": 32,
        "attention": AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8),
        "mlp": MlpSpec(intermediate_size=48),
        "zero_init_outputs": False,
    }
    return ModelSpec(**{**parts, **changes})


def mixture(**changes: Any) -> ModelSpec:
    return dense(
        **{"name": "mixture", "mlp": MoeSpec(num_experts=8, top_k=2, intermediate_size=24), **changes}
    )


GROK_LIKE = mixture(
    name="grok-like",
    attention=AttentionSpec(
        num_heads=4, num_kv_heads=2, head_dim=8, score_soft_cap=3.0, window=WindowSpec(tokens=9, full_every=2)
    ),
    norm_placement="sandwich",
    embedding_multiplier=2.0,
    logit_multiplier=0.7,
    logit_soft_cap=5.0,
    mlp=MoeSpec(
        num_experts=8,
        top_k=2,
        intermediate_size=24,
        activation="geglu",
        router=RouterSpec(renormalized=False, soft_cap=4.0),
        shared=SharedMlpSpec(intermediate_size=32, sum_multiplier=0.7),
    ),
)
DEEPSEEK_LIKE = mixture(
    name="deepseek-like",
    attention=LatentAttentionSpec(
        num_heads=4, q_lora_rank=16, kv_lora_rank=12, nope_head_dim=6, rope_head_dim=4, value_head_dim=5
    ),
    first_layers=FirstLayers(num_layers=1, mlp=MlpSpec(intermediate_size=40)),
    mlp=MoeSpec(
        num_experts=8,
        top_k=2,
        intermediate_size=24,
        shared=SharedMlpSpec(intermediate_size=16),
        router=RouterSpec(
            scoring="sigmoid", balancing_bias=True, groups=RouterGroups(num_groups=4, top_groups=2)
        ),
    ),
)
OLMO_LIKE = dense(
    name="olmo-like",
    attention=AttentionSpec(
        num_heads=4, num_kv_heads=4, head_dim=8, qk_norm=True, qk_norm_weights="all_heads"
    ),
    norm_placement="post",
)
GPT_LIKE = dense(
    name="gpt-like",
    attention=AttentionSpec(num_heads=4, num_kv_heads=4, head_dim=8, rope=None, bias="all", sinks=True),
    mlp=MlpSpec(intermediate_size=48, activation="gelu", bias=True),
    norm=LayerNormSpec(),
    learned_positions=True,
    tied_embeddings=True,
)
SPARSE = dense(
    name="sparse",
    ngrams=NgramSpec(num_rows=64),
    recall=RecallSpec(),
    attention=AttentionSpec(num_heads=4, num_kv_heads=1, head_dim=8, qk_norm=True, qk_norm_weights="head"),
    embedding_norm=True,
)
GPT_OSS_LIKE = mixture(
    name="gpt-oss-like",
    attention=AttentionSpec(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        sinks=True,
        bias="all",
        window=WindowSpec(tokens=9, full_every=2),
    ),
    mlp=MoeSpec(
        num_experts=8,
        top_k=2,
        intermediate_size=24,
        activation="clamped_swiglu",
        bias=True,
        router=RouterSpec(bias=True),
    ),
)


def job(
    model: ModelSpec, *, sequence_tokens: int = 32, shares: tuple[Share, ...] | None = None, **settings: Any
) -> Job:
    """A job by hand: what is not said follows from the layout."""
    axes = {name: settings.pop(name) for name in list(settings) if name in Layout.model_fields}
    layout = Layout(**axes)
    pp, chunks = layout.pp, settings.get("virtual_stages", 1)
    each, rest = divmod(model.num_layers, pp)
    layers = settings.pop("stage_layers", tuple(each + (rank < rest) for rank in range(pp)))
    micro_batches = max(2, 2 * pp)
    return Job(
        layout=layout,
        stage_layers=layers,
        sequence_tokens=sequence_tokens,
        shares=shares
        or (Share(num_groups=layout.replica, micro_batch_sequences=1, num_micro_batches=micro_batches),),
        **{"schedule": "none" if pp == 1 else "1f1b", "virtual_stages": chunks, **settings},
    )


def batch(model: ModelSpec, job: Job, step: int = 0) -> Batch:
    """The whole step's, with documents of several lengths."""
    generator = np.random.default_rng(step)
    shape = (job.global_batch_sequences, job.sequence_tokens)
    tokens = generator.integers(0, model.vocab_size, shape)
    targets = generator.integers(0, model.vocab_size, shape)
    documents = np.cumsum(generator.random(shape) < 0.1, axis=1).astype(np.int32)
    samples = np.arange(len(tokens)) + step * len(tokens)
    return Batch(tokens, targets, documents, samples)


def part_of(whole: Batch, job: Job, rank: int) -> Batch:
    first, count = job.samples(rank)
    here = slice(first, first + count)
    return Batch(whole.tokens[here], whole.targets[here], whole.documents[here], whole.samples[here])
