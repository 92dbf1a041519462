"""Spans of a run: written, read, measured."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from colossus.spec.duration import Duration, Progress
from colossus.units import parse_number

UNITS = ["steps", "tokens", "seconds", "cpu_seconds"]


@given(st.floats(0, exclude_min=True, allow_infinity=False), st.sampled_from(UNITS))
@example(60.0 * 1_234_567, "seconds")  # more minutes than six digits tell
@example(1e-9, "tokens")
@example(60.0 * (2**53 - 1), "seconds")
def test_what_is_written_is_read_back(amount: float, unit: str) -> None:
    duration = Duration(amount=amount, unit=unit)
    assert Duration.parse(str(duration)) == duration
    assert Duration.model_validate(duration.model_dump()) == duration


@pytest.mark.parametrize(
    ("text", "amount", "unit", "printed"),
    [
        ("3 minutes", 180, "seconds", "3 minutes"),
        ("1.5 hours", 5400, "seconds", "90 minutes"),
        ("90 s", 90, "seconds", "90 seconds"),
        ("1 min", 60, "seconds", "1 minute"),
        ("0.5 h", 1800, "seconds", "30 minutes"),
        ("10M tokens", 10_000_000, "tokens", "10000000 tokens"),
        ("1.5B tokens", 1_500_000_000, "tokens", "1500000000 tokens"),
        ("2_000 steps", 2000, "steps", "2000 steps"),
        ("1 step", 1, "steps", "1 step"),
        ("  7   STEPS ", 7, "steps", "7 steps"),
        ("75 cpu_seconds", 75, "cpu_seconds", "75 cpu_seconds"),
        ("1e3 tokens", 1000, "tokens", "1000 tokens"),
        ("2.5e-1 seconds", 0.25, "seconds", "0.25 seconds"),
    ],
)
def test_what_people_write(text: str, amount: float, unit: str, printed: str) -> None:
    duration = Duration.parse(text)
    assert (duration.amount, duration.unit, str(duration)) == (amount, unit, printed)


@pytest.mark.parametrize(
    "text",
    ["", "3", "minutes", "3minutes", "3 parsecs", "-3 steps", "0 steps", "nan steps", "inf tokens",
     "1e999 tokens", "3 4 steps", "3M M tokens", "٣ steps"],
)  # fmt: skip
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError):
        Duration.parse(text)


@pytest.mark.parametrize("amount", [0.0, -1.0, math.nan, math.inf])
def test_an_amount_that_is_no_span(amount: float) -> None:
    with pytest.raises(ValueError):
        Duration(amount=amount, unit="steps")


def test_how_much_of_it_is_done() -> None:
    progress = Progress(steps=5, tokens=2000, seconds=90.0, cpu_seconds=45.0)
    assert Duration.parse("10 steps").done(progress) == 0.5
    assert Duration.parse("1k tokens").done(progress) == 2.0
    assert Duration.parse("1 minutes").done(progress) == 1.5
    assert Duration.parse("90 cpu_seconds").done(progress) == 0.5
    for text, times in (("2 steps", 2), ("5 steps", 1), ("6 steps", 0)):
        assert Duration.parse(text).times_passed(progress) == times


@given(st.integers(1, 50), st.integers(1, 500))
def test_something_done_every_span_is_done_at_its_multiples(every: int, num_steps: int) -> None:
    duration = Duration(amount=float(every), unit="steps")
    due = [
        step
        for step in range(1, num_steps + 1)
        if duration.times_passed(Progress(steps=step)) > duration.times_passed(Progress(steps=step - 1))
    ]
    assert due == list(range(every, num_steps + 1, every))


@pytest.mark.parametrize("text", ["", "k", "M1", "1 0", "1..2", "1e", "0x10", "1,000"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        parse_number(text)
