"""The first run of a newcomer."""

from colossus.spec.data import DataConfig, TrainedTokenizer
from colossus.spec.duration import Duration
from colossus.spec.run import AdamW, Batch, Checkpoints, Evaluation, Muon, RunConfig, WarmupStableDecay
from colossus.zoo.ladder import ladder


def first_light() -> RunConfig:
    """Three minutes on a laptop, from the Python library's own source to a model that writes something like it."""
    return RunConfig(
        name="first-light",
        model=ladder("candle"),
        data=DataConfig(tokenizer=TrainedTokenizer(vocab_size=2048)),
        batch=Batch(sequences=8, sequence_tokens=256),
        budget=Duration.parse("3 minutes"),
        optimizer=Muon(
            learning_rate=0.015,
            newton_schulz_steps=3,
            rest=AdamW(
                learning_rate=0.02,
                head_learning_rate=0.01,
                embedding_learning_rate=0.05,
                sparse_learning_rate=0.4,
                betas=(0.8, 0.95),
                weight_decay=0.0,
            ),
        ),
        schedule=WarmupStableDecay(warmup_steps=10, decay_fraction=0.7),
        checkpoints=Checkpoints(every=Duration.parse("1 minutes")),
        evaluation=Evaluation(every=Duration.parse("30 seconds"), max_tokens=16_384),
    )
