"""Every target counts once, and sees as much as was promised."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.data import IGNORED
from colossus.errors import ConfigError
from colossus.evaluate import Piece, windows

END = 99


def pieces(lengths: list[int]) -> list[Piece]:
    """Documents whose tokens are all different, so that a place can be told from its target."""
    first = 1000
    made = []
    for owner, length in enumerate(lengths):
        tokens = np.arange(first, first + length)
        made.append(Piece.of(tokens, opening=[END], end=END, num_bytes=length, owner=owner))
        first += length
    return made


@given(
    lengths=st.lists(st.integers(0, 23), min_size=0, max_size=7),
    context=st.integers(1, 9),
    stride=st.integers(1, 9),
    sequences=st.integers(1, 4),
)
@settings(max_examples=300, deadline=None)
def test_each_target_once_with_all_the_context_promised(
    lengths: list[int], context: int, stride: int, sequences: int
) -> None:
    stride = min(stride, context)
    documents = pieces(lengths)
    inputs = np.concatenate([np.empty(0, np.int64), *(piece.inputs for piece in documents)])
    expected = [
        (int(target), piece.owner, place) for piece in documents for place, target in enumerate(piece.targets)
    ]
    found = []
    for batch in windows(
        documents, context_tokens=context, stride_tokens=stride, sequences=sequences, padding=END
    ):
        assert batch.tokens.shape[0] <= sequences
        for row, column in zip(*np.nonzero(batch.targets != IGNORED), strict=True):
            target, owner, place = expected[len(found)]
            found.append((int(batch.targets[row, column]), int(batch.owners[row, column])))
            assert found[-1] == (target, owner)
            # What it sees: the tokens of its own document in this window, up to its own place.
            same = batch.documents[row, : column + 1] == batch.documents[row, column]
            seen = batch.tokens[row, : column + 1][same]
            assert len(seen) >= min(place + 1, context - stride + 1)
            end = len(found)
            np.testing.assert_array_equal(seen, inputs[end - len(seen) : end])
    assert len(found) == len(expected)


def test_a_stride_beyond_the_window_would_leave_tokens_out() -> None:
    for stride in (0, 9):
        with pytest.raises(ConfigError, match=f"a stride of {stride} does not go with windows of 8"):
            list(windows(pieces([3]), context_tokens=8, stride_tokens=stride, sequences=1, padding=END))


def test_what_opens_a_document_is_not_predicted_and_a_cut_one_does_not_end() -> None:
    piece = Piece.of(np.array([5, 6]), opening=[1, 2], end=END, num_bytes=2, owner=0)
    assert piece.inputs.tolist() == [1, 2, 5, 6]
    assert piece.targets.tolist() == [IGNORED, 5, 6, END]
    assert piece.num_tokens == 3
    cut = Piece.of(np.array([5, 6]), opening=[1], end=END, num_bytes=2, owner=0, whole=False)
    assert (cut.inputs.tolist(), cut.targets.tolist()) == ([1, 5], [5, 6])
