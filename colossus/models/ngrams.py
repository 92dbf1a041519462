"""Which row of the n-gram table each position looks up."""

import torch
from torch import Tensor

from colossus.spec.model import NgramSpec

# Odd 64-bit constants (as signed), one per distance into the past; any set of odd numbers that differ would do.
_MULTIPLIERS = (
    -7046029254386353131,
    2685821657736338717,
    6364136223846793005,
    1442695040888963407,
    -4417276706812531889,
)


def ngram_rows(tokens: Tensor, documents: Tensor, spec: NgramSpec) -> Tensor:
    """Rows of the table for the n-gram that ends at each position, for each order n: int64 (orders, batch, tokens).

    tokens, documents: (batch, tokens). An n-gram never reaches into another document: what lies before the
    document's first token counts as nothing, which has a code of its own.
    """
    codes = tokens * _MULTIPLIERS[0]
    rows = []
    for n in range(2, max(spec.orders) + 1):
        distance = n - 1
        previous = torch.zeros_like(tokens)
        if tokens.shape[1] > distance:
            inside = documents[:, distance:] == documents[:, :-distance]
            previous[:, distance:] = torch.where(inside, tokens[:, :-distance] + 1, 0)
        codes = codes + previous * _MULTIPLIERS[distance % len(_MULTIPLIERS)]
        codes = codes ^ (codes >> 29)
        if n in spec.orders:
            mixed = (codes * _MULTIPLIERS[1]) >> 20
            rows.append(mixed % spec.num_rows + len(rows) * spec.num_rows)
    return torch.stack(rows)
