"""Values that cannot be together are refused where they are put together."""

from typing import Any

import pytest
from pydantic import ValidationError

from colossus.errors import ConfigError
from colossus.spec.base import Frozen
from colossus.spec.config import with_plan
from colossus.spec.data import DataConfig, Source, TrainedTokenizer
from colossus.spec.duration import Duration
from colossus.spec.layout import Layout
from colossus.spec.model import AttentionSpec, MlpSpec, NgramSpec, NormSpec, RecallSpec, RopeSpec
from colossus.spec.run import AdamW, Batch, Cosine, Evaluation, Muon, WarmupStableDecay
from tests.parallel.plans import plan_of
from tests.spec.configs import plan_for, small_config


@pytest.mark.parametrize(
    ("kind", "values", "sentence"),
    [
        (AttentionSpec, {"num_heads": 6, "num_kv_heads": 4, "head_dim": 8}, "6 is not a multiple of"),
        (AttentionSpec, {"num_heads": 2, "num_kv_heads": 2, "head_dim": 7}, "head_dim 7 is odd"),
        (AttentionSpec, {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "score_scale": 0.0}, "than 0"),
        (NgramSpec, {"orders": (3, 2)}, "must rise"),
        (NgramSpec, {"orders": (2, 2)}, "must rise"),
        (NgramSpec, {"orders": (1, 2)}, "greater than or equal to 2"),
        (NgramSpec, {"orders": ()}, "at least 1 item"),
        (RecallSpec, {"orders": (2, 1)}, "must rise"),
        (RopeSpec, {"base": 1.0}, "greater than 1"),
        (NormSpec, {"epsilon": 0.0}, "greater than 0"),
        (MlpSpec, {"intermediate_size": 8, "activation": "relu"}, "Input should be 'swiglu'"),
        (Batch, {"sequences": 0}, "greater than 0"),
        (AdamW, {"learning_rate": -1.0}, "greater than 0"),
        (AdamW, {"learning_rate": float("nan")}, "finite number"),
        (AdamW, {"betas": (0.9, 1.1)}, "less than or equal to 1"),
        (Muon, {"newton_schulz_steps": 0}, "greater than or equal to 1"),
        (Muon, {"momentum": 1.5}, "less than or equal to 1"),
        (WarmupStableDecay, {"warmup_steps": -1}, "greater than or equal to 0"),
        (WarmupStableDecay, {"decay_fraction": 1.5}, "less than or equal to 1"),
        (Cosine, {"final_scale": -0.1}, "greater than or equal to 0"),
        (Evaluation, {"max_tokens": 0}, "greater than 0"),
        (Layout, {"tp": 0}, "greater than 0"),
        (Layout, {"dp": 2}, "Extra inputs are not permitted"),
        (Layout, {"tp": "2"}, "valid integer"),
        (Source, {"path": "stdlib", "weight": 0.0}, "greater than 0"),
        (DataConfig, {"heldout_fraction": 1.0}, "less than 1"),
        (TrainedTokenizer, {"vocab_size": 256}, "greater than or equal to 257"),
    ],
)  # fmt: skip
def test_impossible_values(kind: type[Frozen], values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**values)
    assert sentence in str(caught.value)


def test_odd_heads_are_fine_without_rotation() -> None:
    AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=7, rope=None)


def test_sequences_longer_than_the_context() -> None:
    with pytest.raises(ValidationError, match="sequence_tokens is 65, but"):
        small_config(batch=Batch(sequences=4, sequence_tokens=65))


def test_a_tokenizer_larger_than_the_vocabulary() -> None:
    with pytest.raises(ValidationError, match="vocab_size is 513, but"):
        small_config(data=DataConfig(tokenizer=TrainedTokenizer(vocab_size=513)))


def test_a_plan_of_another_batch() -> None:
    plan = plan_for(Batch(sequences=8, sequence_tokens=64))
    with pytest.raises(ValidationError, match="the plan is for 8 sequences of 64 tokens a step, but"):
        small_config(plan=plan)


def test_a_plan_for_another_optimizer() -> None:
    """Time, memory and exchanges of a plan are of its optimizer: a run with another one is not what was planned."""
    plan = plan_of(small_config().model, optimizer="muon")
    muon = small_config(optimizer=Muon())
    assert with_plan(muon, plan).optimizer == muon.optimizer
    with pytest.raises(
        ConfigError, match=r"is for muon, and the run trains with adamw.* plan with --fix optimizer=adamw"
    ):
        with_plan(small_config(optimizer=AdamW()), plan)


def test_reasons_for_what_a_plan_does_not_have() -> None:
    plan = plan_for(Batch(sequences=4, sequence_tokens=64)).model_dump()
    with pytest.raises(ValidationError, match="what a plan does not have: colour"):
        type(plan_for(Batch())).model_validate({**plan, "reasons": {"colour": "it is red"}})


def test_values_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        small_config().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("budget", "total"),
    [("10 steps", 10), ("2.5 steps", 3), ("1 tokens", 1), ("256 tokens", 1), ("257 tokens", 2),
     ("1 minutes", None), ("9 cpu_seconds", None)],
)  # fmt: skip
def test_steps_of_a_budget(budget: str, total: int | None) -> None:
    assert small_config(budget=Duration.parse(budget)).total_steps() == total


def test_fingerprints_follow_the_content() -> None:
    assert small_config().fingerprint() == small_config().fingerprint()
    assert small_config().fingerprint() != small_config(seed=1).fingerprint()
    assert len(small_config().fingerprint()) == 16


def test_ranks_of_a_layout() -> None:
    assert Layout(replica=3, pp=2, shard=4, cp=5, tp=7, ep=8).num_ranks == 3 * 2 * 4 * 5 * 7
