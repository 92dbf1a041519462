"""The sample order against brute force, and its promises about mixtures and epochs."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.data.order import (
    GOLDEN,
    MAX_PERIOD,
    ROUNDS,
    Mixture,
    SampleOrder,
    WindowOrder,
    keys,
    mix,
    permute,
    quotas,
)
from colossus.errors import DataError

MASK = 2**64 - 1
weights = st.lists(st.integers(1, 400).map(lambda k: k / 20), min_size=1, max_size=9).map(tuple)


def scrambled(value: int) -> int:
    """`order.mix` in plain Python."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def permuted(place: int, size: int, key: int) -> int:
    """`order.permute` in plain Python, one place at a time."""
    side = next(side for side in range(1, size + 1) if side * side >= size)
    rows = -(-size // side)
    while True:
        row, column = divmod(place, side)
        for number in range(ROUNDS):
            round_key = (key + (number + 1) * GOLDEN) & MASK
            if number % 2 == 0:
                row = (row + scrambled(column ^ round_key) % rows) % rows
            else:
                column = (column + scrambled(row ^ round_key) % side) % side
        place = row * side + column
        if place < size:
            return place


@given(st.integers(1, 3000), st.integers(0, MASK))
@settings(max_examples=40, deadline=None)
def test_permute_is_one_to_one(size: int, key: int) -> None:
    places = np.arange(size)
    result = permute(places, size, np.full(size, key, np.uint64))
    assert sorted(result.tolist()) == places.tolist()


@given(st.integers(1, 500), st.integers(0, MASK), st.data())
@settings(max_examples=60, deadline=None)
def test_permute_equals_plain_python(size: int, key: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, size - 1))
    assert permute(np.array([place]), size, np.array([key], np.uint64))[0] == permuted(place, size, key)


def test_permute_reaches_everywhere_from_everywhere() -> None:
    size, num_keys = 16, 20_000
    key = mix(np.arange(1, num_keys + 1, dtype=np.uint64))
    for place in (0, 7, 15):
        counts = np.bincount(permute(np.full(num_keys, place), size, key), minlength=size)
        expected = num_keys / size
        # Chi-square with 15 degrees of freedom passes 50 once in 100,000.
        assert ((counts - expected) ** 2 / expected).sum() < 50


def test_permute_works_beyond_32_bits() -> None:
    size = 3 * 10**13 + 7
    places = np.arange(size - 1000, size)
    result = permute(places, size, np.full(1000, 9, np.uint64))
    assert len(set(result.tolist())) == 1000
    assert result.min() >= 0
    assert result.max() < size
    assert result.std() > size / 5


@given(weights)
@settings(max_examples=60, deadline=None)
def test_mixture_keeps_every_prefix_within_one(values: tuple[float, ...]) -> None:
    mixture = Mixture(values)
    length = 700
    source, number = mixture.locate(np.arange(length))
    for k, share in enumerate(mixture.shares):
        assert share == Fraction(repr(values[k])) / sum(Fraction(repr(value)) for value in values)
        counts = np.cumsum(source == k)
        ideal = float(share) * np.arange(1, length + 1)
        assert np.abs(counts - ideal).max() < 1 + 1e-9
        # The numbers of a source count its own samples.
        assert number[source == k].tolist() == list(range(int(counts[-1])))


@given(st.tuples(st.integers(1, 50), st.integers(1, 50)), st.integers(0, 10**12))
@settings(max_examples=40, deadline=None)
def test_two_sources_stay_within_one_in_every_window(values: tuple[int, int], first: int) -> None:
    mixture = Mixture((float(values[0]), float(values[1])))
    source, _ = mixture.locate(np.arange(first, first + 300))
    counts = np.concatenate([[0], np.cumsum(source == 0)])
    for length in (1, 2, 7, 32, 100, 299):
        deviation = counts[length:] - counts[:-length] - float(mixture.shares[0]) * length
        assert np.abs(deviation).max() < 1 + 1e-9


def test_mixture_is_the_same_at_any_place() -> None:
    mixture = Mixture((0.5, 0.3, 0.15, 0.05))
    period = sum(quotas(mixture.weights))
    assert period == 20
    near = mixture.locate(np.arange(1000))
    far = mixture.locate(np.arange(1000) + period * 10**12)
    assert np.array_equal(near[0], far[0])
    assert np.array_equal(far[1] - near[1], np.array(quotas(mixture.weights))[near[0]] * 10**12)


def test_weights_with_a_long_period_are_rounded_but_none_to_nothing() -> None:
    values = (0.123456789, 1.0, 2.718281828, 1e-9)
    counts = quotas(values)
    assert sum(counts) == MAX_PERIOD
    assert min(counts) == 1
    shares = np.array(values) / sum(values)
    assert np.abs(np.array(counts) / MAX_PERIOD - shares).max() <= 2 / MAX_PERIOD


def test_a_weight_of_zero_is_refused() -> None:
    with pytest.raises(DataError, match="above zero"):
        Mixture((1.0, 0.0))


@given(st.integers(0, 2**63), st.integers(2, 60), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_each_epoch_takes_every_window_once_and_no_token_twice(seed: int, tokens: int, context: int) -> None:
    order = WindowOrder(seed, 0, tokens, min(context, tokens - 1))
    num_windows = order.num_windows
    for epoch in range(3):
        numbers = np.arange(epoch * num_windows, (epoch + 1) * num_windows)
        epochs, windows, starts = order.locate(numbers)
        assert set(epochs.tolist()) == {epoch}
        assert sorted(windows.tolist()) == list(range(num_windows))
        targets = (starts[:, None] + 1 + np.arange(order.context_tokens)) % tokens
        assert len(set(targets.ravel().tolist())) == num_windows * order.context_tokens
        if epoch == 0:
            assert np.array_equal(starts, windows * order.context_tokens)


def test_epochs_and_seeds_and_sources_differ() -> None:
    def first_windows(seed: int, source: int, epoch: int) -> list[int]:
        order = WindowOrder(seed, source, 10_000, 10)
        return order.locate(np.arange(1000) + epoch * 1000)[1].tolist()

    orders = [first_windows(*which) for which in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    for index, one in enumerate(orders):
        for other in orders[:index]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 10
    borders = {
        WindowOrder(0, 0, 10_000, 10).locate(np.array([epoch * 1000]))[2][0] % 10 for epoch in range(40)
    }
    assert len(borders) > 5


@given(weights, st.integers(0, 10**9), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_random_access_equals_reading_in_order(values: tuple[float, ...], first: int, count: int) -> None:
    order = SampleOrder.of(3, values, tuple(1000 + 37 * k for k in range(len(values))), 7)
    together = order.locate(np.arange(first, first + count))
    for index in (0, count // 2, count - 1):
        alone = order.locate(np.array([first + index]))
        for name in ("source", "epoch", "window", "start"):
            assert getattr(alone, name)[0] == getattr(together, name)[index]


def test_keys_depend_on_every_argument() -> None:
    epochs = np.arange(50)
    found = {int(key) for seed in range(5) for source in range(5) for key in keys(seed, source, epochs)}
    assert len(found) == 5 * 5 * 50
