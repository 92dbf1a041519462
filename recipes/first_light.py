"""The first runs of a newcomer: small models on the Python library's own source."""

from colossus.spec.data import DataConfig, TrainedTokenizer
from colossus.spec.duration import Duration
from colossus.spec.model import ModelSpec
from colossus.spec.run import AdamW, Batch, Checkpoints, Evaluation, Muon, RunConfig, WarmupStableDecay
from colossus.zoo.ladder import ladder


def first_light() -> RunConfig:
    """Three minutes on a laptop, from the Python library's own source to a model that writes something like it."""
    return _on_the_standard_library("first-light", ladder("candle"), "3 minutes")


def spark() -> RunConfig:
    """Half a minute of one core: the smallest model, to try things out with."""
    return _on_the_standard_library("spark", ladder("spark"), "25 cpu_seconds")


def _on_the_standard_library(name: str, model: ModelSpec, budget: str) -> RunConfig:
    return RunConfig(
        name=name,
        model=model,
        data=DataConfig(tokenizer=TrainedTokenizer(vocab_size=model.vocab_size)),
        batch=Batch(sequences=8, sequence_tokens=256),
        budget=Duration.parse(budget),
        # Found by search at 25 CPU-seconds, and still good at 75 and at 150 (docs/LOG.md).
        optimizer=Muon(
            learning_rate=0.015,
            newton_schulz_steps=3,
            rest=AdamW(
                learning_rate=0.02,
                head_learning_rate=0.01,
                embedding_learning_rate=0.1,
                sparse_learning_rate=0.4,
                betas=(0.8, 0.95),
                weight_decay=0.0,
            ),
        ),
        schedule=WarmupStableDecay(warmup_steps=10, decay_fraction=0.7),
        checkpoints=Checkpoints(every=Duration.parse("1 minute")),
        evaluation=Evaluation(every=Duration.parse("30 seconds"), max_tokens=32_768),
    )
