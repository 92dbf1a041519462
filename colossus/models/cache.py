"""What generation remembers between tokens. Its rows are sequences, each as long as it is."""

from collections.abc import Sequence

import torch
from torch import Tensor

_FIRST_TOKENS = 64
"""Room for so many tokens at first; it doubles as a sequence grows."""


class Cache:
    """Tokens so far, and every layer's keys and values, for `num_rows` sequences of lengths of their own.

    `tokens`, `documents`: int64 (capacity, room), of which the first `num_rows` rows are in use. What stands in a row
    beyond its length is never looked at.
    """

    def __init__(self, num_layers: int, num_rows: int, device: torch.device) -> None:
        self.lengths = [0] * num_rows
        self.tokens = torch.zeros(num_rows, _FIRST_TOKENS, dtype=torch.long, device=device)
        self.documents = torch.zeros_like(self.tokens)
        self.has_documents = False
        """Whether tokens of more than one document may be in it."""
        self.layers = [LayerCache(self) for _ in range(num_layers)]
        self._place: Place | None = None

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def place(self) -> "Place":
        """Where the tokens of the pass at hand stand."""
        assert self._place is not None
        return self._place

    def extend(self, tokens: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Adds tokens, (num_rows, new), to all rows, and returns all so far, (num_rows, longest), up to which rows
        that are shorter hold anything, and the documents that they belong to; None: the first."""
        rows = self.num_rows
        self._place = Place(tuple(self.lengths), tokens.shape[1], tokens.device)
        self.lengths = [length + tokens.shape[1] for length in self.lengths]
        self._make_room(rows, self._place.end)
        self._place.put(tokens, self.tokens[:rows], 1)
        if documents is not None or self.has_documents:
            self.has_documents = True
            new = torch.zeros_like(tokens) if documents is None else documents
            self._place.put(new, self.documents[:rows], 1)
        return self.tokens[:rows, : self._place.end], self.documents[:rows, : self._place.end]

    def shorten(self, lengths: Sequence[int]) -> None:
        """Forgets what each row has beyond `lengths`: padding that stood after a prompt."""
        self.lengths = list(lengths)

    def append_rows(self, source: "Cache") -> None:
        """Adds all rows of another cache after this one's."""
        first, longest = self.num_rows, max(source.lengths)
        self.lengths += source.lengths
        if longest == 0:
            return  # nothing to take over; the next tokens make room for their rows
        rows = slice(first, self.num_rows)
        self._make_room(self.num_rows, longest)
        self.has_documents |= source.has_documents
        self.tokens[rows, :longest] = source.tokens[: source.num_rows, :longest]
        self.documents[rows, :longest] = source.documents[: source.num_rows, :longest]
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            mine.put_rows(theirs, rows, longest)

    def drop_row(self, row: int) -> None:
        """The last row takes the place of `row`."""
        last, length = self.num_rows - 1, self.lengths[-1]
        if row != last:
            self.lengths[row] = length
            for kept in (self.tokens, self.documents):
                kept[row, :length] = kept[last, :length]
            for layer in self.layers:
                for kept in layer.tensors:
                    kept[row, :, :length] = kept[last, :, :length]
        self.lengths.pop()

    def _make_room(self, num_rows: int, num_tokens: int) -> None:
        self.tokens = _with_room(self.tokens, num_rows, num_tokens, 1)
        self.documents = _with_room(self.documents, num_rows, num_tokens, 1)


class Place:
    """Where new tokens stand: row r's at `starts[r]`, …, `starts[r] + num_new - 1`."""

    def __init__(self, starts: tuple[int, ...], num_new: int, device: torch.device) -> None:
        self.end = max(starts) + num_new
        self._together = slice(starts[0], self.end) if len(set(starts)) == 1 else None
        first = torch.tensor(starts[:1] if self._together else starts, device=device)
        self.index = first[:, None] + torch.arange(num_new, device=device)
        """int64 (num_rows, new), or (1, new) where all rows are equally long."""
        self.is_next_of_all = self._together is not None and num_new == 1
        """Whether these are single tokens of equally long rows."""

    def put(self, new: Tensor, into: Tensor, dim: int) -> None:
        """new: (num_rows, …, new, …) into (num_rows, …, room, …), tokens in `dim`."""
        if self._together is not None:
            into.narrow(dim, self._together.start, new.shape[dim]).copy_(new)
        else:
            rows = torch.arange(into.shape[0], device=into.device)[:, None]
            into.transpose(1, dim)[rows, self.index] = new.transpose(1, dim)


class LayerCache:
    """What one layer keeps of each token: (num_rows, room, heads, channels) each, as many as it hands over."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.tensors: tuple[Tensor, ...] = ()

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Adds (num_rows, heads, new, channels) of the tokens at hand; returns those of all tokens so far."""
        place, rows = self._cache.place, self._cache.num_rows
        self._make_room(new, rows, place.end)
        seen = []
        for kept, tensor in zip(self.tensors, new, strict=True):
            used = kept if kept.shape[0] == rows else kept[:rows]
            place.put(tensor, used, 2)
            seen.append(used.narrow(2, 0, place.end))
        return tuple(seen)

    def put_rows(self, source: "LayerCache", rows: slice, num_tokens: int) -> None:
        """The rows of `source`, up to `num_tokens`, take the places `rows`."""
        self._make_room(source.tensors, rows.stop, num_tokens)
        for mine, theirs in zip(self.tensors, source.tensors, strict=True):
            mine[rows, :, :num_tokens] = theirs[: rows.stop - rows.start, :, :num_tokens]

    def _make_room(self, like: Sequence[Tensor], num_rows: int, num_tokens: int) -> None:
        if not self.tensors:
            self.tensors = tuple(
                tensor.new_zeros(num_rows, tensor.shape[1], _FIRST_TOKENS, tensor.shape[3]) for tensor in like
            )
        if num_rows > self.tensors[0].shape[0] or num_tokens > self.tensors[0].shape[2]:
            self.tensors = tuple(_with_room(kept, num_rows, num_tokens, 2) for kept in self.tensors)


def _with_room(kept: Tensor, num_rows: int, num_tokens: int, dim: int) -> Tensor:
    """`kept`, or a larger copy: at least `num_rows` in its first dim and `num_tokens` in `dim`, doubling."""
    if num_rows <= kept.shape[0] and num_tokens <= kept.shape[dim]:
        return kept
    shape = list(kept.shape)
    shape[0] = shape[0] if num_rows <= shape[0] else max(num_rows, 2 * shape[0])
    while shape[dim] < num_tokens:
        shape[dim] *= 2
    grown = kept.new_zeros(shape)
    grown[tuple(slice(size) for size in kept.shape)] = kept
    return grown
