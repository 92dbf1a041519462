"""The decoder against one written on paper, and against itself where two ways must lead to one end."""

from typing import Any

import pytest
import torch
from torch import Tensor

from colossus.models import Decoder, moe
from colossus.models import attend as attention_module
from colossus.models.lookups import ngram_rows, recall_rows
from colossus.spec.model import ModelSpec, MoeSpec, NgramSpec, RecallSpec
from tests.helpers import VARIETIES, random_tokens, scrambled, tiny
from tests.models import reference

LENGTHS = (5, 1, 7, 3)
DOCUMENTS = torch.tensor([number for number, length in enumerate(LENGTHS) for _ in range(length)])

every_variety = pytest.mark.parametrize("spec", VARIETIES.values(), ids=VARIETIES)


@pytest.fixture(params=[0, 512], ids=["fused", "explicit"])
def attention_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "EXPLICIT_ATTENTION_MAX_TOKENS", request.param)


def gradients(model: Decoder, hidden: Tensor) -> dict[str, Tensor]:
    """Of a fixed random projection of the hidden states, so that every channel counts differently."""
    model.zero_grad()
    direction = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(3))
    (hidden * direction.to(hidden.dtype)).square().sum().backward()
    return {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda m, n=name: n + m, **tolerance)


def record_choices(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The experts that routers choose from now on: (rows · tokens, top_k) of each pass through each mixture."""
    choices: list[Tensor] = []
    choose = moe.choose

    def recorded(*args: Any) -> tuple[Tensor, Tensor]:
        chosen, weights = choose(*args)
        choices.append(chosen)
        return chosen, weights

    monkeypatch.setattr(moe, "choose", recorded)
    return choices


@every_variety
@pytest.mark.usefixtures("attention_path")
def test_logits_of_packed_rows_are_those_on_paper(spec: ModelSpec) -> None:
    model = scrambled(spec)
    tokens = random_tokens(spec, 2, 16)
    documents = torch.stack([DOCUMENTS, torch.zeros(16, dtype=torch.long)])
    with torch.no_grad():
        logits = model.logits(model.double()(tokens, documents, dtype=torch.float64))
    for row in range(2):
        expected = reference.reference_logits(model, tokens[row].tolist(), documents[row].tolist())
        torch.testing.assert_close(logits[row].double(), expected, rtol=1e-5, atol=1e-5)


@every_variety
def test_float32_is_close_to_float64(spec: ModelSpec) -> None:
    model, tokens = scrambled(spec), random_tokens(spec, 2, 16)
    with torch.no_grad():
        single = model.logits(model(tokens))
        double = model.double().logits(model(tokens, dtype=torch.float64))
    torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-3 * double.abs().max().item())


@every_variety
def test_both_attention_paths_agree(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scrambled(spec).double()
    tokens = random_tokens(spec, 2, 16)
    documents = DOCUMENTS.expand(2, -1)
    results = []
    for longest in (0, 512):
        monkeypatch.setattr(attention_module, "EXPLICIT_ATTENTION_MAX_TOKENS", longest)
        hidden = model(tokens, documents, dtype=torch.float64)
        results.append((hidden.detach(), gradients(model, hidden)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-9)
    assert_all_close(results[0][1], results[1][1], rtol=1e-8, atol=1e-8)


@every_variety
@pytest.mark.usefixtures("attention_path")
def test_bfloat16_is_close_and_its_gradients_are_float32(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scrambled(spec)
    tokens = random_tokens(spec, 4, 16)
    choices = record_choices(monkeypatch)
    exact, exact_choices = model(tokens), list(choices)
    choices.clear()
    rounded = model(tokens, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert model.logits(rounded).dtype == torch.float32
    # A rounding may send a token to another expert, and then all is different, for the tokens that see it too:
    # those before the first such token of a row are compared.
    same = torch.ones(tokens.shape, dtype=torch.bool)
    for one, other in zip(exact_choices, choices, strict=True):
        same &= (one.sort().values == other.sort().values).all(-1).view(tokens.shape)
    same = same.cumprod(1).bool()
    assert same.float().mean() >= (0.3 if choices else 1)
    exact, rounded = exact[same], rounded[same]
    error = (rounded.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.05
    exact_gradients, rounded_gradients = gradients(model, exact), gradients(model, rounded)
    assert all(gradient.dtype == torch.float32 for gradient in rounded_gradients.values())
    one, other = (
        torch.cat([g.flatten() for g in each.values()]) for each in (exact_gradients, rounded_gradients)
    )
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


@every_variety
@pytest.mark.usefixtures("attention_path")
def test_a_packed_document_is_computed_as_if_alone(spec: ModelSpec) -> None:
    model = scrambled(spec).double()
    tokens = random_tokens(spec, 1, 16)
    packed = model(tokens, DOCUMENTS[None], dtype=torch.float64).split(LENGTHS, 1)
    # The rotation tables are float32, and a document stands elsewhere in them when it is alone.
    for piece, inside in zip(tokens.split(LENGTHS, 1), packed, strict=True):
        alone = model(piece, dtype=torch.float64)
        torch.testing.assert_close(inside, alone, rtol=1e-4, atol=1e-5)


@every_variety
def test_a_packed_document_has_the_gradient_that_it_has_alone(spec: ModelSpec) -> None:
    model = scrambled(spec).double()
    tokens = random_tokens(spec, 1, 16)
    start, end = LENGTHS[0] + LENGTHS[1], sum(LENGTHS[:3])
    inside = model(tokens, DOCUMENTS[None], dtype=torch.float64)[:, start:end]
    packed = gradients(model, inside)
    alone = gradients(model, model(tokens[:, start:end], dtype=torch.float64))
    assert_all_close(packed, alone, rtol=1e-4, atol=1e-4)


@every_variety
def test_later_tokens_change_nothing_before_them(spec: ModelSpec) -> None:
    model = scrambled(spec)
    tokens = random_tokens(spec, 1, 16)
    other = tokens.clone()
    other[:, 9:] = (other[:, 9:] + 1) % spec.vocab_size
    with torch.no_grad():
        one, changed = model(tokens)[:, :9], model(other)[:, :9]
    if any(isinstance(spec.mlp_of(layer), MoeSpec) for layer in range(spec.num_layers)):
        # Later tokens change how many rows an expert multiplies at once, and matmuls of other shapes round otherwise.
        torch.testing.assert_close(one, changed, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(one, changed)


# --- n-grams ---


def test_rows_of_ngrams_are_those_on_paper() -> None:
    spec = tiny(ngrams=NgramSpec(orders=(2, 3, 4), num_rows=1009), vocab_size=60_000)
    tokens = random_tokens(spec, 16)
    rows = ngram_rows(tokens[None], DOCUMENTS[None], spec.ngrams)[:, 0]
    for i in range(16):
        begin = DOCUMENTS.tolist().index(int(DOCUMENTS[i]))
        history = tokens[begin : i + 1].tolist()
        assert rows[:, i].tolist() == reference.ngram_rows(spec, history)


def test_each_order_has_rows_of_its_own() -> None:
    spec = NgramSpec(orders=(2, 3, 5), num_rows=50)
    tokens = torch.randint(100, (4, 64))
    rows = ngram_rows(tokens, torch.zeros_like(tokens), spec)
    for number in range(3):
        assert rows[number].min() >= 50 * number
        assert rows[number].max() < 50 * (number + 1)


def test_documents_shorter_than_an_ngram() -> None:
    spec = NgramSpec(orders=(2, 5), num_rows=50)
    one = ngram_rows(torch.tensor([[7]]), torch.tensor([[0]]), spec)
    packed = ngram_rows(torch.tensor([[3, 7, 7]]), torch.tensor([[0, 1, 2]]), spec)
    assert torch.equal(packed[:, :, 1], one[:, :, 0])
    assert torch.equal(packed[:, :, 2], one[:, :, 0])


def test_ngrams_spread_over_the_table_as_if_by_chance() -> None:
    spec = NgramSpec(orders=(2, 3), num_rows=2**14)
    pairs = torch.cartesian_prod(torch.arange(128), torch.arange(128))
    rows = ngram_rows(pairs, torch.zeros_like(pairs), spec)[0, :, 1]
    used = rows.unique().numel() / spec.num_rows
    # As many rows as pairs: a share of 1/e stays free.
    assert used == pytest.approx(1 - 1 / torch.e, abs=0.02)


def test_only_rows_that_occur_have_a_gradient() -> None:
    spec = tiny(ngrams=NgramSpec(orders=(2,), num_rows=1000))
    model = scrambled(spec)
    model(torch.tensor([[1, 2, 1, 2, 1]])).sum().backward()
    gradient = model.ngram_embedding.weight.grad
    assert gradient.is_sparse
    assert gradient.coalesce().indices().shape[1] == 3  # (·, 1), (1, 2), (2, 1)


# --- recall ---


@pytest.mark.parametrize("orders", [(1,), (2,), (1, 2, 4), (3, 5)])
def test_rows_of_recall_are_those_on_paper(orders: tuple[int, ...]) -> None:
    spec = tiny(recall=RecallSpec(orders=orders), vocab_size=3)
    tokens = random_tokens(spec, 5, 64)
    lengths = torch.tensor([1, 20, 2, 30, 11])
    documents = torch.arange(5).repeat_interleave(lengths).expand(5, -1)
    rows = recall_rows(tokens, documents, spec.recall, spec.vocab_size)
    for row in range(5):
        for i in range(64):
            begin = documents[row].tolist().index(int(documents[row, i]))
            assert rows[row, i] == reference.recall_row(spec, tokens[row, begin : i + 1].tolist())


def test_recall_prefers_the_longest_and_then_the_latest() -> None:
    tokens = torch.tensor([[1, 2, 3, 0, 2, 4, 1, 2]])
    nothing = torch.zeros_like(tokens)
    assert recall_rows(tokens, nothing, RecallSpec(orders=(1,)), 5)[0, -1] == 1 + 4
    assert recall_rows(tokens, nothing, RecallSpec(orders=(1, 2)), 5)[0, -1] == 1 + 5 + 3
