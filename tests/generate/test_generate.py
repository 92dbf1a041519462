"""Text from a model: with and without a cache, streamed, stopped."""

from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.data import Tokenizer
from colossus.generate import Sampling, generate, generate_tokens
from colossus.models import Decoder
from colossus.spec.model import ModelSpec
from tests.helpers import VARIETIES, random_tokens, scrambled, tiny

GREEDY, SEEDED = Sampling(temperature=0.0), Sampling(temperature=1.0, seed=3, top_k=20)


def ids(model: Decoder, prompt: Sequence[int], sampling: Sampling, count: int, *, cached: bool) -> list[int]:
    return list(islice(generate_tokens(model, prompt, sampling, cached=cached), count))


def whole(pieces: Any) -> tuple[str, int]:
    """The text, and the number of tokens that the generator returns."""
    parts: list[str] = []
    while True:
        try:
            parts.append(next(pieces))
        except StopIteration as end:
            return "".join(parts), end.value


# --- tokens ---


@pytest.mark.parametrize("prompt_tokens", [1, 7, 16, 17, 40])
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_cache_changes_no_token(sampling: Sampling, prompt_tokens: int) -> None:
    model = scrambled(VARIETIES["everything"])
    prompt = random_tokens(model.spec, prompt_tokens).tolist()
    # 40 tokens in a context of 16: the window is halved several times.
    assert ids(model, prompt, sampling, 40, cached=True) == ids(model, prompt, sampling, 40, cached=False)


@pytest.mark.parametrize("spec", VARIETIES.values(), ids=VARIETIES)
def test_a_cache_changes_no_token_of_any_model(spec: ModelSpec) -> None:
    model = scrambled(spec)
    assert ids(model, [1], SEEDED, 24, cached=True) == ids(model, [1], SEEDED, 24, cached=False)


@pytest.mark.parametrize("spec", VARIETIES.values(), ids=VARIETIES)
def test_a_cache_filled_in_pieces_gives_the_same_hidden_states(spec: ModelSpec) -> None:
    model, tokens = scrambled(spec).double(), random_tokens(spec, 3, 16)
    with torch.no_grad():
        expected = model(tokens, dtype=torch.float64)
        cache = model.new_cache(3)
        pieces = [model(part, dtype=torch.float64, cache=cache) for part in tokens.split([1, 6, 1, 8], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-9, atol=1e-9)
    assert cache.lengths == [16] * 3


def test_greedy_is_the_likeliest_token_each_time() -> None:
    model = scrambled(tiny())
    text = [4]
    with torch.no_grad():
        for _ in range(15):
            text.append(int(model.logits(model(torch.tensor([text])))[0, -1].argmax()))
    assert ids(model, [4], GREEDY, 15, cached=True) == text[1:]


def test_a_full_context_forgets_its_older_half() -> None:
    model = scrambled(tiny())
    text = [4, *ids(model, [4], GREEDY, 24, cached=True)]
    with torch.no_grad():
        for known in (16, 17, 18, 24):
            seen = text[:known] if known <= 16 else text[9:known]  # 17 do not fit 16; the last 8 stay
            assert int(model.logits(model(torch.tensor([seen])))[0, -1].argmax()) == text[known]


@pytest.mark.parametrize("context_tokens", [1, 2, 3])
def test_the_smallest_contexts(context_tokens: int) -> None:
    model = scrambled(tiny(context_tokens=context_tokens))
    assert len(ids(model, [1, 2, 3, 4], SEEDED, 10, cached=True)) == 10


def test_a_seed_writes_the_same_and_no_seed_does_not() -> None:
    model = scrambled(tiny())
    assert ids(model, [1], SEEDED, 30, cached=True) == ids(model, [1], SEEDED, 30, cached=True)
    unseeded = Sampling(temperature=1.0)
    assert ids(model, [1], unseeded, 30, cached=True) != ids(model, [1], unseeded, 30, cached=True)


def test_it_leaves_the_global_generator_and_gradients_alone() -> None:
    model = scrambled(tiny())
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    tokens = generate_tokens(model, [1], Sampling(temperature=1.0))
    next(tokens)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.rand(1), expected)


# --- text ---


@pytest.mark.parametrize("prompt", ["", "the cat", "naïve 🙂 " * 20], ids=["empty", "short", "too long"])
def test_pieces_add_up_to_the_text_of_the_tokens(model: Decoder, tokenizer: Tokenizer, prompt: str) -> None:
    for seed in range(5):
        sampling = Sampling(temperature=1.0, seed=seed, max_tokens=30)
        start = [tokenizer.end_of_document, *map(int, tokenizer.encode(prompt))]
        tokens = ids(model, start, sampling, 30, cached=True)
        closed = tokenizer.end_of_document in tokens
        if closed:
            tokens = tokens[: tokens.index(tokenizer.end_of_document)]
        text, num_tokens = whole(generate(model, tokenizer, prompt, sampling))
        assert text == tokenizer.decode(tokens)
        assert num_tokens == len(tokens) + closed


class Letters:
    """A tokenizer whose token i is the text i of a list."""

    end_of_document = 1_000_000

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.vocab_size = len(texts)

    def encode(self, text: str) -> list[int]:
        return []

    def stream(self) -> SimpleNamespace:
        return SimpleNamespace(push=lambda token: self.texts[token], finish=lambda: "")


def written(texts: Sequence[str], stop: Sequence[str], max_tokens: int = 100) -> tuple[list[str], int]:
    """The pieces that come out when the model's tokens are `texts`, and how many it was asked for."""
    asked = 0

    def tokens(*_: Any, **__: Any) -> Iterator[int]:
        nonlocal asked
        for token in range(len(texts)):
            asked += 1
            yield token
        yield Letters.end_of_document

    with pytest.MonkeyPatch.context() as patch:
        # The package's function hides the module of its name.
        patch.setattr(import_module("colossus.generate.generate"), "generate_tokens", tokens)
        sampling = Sampling(stop=tuple(stop), max_tokens=max_tokens)
        pieces = list(generate(None, Letters(texts), "", sampling))  # type: ignore[arg-type]
    return pieces, asked


def cut(text: str, stop: Sequence[str]) -> str:
    """Read letter by letter, up to where a stop text is whole; of several the longest goes."""
    for end in range(len(text) + 1):
        found = [mark for mark in stop if text[:end].endswith(mark)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(st.text("ab\n", max_size=4), max_size=8),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_texts_are_found_across_tokens(texts: list[str], stop: list[str]) -> None:
    pieces, _ = written(texts, stop)
    assert "".join(pieces) == cut("".join(texts), stop)


@pytest.mark.parametrize(
    ("texts", "stop", "expected"),
    [
        (["ab", "cd"], ["ab"], ""),  # the first text
        (["ab", "cd"], ["bc"], "a"),  # across tokens
        (["ab", "c"], ["cd"], "abc"),  # only begun
        (["x", "abc"], ["b", "abc"], "xa"),  # the one that is whole first, and not the one that begins first
        (["a", "", "b"], ["ab"], ""),  # a token without text between
    ],
)
def test_stops(texts: list[str], stop: list[str], expected: str) -> None:
    assert "".join(written(texts, stop)[0]) == expected


def test_nothing_is_computed_after_a_stop_or_the_last_token() -> None:
    texts = ["a", "b", "c", "d", "e"]
    assert written(texts, ["c"])[1] == 3
    assert written(texts, [], max_tokens=2) == (["a", "b"], 2)


def test_text_is_shown_as_soon_as_it_cannot_be_part_of_a_stop() -> None:
    assert written(["abc", "def"], ["xyz"])[0] == ["abc", "def"]
    assert written(["abx", "y", "yx", "yz"], ["xyz"])[0] == ["ab", "xyy"]
    assert written(["abc", "def"], [])[0][:2] == ["abc", "def"]
