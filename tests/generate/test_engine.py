"""Many sequences at once: each as if it were alone."""

from itertools import islice
from typing import Any

import pytest
import torch

from colossus.data import Tokenizer
from colossus.errors import ConfigError
from colossus.generate import Engine, Sampling, generate, generate_batch, generate_tokens
from colossus.models import Decoder
from colossus.spec.model import ModelSpec
from tests.helpers import VARIETIES, random_tokens, scrambled, tiny

GREEDY = Sampling(temperature=0.0)
COUNT = 14


def alone(model: Decoder, prompt: list[int], sampling: Sampling, count: int = COUNT) -> list[int]:
    return list(islice(generate_tokens(model, prompt, sampling), count))


def prompts_of(spec: ModelSpec, lengths: list[int]) -> list[list[int]]:
    text = random_tokens(spec, sum(lengths)).tolist()
    return [text[sum(lengths[:i]) : sum(lengths[: i + 1])] for i in range(len(lengths))]


@pytest.mark.parametrize("spec", VARIETIES.values(), ids=VARIETIES)
def test_rows_join_and_leave_at_any_step_and_are_as_if_alone(spec: ModelSpec) -> None:
    # In a context of 16, some prompts are too long, and most rows forget their older half on the way.
    model = scrambled(spec).double()
    prompts = prompts_of(spec, [1, 9, 3, 16, 20, 5])
    samplings = [
        GREEDY,
        Sampling(temperature=1.0, seed=1),
        *[GREEDY] * 2,
        Sampling(temperature=0.7, seed=2, top_k=5),
    ]
    samplings.append(GREEDY)
    joins = {0: [0, 1, 2], 2: [3], 3: [4], 9: [5]}
    engine = Engine(model)
    rows: dict[Any, int] = {}
    texts: list[list[int]] = [[] for _ in prompts]
    for step in range(9 + COUNT):
        for i in joins.get(step, ()):
            rows[engine.join(prompts[i], samplings[i])] = i
        written = engine.step()
        assert {rows[one.row] for one in written} == {i for i, text in enumerate(texts) if i in rows.values()}
        for one in written:
            i = rows[one.row]
            texts[i].append(one.token)
            if len(texts[i]) == COUNT:
                engine.leave(one.row)
                del rows[one.row]
    assert engine.num_rows == 0
    for prompt, sampling, text in zip(prompts, samplings, texts, strict=True):
        assert text == alone(model, prompt, sampling)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_texts_is_the_texts_alone(
    temperature: float, model: Decoder, tokenizer: Tokenizer
) -> None:
    prompts = ["", "the cat", "naïve 🙂", "the mat " * 20, "sat", "a", "on the", "b"]
    sampling = Sampling(temperature=temperature, seed=5, max_tokens=11, stop=("xq",))
    batch = generate_batch(model, tokenizer, prompts, sampling, max_rows=3)
    for prompt, completion in zip(prompts, batch, strict=True):
        assert completion.text == "".join(generate(model, tokenizer, prompt, sampling))
        assert completion.num_tokens <= 11
        assert completion.finish_reason == "length" or completion.num_tokens < 11 or temperature
    assert generate_batch(model, tokenizer, [], sampling) == []


def test_a_long_prompt_goes_in_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    spec = tiny(context_tokens=64)
    model, prompts = scrambled(spec).double(), prompts_of(spec, [61, 50, 33])
    expected = [alone(model, prompt, GREEDY) for prompt in prompts]
    monkeypatch.setattr(import_module("colossus.generate.engine"), "_PREFILL_TOKENS", 7)
    assert [alone(model, prompt, GREEDY) for prompt in prompts] == expected


def test_logits_are_those_that_a_token_was_chosen_by() -> None:
    model = scrambled(tiny())
    engine = Engine(model)
    engine.join([3, 1, 4], GREEDY)
    (written,) = engine.step()
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([[3, 1, 4]])))[0, -1]
    torch.testing.assert_close(written.logits, expected)
    assert written.token == int(expected.argmax())


def test_nothing_to_go_on_from() -> None:
    engine = Engine(scrambled(tiny()))
    assert engine.step() == []
    with pytest.raises(ConfigError, match="at least one token"):
        engine.join([], GREEDY)
