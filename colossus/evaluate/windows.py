"""Documents of any length, end to end, in windows as long as a model's context."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from colossus.data import IGNORED
from colossus.errors import ConfigError

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One document: what the model reads, and what it has to predict at each place of that.

    A document t1 … tn is read as OPEN t1 … tn and predicted as t1 … tn END. Of one that was cut off no END is
    predicted; of more tokens that open it, none is.
    """

    inputs: Tokens
    targets: Tokens
    num_bytes: int
    """UTF-8 bytes of its text."""
    owner: int
    """Whose loss it counts in."""

    @classmethod
    def of(
        cls,
        tokens: Tokens,
        *,
        opening: Sequence[int],
        end: int,
        num_bytes: int,
        owner: int,
        whole: bool = True,
    ) -> "Piece":
        """From the tokens of its text, and at least one that opens it."""
        inputs = np.concatenate([np.array(opening, np.int64), tokens])
        targets = np.concatenate([np.full(len(opening) - 1, IGNORED, np.int64), tokens, [end]])
        num = len(inputs) if whole else len(inputs) - 1
        return cls(inputs[:num], targets[:num], num_bytes, owner)

    @property
    def num_tokens(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORED).sum())


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Some windows side by side, all [windows, context]."""

    tokens: Tokens
    targets: Tokens
    """IGNORED where another window counts the place, and after the last document."""
    documents: npt.NDArray[np.int32]
    owners: Tokens


def check_stride(context_tokens: int, stride_tokens: int) -> None:
    """Raises ConfigError for a stride that would leave tokens out."""
    if not 1 <= stride_tokens <= context_tokens:
        raise ConfigError(
            f"a stride of {stride_tokens:,} does not go with windows of {context_tokens:,} tokens: it is "
            f"from 1 to {context_tokens:,}, which is the whole window and the default"
        )


def windows(
    pieces: Iterable[Piece], *, context_tokens: int, stride_tokens: int, sequences: int, padding: int
) -> Iterator[Windows]:
    """The stream of all pieces in windows of `context_tokens`, each `stride_tokens` on from the one before.

    Every target counts in exactly one window: in the first that reaches it. So with a stride below the context
    each of them has at least context - stride tokens before it, or all of its document. At most `sequences`
    windows at a time. What is held is one batch and one piece.
    """
    check_stride(context_tokens, stride_tokens)
    stream = _Stream(padding)
    fresh = True  # nothing before the first window has counted its first targets
    wanted = context_tokens + (sequences - 1) * stride_tokens
    for piece in pieces:
        stream.add(piece)
        while len(stream) > wanted:  # more than these follow, so the last of these windows is not the last
            yield stream.cut(sequences, context_tokens, stride_tokens, fresh)
            stream.drop(sequences * stride_tokens)
            fresh = False
    while len(stream) > (0 if fresh else context_tokens - stride_tokens):
        left = max(0, len(stream) - context_tokens)
        num = min(sequences, 1 + -(-left // stride_tokens))
        yield stream.cut(num, context_tokens, stride_tokens, fresh)
        stream.drop(num * stride_tokens)
        fresh = False


class _Stream:
    """Pieces end to end, of which the front is dropped as it is used up."""

    def __init__(self, padding: int) -> None:
        self._parts: list[npt.NDArray[np.int64]] = []
        self._num = 0
        # What stands in for a place after the last: input, target, whether a document begins here, owner.
        self._padding = np.array([[padding], [IGNORED], [0], [0]])

    def __len__(self) -> int:
        return self._num

    def add(self, piece: Piece) -> None:
        num = len(piece.inputs)
        begins = np.zeros(num, np.int64)
        begins[:1] = 1
        self._parts.append(np.stack([piece.inputs, piece.targets, begins, np.full(num, piece.owner)]))
        self._num += num

    def drop(self, num: int) -> None:
        self._parts = [self._joined()[:, num:]]
        self._num = max(0, self._num - num)

    def cut(self, num: int, context: int, stride: int, fresh: bool) -> Windows:
        width = context + (num - 1) * stride
        flat = self._joined()[:, :width]
        flat = np.concatenate([flat, np.repeat(self._padding, width - flat.shape[1], 1)], 1)
        places = np.arange(num)[:, None] * stride + np.arange(context)
        tokens, targets, begins, owners = (flat[row][places] for row in range(4))
        targets[(1 if fresh else 0) :, : context - stride] = IGNORED
        begins[:, 0] = 0
        return Windows(tokens, targets, np.cumsum(begins, 1, dtype=np.int32), owners)

    def _joined(self) -> npt.NDArray[np.int64]:
        if len(self._parts) != 1:
            self._parts = [np.concatenate([np.empty((4, 0), np.int64), *self._parts], 1)]
        return self._parts[0]
