"""Generation's memory: whatever shares it with a row, the row is computed as if it were alone."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from colossus.models import Cache, Decoder
from colossus.models import attend as attention_module
from colossus.spec.model import ModelSpec
from tests.helpers import VARIETIES, random_tokens, scrambled

every_variety = pytest.mark.parametrize("spec", VARIETIES.values(), ids=VARIETIES)


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


@pytest.fixture(params=[512, 4], ids=["short", "long"])
def attention_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that count as long are attended to by the fused kernel, or block by block."""
    monkeypatch.setattr(attention_module, "EXPLICIT_ATTENTION_MAX_TOKENS", request.param)
    monkeypatch.setattr(attention_module, "_BLOCK_QUERIES", 8)


def longer(spec: ModelSpec) -> ModelSpec:
    """With room for positions beyond the cache's first room."""
    return spec.model_copy(update={"context_tokens": 200})


class Rows:
    """Sequences that grow together through one cache, and the model that continues them."""

    def __init__(self, model: Decoder, num_rows: int) -> None:
        self.model, self.cache = model, model.new_cache(num_rows)
        self.texts: list[list[int]] = [[] for _ in range(num_rows)]

    def add(self, texts: Sequence[list[int]]) -> None:
        """Texts of any lengths, padded at the right; then looks at each row, alone."""
        longest = max(map(len, texts))
        padded = torch.tensor([text + [1] * (longest - len(text)) for text in texts])
        hidden = self.model(padded, dtype=torch.float64, cache=self.cache)
        self.texts = [before + text for before, text in zip(self.texts, texts, strict=True)]
        self.cache.shorten([len(text) for text in self.texts])
        for row, text in enumerate(texts):
            assert_same(hidden[row, : len(text)], self.alone(row)[-len(text) :])

    def alone(self, row: int) -> Tensor:
        return self.model(torch.tensor([self.texts[row]]), dtype=torch.float64)[0]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def texts(spec: ModelSpec, lengths: Sequence[int], seed: int) -> list[list[int]]:
    return [random_tokens(spec, size, seed=seed + i).tolist() for i, size in enumerate(lengths)]


@every_variety
@pytest.mark.usefixtures("attention_path")
def test_rows_of_other_lengths_are_as_if_alone(spec: ModelSpec) -> None:
    rows = Rows(scrambled(longer(spec)).double(), 4)
    rows.add(texts(spec, (5, 9, 1, 12), 0))
    for seed in (10, 20, 30):
        rows.add(texts(spec, (1, 1, 1, 1), seed))
    rows.add(texts(spec, (3, 1, 6, 2), 40))  # as in a chat: each goes on by as much as it does
    rows.add(texts(spec, (1, 70, 2, 1), 50))  # beyond the first room
    rows.add(texts(spec, (1, 1, 1, 1), 60))


@every_variety
@pytest.mark.usefixtures("attention_path")
def test_rows_that_are_equally_long(spec: ModelSpec) -> None:
    """They take ways of their own: one slice for all rows, and no bias for one more token."""
    rows = Rows(scrambled(longer(spec)).double(), 3)
    rows.add(texts(spec, (2, 2, 2), 0))
    for seed in (10, 20, 30, 40):
        rows.add(texts(spec, (1, 1, 1), seed))
    rows.add(texts(spec, (2, 2, 2), 50))


@every_variety
def test_rows_come_and_go(spec: ModelSpec) -> None:
    """As in a server: prompts of their own cache join, and finished rows leave."""
    model = scrambled(longer(spec)).double()
    rows = Rows(model, 2)
    rows.add(texts(spec, (4, 7), 0))
    joining = Rows(model, 3)
    joining.add(texts(spec, (66, 2, 5), 10))  # a longer one than the cache has room for
    rows.cache.append_rows(joining.cache)
    rows.texts += joining.texts
    rows.add(texts(spec, (1, 1, 1, 1, 1), 20))
    for row in (2, 0, 2):  # from the middle, the first, and the last one
        rows.cache.drop_row(row)
        last = rows.texts.pop()
        if row < len(rows.texts):
            rows.texts[row] = last
        assert rows.cache.lengths == [len(text) for text in rows.texts]
        rows.add(texts(spec, (1,) * len(rows.texts), 30 + row))
    while rows.texts:  # until it stands empty
        rows.cache.drop_row(0)
        rows.texts.pop()
    again = Rows(model, 2)
    again.add(texts(spec, (3, 1), 50))
    rows.cache.append_rows(again.cache)
    rows.texts += again.texts
    rows.add(texts(spec, (2, 1), 60))


@every_variety
def test_packed_documents_through_a_cache(spec: ModelSpec) -> None:
    model = scrambled(spec).double()
    tokens = random_tokens(spec, 2, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] * 2 + [2]])
    expected = model(tokens, documents, dtype=torch.float64)
    cache = model.new_cache(2)
    for start, end in ((0, 4), (4, 8), (8, 9), (9, 10), (10, 12)):
        here = slice(start, end)
        made = model(tokens[:, here], documents[:, here], dtype=torch.float64, cache=cache)
        assert_same(made, expected[:, here])


def test_a_cache_without_tokens_joins_and_is_joined() -> None:
    model = scrambled(VARIETIES["plain"]).double()
    rows = Rows(model, 1)
    rows.cache.append_rows(model.new_cache(1))
    rows.texts.append([])
    assert isinstance(rows.cache, Cache)
    rows.add([[1, 2, 3], [4]])
