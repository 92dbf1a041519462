"""Learning rates over a run, against numbers worked out by hand."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossus.optim import multiplier
from colossus.spec.run import Cosine, WarmupStableDecay

Schedule = WarmupStableDecay | Cosine


def over_run(schedule: Schedule, num_steps: int) -> list[float]:
    return [multiplier(schedule, step=step, done=step / num_steps) for step in range(num_steps)]


def test_rise_stay_fall() -> None:
    schedule = WarmupStableDecay(warmup_steps=4, decay_fraction=0.5, final_scale=0.0)
    assert over_run(schedule, 10) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_fall_to_a_final_scale() -> None:
    schedule = WarmupStableDecay(warmup_steps=0, decay_fraction=0.5, final_scale=0.5)
    assert over_run(schedule, 4) == pytest.approx([1, 1, 1, 0.75])


def test_half_a_cosine() -> None:
    schedule = Cosine(warmup_steps=0, final_scale=0.2)
    assert over_run(schedule, 4) == pytest.approx(
        [1.0, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, 0.6, 0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2]
    )


def test_a_cosine_rises_first() -> None:
    assert multiplier(Cosine(warmup_steps=10), step=0, done=0.0) == pytest.approx(0.1)


def test_without_a_fall_it_stays() -> None:
    assert set(over_run(WarmupStableDecay(warmup_steps=0, decay_fraction=0.0), 7)) == {1.0}


def test_a_fall_from_the_first_step() -> None:
    schedule = WarmupStableDecay(warmup_steps=0, decay_fraction=1.0)
    assert over_run(schedule, 4) == pytest.approx([1, 0.75, 0.5, 0.25])


schedules = st.builds(
    WarmupStableDecay,
    warmup_steps=st.integers(0, 20),
    decay_fraction=st.floats(0.01, 1),
    final_scale=st.floats(0, 1),
) | st.builds(Cosine, warmup_steps=st.integers(0, 20), final_scale=st.floats(0, 1))


@given(schedules, st.floats(1, 5))
def test_it_ends_with_the_budget_however_late_the_last_step_is(schedule: Schedule, done: float) -> None:
    assert multiplier(schedule, step=1000, done=done) == pytest.approx(schedule.final_scale, abs=1e-12)


@given(schedules, st.integers(1, 200))
def test_it_rises_once_and_then_never_again(schedule: Schedule, num_steps: int) -> None:
    values = over_run(schedule, num_steps)
    assert all(0 <= value <= 1 for value in values)
    after = values[schedule.warmup_steps :]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after))
