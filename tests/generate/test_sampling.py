"""What is drawn, against probabilities worked out token by token."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.errors import ConfigError
from colossus.generate import Sampling, next_token

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.9, 0.5, -torch.inf, 0.0])
TIED = torch.tensor([1.0, 1.0, 1.0, 1.0])


def on_paper(logits: torch.Tensor, sampling: Sampling) -> dict[int, float]:
    """Probability by id, of those that may be drawn."""
    likeliest = sorted(range(len(logits)), key=lambda i: -float(logits[i]))[: sampling.top_k]
    weights = {i: math.exp(float(logits[i]) / sampling.temperature) for i in likeliest}
    total = sum(weights.values())
    kept, reached = {}, 0.0
    for i, weight in weights.items():
        if sampling.top_p is not None and reached >= sampling.top_p:
            break
        kept[i] = weight
        reached += weight / total
    return {i: weight / sum(kept.values()) for i, weight in kept.items() if weight > 0}


def draw(logits: torch.Tensor, sampling: Sampling, count: int) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    return Counter(next_token(logits, sampling, generator) for _ in range(count))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.3),
        Sampling(temperature=5.0),
        Sampling(temperature=1.0, top_k=3),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_k=100),
        Sampling(temperature=1.0, top_p=0.5),
        Sampling(temperature=2.0, top_p=0.7),
        Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=1.0, top_p=1.0),
        Sampling(temperature=1.5, top_k=4, top_p=0.8),
    ],
    ids=lambda s: f"t={s.temperature} k={s.top_k} p={s.top_p}",
)
def test_tokens_are_drawn_with_their_probabilities(sampling: Sampling) -> None:
    count = 4000
    drawn = draw(LOGITS, sampling, count)
    expected = on_paper(LOGITS, sampling)
    assert drawn.keys() <= expected.keys()
    for token, probability in expected.items():
        error = 5 * math.sqrt(probability * (1 - probability) / count)
        assert drawn[token] / count == pytest.approx(probability, abs=error + 1e-12)


def test_top_k_leaves_k_tokens_where_more_are_equal() -> None:
    assert len(draw(TIED, Sampling(temperature=1.0, top_k=2), 200)) == 2


def test_temperature_0_is_the_likeliest_whatever_else_is_asked_for() -> None:
    sampling = Sampling(temperature=0.0, top_k=3, top_p=0.9)
    assert draw(LOGITS, sampling, 20) == {1: 20}


@settings(max_examples=50, deadline=None)
@given(
    temperature=st.floats(0, 1e300, allow_subnormal=True),
    top_k=st.none() | st.integers(1, 10**9),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    scale=st.sampled_from([1e-30, 1.0, 1e4, 1e30]),
)
def test_whatever_is_allowed_draws_something(
    temperature: float, top_k: int | None, top_p: float | None, scale: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    for token in draw(LOGITS * scale, sampling, 3):
        assert LOGITS[token] > -torch.inf


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": -5}, "top_k is -5"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"stop": ("a", "")}, "an empty stop text"),
    ],
)
def test_what_leaves_nothing_to_choose_is_refused(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Sampling(**values)  # type: ignore[arg-type]
