"""Two plans side by side: what differs, and which is better in what, by how much."""

from dataclasses import dataclass
from typing import Literal

from colossus.planner.explain.describe import CHOICES, ESTIMATES, FOLLOWS, GIVEN, explain_field, likely_text
from colossus.spec.plan import Plan
from colossus.spec.ranged import Ranged

Side = Literal["a", "b", "same"]


@dataclass(frozen=True, slots=True)
class Row:
    """One field of both plans."""

    field: str
    a: str
    b: str

    @property
    def differs(self) -> bool:
        return self.a != self.b


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which plan is better in one respect."""

    respect: str
    better: Side
    ratio: float
    """b over a."""
    text: str


_RESPECTS: tuple[tuple[str, str, bool], ...] = (
    ("days", "wall time", False), ("tokens_per_s", "tokens per second", True), ("mfu", "MFU", True),
    ("goodput", "goodput", True), ("cost_usd", "cost", False), ("energy_mwh", "energy", False),
    ("co2_t", "carbon", False), ("water_m3", "water", False),
)  # fmt: skip
"""Field, its name in a sentence, and whether more of it is better."""
_SAME = 0.001
"""Relative differences below this are none."""


def rows(a: Plan, b: Plan) -> tuple[Row, ...]:
    """Every field of both, as text."""
    names = [*GIVEN, *CHOICES, *FOLLOWS, *ESTIMATES]
    names.remove("step_parts_s")
    return tuple(Row(name, explain_field(a, name).value, explain_field(b, name).value) for name in names)


def headroom_bytes(plan: Plan) -> int:
    """Memory left on the fullest rank of the pool that has least left."""
    return min(share.memory_limit_bytes - share.peak_bytes for share in plan.pools)


def verdicts(a: Plan, b: Plan) -> tuple[Verdict, ...]:
    """Which is better in time, memory left, cost and energy; by the likely values."""
    found = []
    for field, respect, more in _RESPECTS:
        if field == "mfu" and a.precision != b.precision:
            continue  # shares of different peaks
        first, second = getattr(a.estimate, field), getattr(b.estimate, field)
        found.append(_verdict(field, respect, more, first, second))
    gib = 2**-30
    left = headroom_bytes(a), headroom_bytes(b)
    side: Side = "same" if left[0] == left[1] else "a" if left[0] > left[1] else "b"
    ratio = left[1] / left[0] if left[0] else 1.0
    text = (
        "as much memory left"
        if side == "same"
        else f"{abs(left[0] - left[1]) * gib:.1f} GiB more memory left ({left[0] * gib:.1f} and {left[1] * gib:.1f})"
    )
    found.insert(1, Verdict("memory left", side, ratio, text))
    return tuple(found)


def _verdict(field: str, respect: str, more_is_better: bool, a: Ranged, b: Ranged) -> Verdict:
    if a.likely == b.likely == 0:
        return Verdict(respect, "same", 1.0, f"{respect}: the same")
    ratio = b.likely / a.likely if a.likely else float("inf")
    if abs(ratio - 1.0) < _SAME:
        return Verdict(respect, "same", ratio, f"{respect}: the same")
    side: Side = "b" if (ratio > 1.0) == more_is_better else "a"
    gap = ratio if side == "b" else 1.0 / ratio if ratio else float("inf")
    word = "more" if gap > 1.0 else "less"
    first, second = (likely_text(field, value) for value in (a, b))
    text = f"{abs(gap - 1.0):.1%} {word} {respect} ({first} and {second})"
    return Verdict(respect, side, ratio, text)
