"""Configurations to test with: a small one, and any valid one."""

from typing import Any

from hypothesis import strategies as st

from colossus.spec.data import DataConfig, LoadedTokenizer, Source, TrainedTokenizer
from colossus.spec.duration import Duration
from colossus.spec.layout import Layout
from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec, RopeSpec
from colossus.spec.rank import Machine, Memory, RankEstimate, RankPlan
from colossus.spec.run import (
    AdamW,
    Batch,
    Checkpoints,
    Cosine,
    Evaluation,
    Muon,
    RunConfig,
    WarmupStableDecay,
)

TEXT = st.text(min_size=1, max_size=12)
RATE = st.floats(1e-12, 1e6)
SHARE = st.floats(0, 1)
COUNT = st.integers(1, 2**40)


def small_config(**changes: Any) -> RunConfig:
    """A valid configuration that could be trained in a second."""
    model = ModelSpec(
        name="tiny",
        vocab_size=512,
        context_tokens=64,
        num_layers=2,
        hidden_size=32,
        attention=AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=16),
        mlp=MlpSpec(intermediate_size=64),
    )
    parts = {
        "name": "small",
        "model": model,
        "data": DataConfig(tokenizer=TrainedTokenizer(vocab_size=512)),
        "batch": Batch(sequences=4, sequence_tokens=64),
        "budget": Duration(amount=1000, unit="steps"),
    }
    return RunConfig(**{**parts, **changes})


def plan_for(batch: Batch) -> RankPlan:
    """A plan such as the planner would make."""
    return RankPlan(
        layout=Layout(),
        machine=Machine(
            chip='a "chip"',
            kind="cpu",
            num_threads=2,
            memory_bytes=2**34,
            baseline_bytes=0,
            matmul_flops={"float32": 1.5e11, "bfloat16": 3e11},
            compiled_before=False,
        ),
        micro_batch_sequences=batch.sequences,
        num_micro_batches=1,
        sequence_tokens=batch.sequence_tokens,
        dtype="float32",
        compile=False,
        loss_chunk_tokens=64,
        estimate=RankEstimate(
            memory=Memory(
                baseline_bytes=1,
                weight_bytes=2,
                gradient_bytes=3,
                optimizer_bytes=4,
                activation_bytes=5,
                loss_bytes=6,
            ),
            flops_per_step=1e12,
            step_time_s=0.1,
        ),
        reasons={"dtype": "float32 is the faster one here"},
    )


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


durations = st.builds(
    Duration,
    amount=st.floats(1e-9, 1e18),
    unit=st.sampled_from(["steps", "tokens", "seconds", "cpu_seconds"]),
)
adamws = st.builds(
    AdamW, learning_rate=RATE, head_learning_rate=optional(RATE), betas=st.tuples(SHARE, SHARE), epsilon=RATE
)
muons = st.builds(Muon, learning_rate=RATE, momentum=SHARE, rest=adamws)
sources = st.builds(Source, path=st.text(max_size=12), weight=RATE, text_field=TEXT)


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.integers(1, 4))
    return ModelSpec(
        name=draw(TEXT),
        vocab_size=draw(st.integers(257, 2**40)),
        context_tokens=draw(st.integers(64, 2**40)),
        num_layers=draw(COUNT),
        hidden_size=draw(COUNT),
        attention=AttentionSpec(
            num_heads=kv_heads * draw(st.integers(1, 4)),
            num_kv_heads=kv_heads,
            head_dim=2 * draw(COUNT),
            rope=draw(optional(st.builds(RopeSpec, base=st.floats(1.01, 1e9)))),
        ),
        mlp=MlpSpec(intermediate_size=draw(COUNT), activation=draw(st.sampled_from(["swiglu", "gelu"]))),
        tied_embeddings=draw(st.booleans()),
        logit_soft_cap=draw(optional(RATE)),
    )


@st.composite
def run_configs(draw: st.DrawFn) -> RunConfig:
    """Any valid configuration, with every optional value both there and absent."""
    model = draw(models())
    batch = Batch(sequences=draw(COUNT), sequence_tokens=draw(st.integers(1, 64)))
    tokenizer = st.builds(TrainedTokenizer, vocab_size=st.integers(257, model.vocab_size)) | st.builds(
        LoadedTokenizer, path=TEXT
    )
    return RunConfig(
        name=draw(TEXT),
        seed=draw(st.integers(0, 2**63 - 1)),
        model=model,
        data=DataConfig(
            sources=tuple(draw(st.lists(sources, min_size=1, max_size=3))),
            heldout_fraction=draw(st.floats(0, 0.99)),
            tokenizer=draw(tokenizer),
        ),
        batch=batch,
        budget=draw(durations),
        optimizer=draw(adamws | muons),
        schedule=draw(st.builds(WarmupStableDecay, final_scale=SHARE) | st.builds(Cosine, final_scale=SHARE)),
        gradient_clip=draw(optional(RATE)),
        checkpoints=Checkpoints(every=draw(durations), keep_every_steps=draw(optional(COUNT))),
        evaluation=Evaluation(max_tokens=draw(optional(COUNT))),
        plan=plan_for(batch) if draw(st.booleans()) else None,
    )
