"""Curves in a terminal: one row of blocks, or several rows of braille dots."""

import itertools
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"
# The eight dots of a braille cell, by column and row from the top; the code point is 0x2800 plus their sum.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def resample(values: Sequence[float], count: int) -> list[float]:
    """`count` values spread evenly over the series: means where it has more, repeats where it has fewer."""
    if not values:
        return []
    edges = [i * len(values) / count for i in range(count + 1)]
    spans = (values[int(a) : max(int(a) + 1, int(b))] for a, b in itertools.pairwise(edges))
    return [sum(span) / len(span) for span in spans]


def sparkline(values: Sequence[float], width: int) -> str:
    """A row of blocks, from the smallest value's ▁ to the largest one's █."""
    shown = resample(values, min(width, len(values)))
    if not shown:
        return ""
    low, span = min(shown), (max(shown) - min(shown)) or 1.0
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] for value in shown)


def braille(values: Sequence[float], width: int, height: int) -> list[str]:
    """A curve in `height` rows of `width` characters, two dots across and four down in each."""
    shown = resample(values, 2 * width)
    if not shown:
        return [" " * width] * height
    low, span = min(shown), (max(shown) - min(shown)) or 1.0
    rows = [round((1 - (value - low) / span) * (4 * height - 1)) for value in shown]
    cells = [[0x2800] * width for _ in range(height)]
    for x, row in enumerate(rows):
        before = rows[x - 1] if x else row
        # Joined to the point before it, so that a steep fall is a line and not a gap.
        for y in range(min(row, before + 1), max(row, before - 1) + 1):
            cells[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
    return ["".join(map(chr, line)) for line in cells]
