"""Small functions with known answers."""

import pytest

from colossus.observe.chart import braille, resample, sparkline
from colossus.observe.meters import Smoothed, Thinned, mfu, seconds_left, smooth, throughput


def test_the_first_smoothed_value_is_itself() -> None:
    assert Smoothed().value is None
    assert Smoothed().add(3.0).value == 3.0


def test_a_constant_stays_and_a_step_is_half_followed_after_a_half_life() -> None:
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    long_at_zero_then_one = smooth([0.0] * 1000 + [1.0] * 20, half_life=20)
    assert long_at_zero_then_one[-1] == pytest.approx(0.5, abs=0.01)


def test_throughput_is_not_moved_by_one_slow_step() -> None:
    assert throughput([100.0] * 9 + [1.0]) == 100.0
    assert throughput([1.0] * 100 + [7.0] * 50) == 7.0
    assert throughput([]) == 0.0


def test_mfu() -> None:
    assert mfu(tokens_per_s=1000, flops_per_token=6e6, peak_flops=1e10) == pytest.approx(0.6)


def test_seconds_left_follows_the_latest_pace() -> None:
    assert seconds_left([(0, 0.0), (10, 0.25)]) == pytest.approx(30)
    assert seconds_left([(0, 0.5)]) is None
    assert seconds_left([(0, 0.5), (5, 0.5)]) is None
    assert seconds_left([(0, 0.5), (5, 1.2)]) == 0


def test_thinned_keeps_the_whole_series_in_bounded_memory() -> None:
    series = Thinned(limit=64)
    for value in range(10_000):
        series.add(value)
    assert 32 <= len(series.points) < 64
    assert series.points == sorted(series.points)
    assert series.points[0] < 200
    assert series.points[-1] > 9700


def test_resample_keeps_ends_and_means() -> None:
    assert resample([1, 2, 3, 4], 2) == [1.5, 3.5]
    assert resample([1, 2], 4) == [1, 1, 2, 2]
    assert resample([], 5) == []


def test_a_sparkline_goes_from_floor_to_ceiling() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5, 5], 8) == "▁▁▁"
    assert sparkline([], 8) == ""


def test_a_braille_curve_falls_from_the_upper_left_to_the_lower_right() -> None:
    rows = braille([3, 2, 1, 0], width=2, height=2)
    assert [len(row) for row in rows] == [2, 2]
    assert ord(rows[0][0]) & 0x01  # upper left dot
    assert ord(rows[1][1]) & 0x80  # lower right dot
    assert braille([], 3, 2) == ["   ", "   "]
