"""The global sample order: sample i of a run is a pure function of (seed, i).

Nothing here knows world sizes, workers or restarts. Two parts:

* `Mixture`: which source sample i comes from, and how many of that source came before. With shares w_k, every
  prefix of length n holds each source w_k·n times, give or take less than 1; a stretch anywhere in the run
  therefore less than 2, and less than 1 with two sources.
* `WindowOrder`: the n-th sample of a source is a window of it, in a seeded pseudo-random permutation per
  epoch.

Random access costs the same anywhere, and memory does not grow with the run or the corpus.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from heapq import heappop, heappush
from math import gcd, isqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from colossus.errors import DataError

Integers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

MAX_PERIOD = 1 << 20
"""Longest mixing pattern. Weights that need a longer one are rounded to multiples of its inverse."""
ROUNDS = 6
GOLDEN = 0x9E3779B97F4A7C15


def quotas(weights: tuple[float, ...]) -> tuple[int, ...]:
    """How often each source comes in one period of the mixture; their sum is the period.

    Exact for weights as they are written in decimal (0.7, 0.2, 0.1 → 7, 2, 1) while the period stays within
    MAX_PERIOD; else the shares are rounded to multiples of 1 / MAX_PERIOD, none to zero.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    period = 1
    for share in shares:
        period = period * share.denominator // gcd(period, share.denominator)
    if period <= MAX_PERIOD:
        return tuple(int(share * period) for share in shares)
    counts = [max(1, int(share * MAX_PERIOD)) for share in shares]
    # What rounding down left goes to the largest remainders; what "at least one" took comes from the largest.
    by_remainder = sorted(range(len(shares)), key=lambda k: (counts[k] - shares[k] * MAX_PERIOD, k))
    for k in by_remainder[: max(0, MAX_PERIOD - sum(counts))]:
        counts[k] += 1
    counts[counts.index(max(counts))] -= sum(counts) - MAX_PERIOD
    return tuple(counts)


@lru_cache(maxsize=8)
def pattern(counts: tuple[int, ...]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint32]]:
    """One period: the source of each place, and how many places of that source come before it."""
    period = sum(counts)
    if len(counts) == 2:
        # Rounded multiples of the share: no stretch anywhere is off by one or more.
        steps = np.arange(period + 1, dtype=np.int64)
        first = np.diff((2 * steps * counts[0] + period) // (2 * period))
        sources = (1 - first).astype(np.uint16)
    else:
        sources = earliest_deadlines(counts)
    places = np.empty(period, np.uint32)
    for source, count in enumerate(counts):
        places[sources == source] = np.arange(count, dtype=np.uint32)
    sources.setflags(write=False)
    places.setflags(write=False)
    return sources, places


def earliest_deadlines(counts: tuple[int, ...]) -> npt.NDArray[np.uint16]:
    """Assigns places to sources so that every prefix is within 1 of its quota.

    The j-th sample of a source with share w may stand at places ⌊(j-1)/w⌋ … ⌈j/w⌉ - 1: that is what "within
    1" means. Unit jobs with such windows always fit, and taking the open one with the earliest deadline finds
    how.
    """
    period = sum(counts)
    sources = np.empty(period, np.uint16)
    taken = [0] * len(counts)
    waiting: list[list[int]] = [[] for _ in range(period + 1)]
    waiting[0] = [source for source, count in enumerate(counts) if count]
    open_jobs: list[tuple[int, int]] = []
    for place in range(period):
        for source in waiting[place]:
            heappush(open_jobs, (-(-(taken[source] + 1) * period // counts[source]), source))
        source = heappop(open_jobs)[1]
        sources[place] = source
        taken[source] += 1
        if taken[source] < counts[source]:
            # Its next sample opens later, or at the next place at the soonest.
            waiting[max(place + 1, taken[source] * period // counts[source])].append(source)
    return sources


@dataclass(frozen=True)
class Mixture:
    """Divides the samples of a run among sources by weight."""

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights) <= 0:
            raise DataError(
                f"mixing weights must be above zero, and one at the least; they are {self.weights}"
            )

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """The exact share of each source, after rounding if there was any (see `quotas`)."""
        counts = quotas(self.weights)
        return tuple(Fraction(count, sum(counts)) for count in counts)

    def locate(self, samples: Integers) -> tuple[Integers, Integers]:
        """For each sample its source, and how many samples of that source come before it."""
        if len(self.weights) == 1:
            return np.zeros(len(samples), np.int64), np.asarray(samples, np.int64)
        counts = quotas_cached(self.weights)
        sources, places = pattern(counts)
        periods, place = np.divmod(samples, len(sources))
        source = sources[place].astype(np.int64)
        return source, periods * np.array(counts, np.int64)[source] + places[place]


quotas_cached = lru_cache(maxsize=8)(quotas)


def mix(values: Keys) -> Keys:
    """Scrambles 64-bit values one to one (the finisher of splitmix64); arithmetic wraps around by design."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keys(seed: int, source: int, epochs: Integers) -> Keys:
    """A 64-bit key for each (seed, source, epoch)."""
    base = np.array([seed % 2**64], np.uint64)
    base = mix(mix(base + np.uint64(GOLDEN)) + np.uint64(source + 1))
    return mix(base + mix(epochs.astype(np.uint64) + np.uint64(GOLDEN)))


def permute(places: Integers, size: int, key: Keys) -> Integers:
    """A pseudo-random permutation of 0 … size-1 for each key, at `places`; all arrays of one length.

    A Feistel network on the smallest near-square grid that holds `size` cells: each round shifts one
    coordinate by a scrambled other, so it can be undone and is one to one. A place that lands outside is sent
    through again until it lands inside; fewer than one in √size does.
    """
    side = isqrt(size - 1) + 1
    rows = -(-size // side)
    result = np.array(places, np.int64)
    outside = np.ones(len(result), bool)
    while outside.any():
        result[outside] = feistel(result[outside], rows, side, key[outside])
        outside = result >= size
    return result


def feistel(places: Integers, rows: int, side: int, key: Keys) -> Integers:
    """One pass over a grid of `rows` × `side` cells."""
    row, column = np.divmod(places.astype(np.uint64), np.uint64(side))
    for number in range(ROUNDS):
        round_key = key + np.uint64((number + 1) * GOLDEN % 2**64)
        if number % 2 == 0:
            row = (row + mix(column ^ round_key) % np.uint64(rows)) % np.uint64(rows)
        else:
            column = (column + mix(row ^ round_key) % np.uint64(side)) % np.uint64(side)
    return (row * np.uint64(side) + column).astype(np.int64)


@dataclass(frozen=True)
class WindowOrder:
    """The windows of one source in the order in which a run takes them.

    The source's N training tokens form a ring, cut into W = N // T windows of T targets: window j of epoch e
    begins at token o_e + j·T and holds T + 1 tokens, the last being the next window's first. o_0 = 0, later
    offsets are drawn from the whole ring, so window borders differ from epoch to epoch. In each epoch every
    window comes exactly once, so every token is a target at most once, and N mod T of them (fewer than one
    window) rest, others in each epoch.
    """

    seed: int
    source: int
    num_tokens: int
    context_tokens: int

    @property
    def num_windows(self) -> int:
        """Windows per epoch."""
        return self.num_tokens // self.context_tokens

    def locate(self, numbers: Integers) -> tuple[Integers, Integers, Integers]:
        """For the n-th samples of this source (n from 0): epoch, window and first token of each."""
        epochs, places = np.divmod(np.asarray(numbers, np.int64), self.num_windows)
        key = keys(self.seed, self.source, epochs)
        windows = permute(places, self.num_windows, key)
        offsets = (mix(key ^ np.uint64(GOLDEN)) % np.uint64(self.num_tokens)).astype(np.int64)
        starts = (np.where(epochs > 0, offsets, 0) + windows * self.context_tokens) % self.num_tokens
        return epochs, windows, starts


@dataclass(frozen=True)
class Samples:
    """Where samples come from; int64 arrays of one length."""

    source: Integers
    epoch: Integers
    window: Integers
    start: Integers
    """First token in the source's ring of training tokens."""


@dataclass(frozen=True)
class SampleOrder:
    """Sample i of a run → source, epoch, window."""

    mixture: Mixture
    orders: tuple[WindowOrder, ...]

    @classmethod
    def of(
        cls, seed: int, weights: tuple[float, ...], num_tokens: tuple[int, ...], context_tokens: int
    ) -> "SampleOrder":
        """The order over sources with these weights and numbers of training tokens."""
        return cls(
            Mixture(weights),
            tuple(WindowOrder(seed, k, tokens, context_tokens) for k, tokens in enumerate(num_tokens)),
        )

    def locate(self, samples: npt.NDArray[Any]) -> Samples:
        """Where each sample comes from; `samples` are any global indices ≥ 0."""
        source, number = self.mixture.locate(np.asarray(samples, np.int64))
        epoch, window, start = (np.empty(len(source), np.int64) for _ in range(3))
        for k in np.unique(source):
            chosen = source == k
            epoch[chosen], window[chosen], start[chosen] = self.orders[k].locate(number[chosen])
        return Samples(source, epoch, window, start)
