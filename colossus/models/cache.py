"""What generation remembers between tokens. Its rows are sequences, each as long as it is."""

from collections.abc import Sequence

import torch
from torch import Tensor

_FIRST_TOKENS = 64
"""Room for so many tokens at first; it doubles as a sequence grows."""


class Cache:
    """Tokens so far, and every layer's keys and values, for `num_rows` sequences of lengths of their own.

    `tokens`, `documents`: int64 (num_rows, room). What stands in a row beyond its length is never looked at.
    """

    def __init__(self, num_layers: int, num_rows: int, device: torch.device) -> None:
        self.lengths = [0] * num_rows
        self.tokens = torch.zeros(num_rows, _FIRST_TOKENS, dtype=torch.long, device=device)
        self.documents = torch.zeros_like(self.tokens)
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

    def extend(self, tokens: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Adds tokens, (num_rows, new), to all rows, and returns all so far, (num_rows, longest), up to which rows
        that are shorter hold anything."""
        self._place = Place(tuple(self.lengths), tokens.shape[1], tokens.device)
        self.lengths = [length + tokens.shape[1] for length in self.lengths]
        room = self.tokens.shape[1]
        if self._place.end > room:
            more = (0, max(room, self._place.end - room))
            self.tokens = torch.nn.functional.pad(self.tokens, more)
            self.documents = torch.nn.functional.pad(self.documents, more)
        self._place.put(tokens, self.tokens)
        self._place.put(documents, self.documents)
        return self.tokens[:, : self._place.end], self.documents[:, : self._place.end]

    def shorten(self, lengths: Sequence[int]) -> None:
        """Forgets what each row has beyond `lengths`: padding that stood after a prompt."""
        self.lengths = list(lengths)

    def copy_row(self, source: "Cache", source_row: int, row: int) -> None:
        """A row of another cache, or of this one, takes the place of this cache's `row`."""
        length = source.lengths[source_row]
        self.lengths[row] = length
        if length > self.tokens.shape[1]:
            more = (0, source.tokens.shape[1] - self.tokens.shape[1])
            self.tokens = torch.nn.functional.pad(self.tokens, more)
            self.documents = torch.nn.functional.pad(self.documents, more)
        self.tokens[row, :length] = source.tokens[source_row, :length]
        self.documents[row, :length] = source.documents[source_row, :length]
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            mine.copy_row(theirs, source_row, row, length)

    def keep_rows(self, num_rows: int) -> None:
        """Drops all rows but the first."""
        self.lengths = self.lengths[:num_rows]
        self.tokens, self.documents = self.tokens[:num_rows], self.documents[:num_rows]
        for layer in self.layers:
            layer.tensors = tuple(tensor[:num_rows] for tensor in layer.tensors)


class Place:
    """Where new tokens stand: row r's at `starts[r]`, …, `starts[r] + num_new - 1`."""

    def __init__(self, starts: tuple[int, ...], num_new: int, device: torch.device) -> None:
        self.end = max(starts) + num_new
        self._together = slice(starts[0], self.end) if len(set(starts)) == 1 else None
        first = torch.tensor(starts[:1] if self._together else starts, device=device)
        self.index = first[:, None] + torch.arange(num_new, device=device)
        """int64 (num_rows, new), or (1, new) where all rows are equally long."""

    def put(self, new: Tensor, into: Tensor) -> None:
        """new: (num_rows, new, …) into (num_rows, room, …)."""
        if self._together is not None:
            into[:, self._together] = new
        else:
            rows = torch.arange(into.shape[0], device=into.device)[:, None]
            into[rows, self.index] = new


class LayerCache:
    """What one layer keeps of each token: (num_rows, room, heads, channels) each, as many as it hands over."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.tensors: tuple[Tensor, ...] = ()

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Adds (num_rows, heads, new, channels) of the tokens at hand; returns those of all tokens so far."""
        place = self._cache.place
        if not self.tensors or place.end > self.tensors[0].shape[2]:
            self._grow(new, place.end)
        for kept, tensor in zip(self.tensors, new, strict=True):
            place.put(tensor.transpose(1, 2), kept.transpose(1, 2))
        return tuple(kept[:, :, : place.end] for kept in self.tensors)

    def _grow(self, like: Sequence[Tensor], num_tokens: int) -> None:
        room = self.tensors[0].shape[2] if self.tensors else _FIRST_TOKENS
        while room < num_tokens:
            room *= 2
        grown = tuple(
            tensor.new_zeros(self._cache.num_rows, tensor.shape[1], room, tensor.shape[3]) for tensor in like
        )
        for old, new in zip(self.tensors, grown, strict=False):
            new[:, :, : old.shape[2]] = old
        self.tensors = grown

    def copy_row(self, source: "LayerCache", source_row: int, row: int, length: int) -> None:
        if not self.tensors or length > self.tensors[0].shape[2]:
            self._grow(source.tensors, length)
        for mine, theirs in zip(self.tensors, source.tensors, strict=True):
            mine[row, :, :length] = theirs[source_row, :, :length]
