"""Embeddings of the last few tokens together, and of what came next the last time.

Which rows each position takes is a function of the tokens so far, nothing learned: of those of the same document, up to
the position itself. It is integer arithmetic, so every machine finds the same rows.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from colossus.models.parts import Embedding
from colossus.spec.model import NgramSpec, RecallSpec


class SparseEmbedding(Embedding):
    """A table of which a step looks up few rows: its gradient is sparse, and holds just those."""

    def forward(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.weight, sparse=self.weight.requires_grad)


class NgramEmbedding(SparseEmbedding):
    """Rows for the pair, the triple … of tokens that ends at each position, found by hash, summed.

    It costs no matmul: a lookup gives the first layer what it would otherwise spend attention on.
    """

    def __init__(self, spec: NgramSpec, hidden_size: int) -> None:
        super().__init__(len(spec.orders) * spec.num_rows, hidden_size)
        self.spec = spec

    def forward(self, tokens: Tensor, documents: Tensor, index: Tensor) -> Tensor:
        """tokens, documents: (rows, tokens). Returns (rows, indices, hidden_size) for the tokens at `index`, int64
        (rows or 1, indices)."""
        rows = ngram_rows(tokens, documents, self.spec)
        return super().forward(rows.gather(2, index.expand(*rows.shape[:2], -1))).sum(0)


class RecallEmbedding(SparseEmbedding):
    """A row for the token that came next the last time, if there was one."""

    def __init__(self, spec: RecallSpec, vocab_size: int, hidden_size: int) -> None:
        super().__init__(len(spec.orders) * vocab_size + 1, hidden_size)
        self.spec, self.vocab_size = spec, vocab_size

    def forward(self, tokens: Tensor, documents: Tensor, index: Tensor) -> Tensor:
        """tokens, documents: (rows, tokens). Returns (rows, indices, hidden_size) for the tokens at `index`, int64
        (rows or 1, indices)."""
        rows = recall_rows(tokens, documents, self.spec, self.vocab_size)
        return super().forward(rows.gather(1, index.expand(rows.shape[0], -1)))


# Odd 64-bit constants (as signed), one per distance into the past; any odd numbers that differ would do.
_MULTIPLIERS = (
    -7046029254386353131,
    2685821657736338717,
    6364136223846793005,
    1442695040888963407,
    -4417276706812531889,
)


def _codes(tokens: Tensor, documents: Tensor, longest: int) -> Iterator[tuple[int, Tensor]]:
    """For n = 1 … longest, a 64-bit hash of the n tokens that end at each position: (n, (batch, tokens)).

    What lies before the document's first token counts as nothing, which has a code of its own.
    """
    codes = (tokens + 1) * _MULTIPLIERS[0]
    yield 1, codes
    for n in range(2, longest + 1):
        distance = n - 1
        previous = torch.zeros_like(tokens)
        if tokens.shape[1] > distance:
            inside = documents[:, distance:] == documents[:, :-distance]
            previous[:, distance:] = torch.where(inside, tokens[:, :-distance] + 1, 0)
        codes = codes + previous * _MULTIPLIERS[distance]
        codes = codes ^ (codes >> 29)
        yield n, codes


def ngram_rows(tokens: Tensor, documents: Tensor, spec: NgramSpec) -> Tensor:
    """Rows for the n-gram that ends at each position, for each order n: int64 (orders, batch, tokens).

    tokens, documents: (batch, tokens).
    """
    rows = []
    for n, codes in _codes(tokens, documents, max(spec.orders)):
        if n in spec.orders:
            mixed = (codes * _MULTIPLIERS[1]) >> 20
            rows.append(mixed % spec.num_rows + len(rows) * spec.num_rows)
    return torch.stack(rows)


def recall_rows(tokens: Tensor, documents: Tensor, spec: RecallSpec, vocab_size: int) -> Tensor:
    """Rows of the table for what came next the last time: int64 (batch, tokens).

    For each position: the longest n of `spec.orders` whose n-gram, ending here, has occurred before in the
    document; the token that followed its last occurrence; and the row of that pair. Row 0 is for those that
    never occurred.
    """
    batch, length = tokens.shape
    following = tokens.flatten()
    # One number for each document of each row: documents of a row are numbered below its length.
    owner = (torch.arange(batch, device=tokens.device)[:, None] * length + documents) * _MULTIPLIERS[2]
    rows = torch.zeros_like(following)
    for n, codes in _codes(tokens, documents, max(spec.orders)):
        if n not in spec.orders:
            continue
        # Sorted, equal n-grams stand side by side, in the order in which they occur.
        ordered, position = (codes * _MULTIPLIERS[1] + owner).flatten().sort(stable=True)
        again, now, before = ordered[1:] == ordered[:-1], position[1:], position[:-1]
        # Where it is not found again the token after is not used: the clamp only keeps the index valid.
        next_after = following[(before + 1).clamp(max=len(following) - 1)]
        found = 1 + spec.orders.index(n) * vocab_size + next_after
        rows[now] = torch.where(again, found, rows[now])
    return rows.view(batch, length)
