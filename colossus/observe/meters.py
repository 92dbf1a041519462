"""Small pure functions from raw measurements to the figures that people read."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class Smoothed:
    """An exponential mean whose early values are as good as its late ones: `Smoothed(20).add(3.0).value`.

    A value's weight halves every `half_life` values; the mean is over those seen, so the first is itself.
    """

    half_life: float = 20.0
    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> Self:
        """The mean with one value more."""
        keep = 0.5 ** (1 / self.half_life)
        return replace(self, total=keep * self.total + value, weight=keep * self.weight + 1)

    @property
    def value(self) -> float | None:
        """None before the first value."""
        return self.total / self.weight if self.weight else None


def smooth(values: Iterable[float], half_life: float = 20.0) -> list[float]:
    """The running exponential mean, one for each value."""
    mean, means = Smoothed(half_life), []
    for value in values:
        mean = mean.add(value)
        means.append(mean.total / mean.weight)
    return means


def throughput(tokens_per_s: Sequence[float], window: int = 50) -> float:
    """Tokens per second over the last steps: the median, which one slow step does not move."""
    return statistics.median(tokens_per_s[-window:]) if tokens_per_s else 0.0


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilisation: the share of `peak_flops` that useful arithmetic takes."""
    return tokens_per_s * flops_per_token / peak_flops


def seconds_left(points: Sequence[tuple[float, float]]) -> float | None:
    """When a fraction reaches 1, from its latest (time, fraction) points; None while that cannot be told."""
    if len(points) < 2:
        return None
    (first_s, first), (last_s, last) = points[0], points[-1]
    if last <= first:
        return None
    return max(0.0, 1 - last) * (last_s - first_s) / (last - first)


class Thinned:
    """A whole series in bounded memory: at most `limit` points, each the mean of equally many values."""

    def __init__(self, limit: int = 512) -> None:
        self.points: list[float] = []
        self._limit = limit
        self._stride = 1
        self._total = 0.0
        self._count = 0

    def add(self, value: float) -> None:
        self._total += value
        self._count += 1
        if self._count < self._stride:
            return
        self.points.append(self._total / self._count)
        self._total, self._count = 0.0, 0
        if len(self.points) >= self._limit:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=True)]
            self._stride *= 2
