"""Token after token for many sequences at once, each as if it were alone. They join and leave at any step.

engine = Engine(model)
row = engine.join([5, 17, 3], Sampling(temperature=0))
for written in engine.step():        # one more token of every row
    ...
engine.leave(row)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from colossus.errors import ConfigError
from colossus.generate.sampling import Sampling, next_tokens
from colossus.models import Cache, Decoder

_PREFILL_TOKENS = 1024
"""Of prompts, in one pass: bounds the memory of a long one, as who sees whom is a matrix."""


class Row:
    """A sequence that is being continued: what the model sees of it, and how its tokens are chosen."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling) -> None:
        self.window = list(prompt)
        self.sampling = sampling
        self.generator = torch.Generator("cpu")
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)


@dataclass(frozen=True, slots=True)
class Written:
    """A row's next token, and what it was chosen by: logits (vocab_size,)."""

    row: Row
    token: int
    logits: Tensor


class Engine:
    """Rows without end, until they leave.

    The model sees a row's last tokens as they fit its context: when it is full, the older half is forgotten, so the
    cost of a token stays bounded. Without `cached` all is computed anew each time: slower, and the same.
    """

    def __init__(self, model: Decoder, *, cached: bool = True) -> None:
        self._model, self._cached = model, cached
        self._context_tokens = model.spec.context_tokens
        self._rows: list[Row] = []
        """The first `self._cache.num_rows` are in the cache, in its order; those after have yet to be."""
        self._cache = model.new_cache(0)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def join(self, prompt: Sequence[int], sampling: Sampling) -> Row:
        """A new row, after a prompt of at least one id. Raises ConfigError for an empty one."""
        if not prompt:
            raise ConfigError("there is nothing to go on from; a prompt has at least one token")
        row = Row(prompt, sampling)
        self._rows.append(row)
        return row

    @torch.inference_mode()
    def leave(self, row: Row) -> None:
        """Forgets a row."""
        self._uncache(row)
        self._rows.remove(row)

    @torch.inference_mode()
    def step(self) -> list[Written]:
        """One more token of every row."""
        for row in list(self._rows):
            full = len(row.window) > self._context_tokens
            if full:
                row.window = row.window[-max(1, self._context_tokens // 2) :]
            if full or not self._cached:
                self._uncache(row)
        if not self._rows:
            return []
        num_cached = self._cache.num_rows
        hidden = []
        if num_cached:
            hidden.append(
                self._pass([row.window[-1:] for row in self._rows[:num_cached]], self._cache)[:, -1]
            )
        # Like lengths together, so that little of a pass is padding.
        self._rows[num_cached:] = sorted(self._rows[num_cached:], key=lambda row: len(row.window))
        for group in _groups(self._rows[num_cached:]):
            cache = self._model.new_cache(len(group))
            hidden.append(self._prefill(group, cache))
            self._cache.append_rows(cache)
        logits = self._model.logits(torch.cat(hidden)[:, None])[:, 0]
        tokens = next_tokens(
            logits, [row.sampling for row in self._rows], [row.generator for row in self._rows]
        )
        for row, token in zip(self._rows, tokens, strict=True):
            row.window.append(token)
        return [Written(*one) for one in zip(self._rows, tokens, logits, strict=True)]

    def _prefill(self, rows: Sequence[Row], cache: Cache) -> Tensor:
        """The last hidden state of each prompt, (rows, hidden_size), whose tokens go into an empty cache."""
        lengths = [len(row.window) for row in rows]
        longest = max(lengths)
        padded = [row.window + [0] * (longest - len(row.window)) for row in rows]
        last: list[Tensor] = [torch.empty(0)] * len(rows)
        step = max(1, _PREFILL_TOKENS // len(rows))
        for start in range(0, longest, step):
            hidden = self._pass([window[start : start + step] for window in padded], cache)
            for i, length in enumerate(lengths):
                if start < length <= start + step:
                    last[i] = hidden[i, length - 1 - start]
        cache.shorten(lengths)
        return torch.stack(last)

    def _pass(self, tokens: Sequence[Sequence[int]], cache: Cache) -> Tensor:
        device = self._model.embedding.weight.device
        hidden: Tensor = self._model(torch.tensor(tokens, device=device), cache=cache)
        return hidden

    def _uncache(self, row: Row) -> None:
        """The last row of the cache takes the place of this one, which comes after."""
        index, last = self._rows.index(row), self._cache.num_rows - 1
        if index <= last:
            self._cache.drop_row(index)
            self._rows[index], self._rows[last] = self._rows[last], self._rows[index]


def _groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Cuts rows, shortest first, into those that are prefilled together: at most half of a row is padding, and few
    tokens in all."""
    group: list[Row] = []
    for row in rows:
        length = len(row.window)
        if group and (length > 2 * len(group[0].window) or length * (len(group) + 1) > _PREFILL_TOKENS):
            yield group
            group = []
        group.append(row)
    if group:
        yield group
