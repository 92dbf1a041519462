"""Attention over a sequence that ranks share is attention over the sequence, with all its gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import flex_attention as flex
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from colossus.errors import ConfigError
from colossus.models.attend import attend, attention_bias
from colossus.models.attention import Portion
from colossus.models.blocks import attention_blocks
from colossus.parallel import context
from colossus.parallel.collectives import Team, total
from colossus.parallel.context import attend_over, attended_index
from colossus.parallel.recompute import prepare_layer
from colossus.spec.context import check_exchange
from colossus.spec.model import ModelSpec, NgramSpec, RecallSpec, WindowSpec
from colossus.spec.plan import Recompute
from tests.helpers import GQA, LATENT, VARIETIES, random_tokens, scrambled, tiny
from tests.parallel.ranks import run_ranks

EXCHANGES = ("ring", "all-gather", "all-to-all")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6}

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows": {"window": 5},
    "documents": {"documents": True},
    "soft_cap": {"soft_cap": 1.3},
    "temperatures": {"temperatures": True},
    "sinks": {"sinks": True},
    "grouped": {"kv_heads": 4},
    "one_key": {"kv_heads": 1},
    "narrow_values": {"value_dim": 3},
    "wide_values": {"value_dim": 11},
    "everything": {
        "window": 7, "documents": True, "soft_cap": 0.9, "temperatures": True, "sinks": True, "kv_heads": 2,
        "value_dim": 4,
    },
    "blocks": {"tokens": 96, "window": 30, "sinks": True, "block_queries": 5},
    "long": {"tokens": 576, "rows": 1},
    "long_everything": {
        "tokens": 576, "rows": 1, "window": 150, "documents": True, "soft_cap": 0.9, "temperatures": True,
        "sinks": True, "kv_heads": 4,
    },
}  # fmt: skip


class Given:
    """What attention is given, and a gradient whose elements stand in another order than the output's.

    Random numbers are `rounded`, and then computed with in `dtype`.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        rounded: torch.dtype,
        *,
        tokens: int = 48,
        rows: int = 2,
        kv_heads: int = 8,
        value_dim: int = 6,
        window: int | None = None,
        documents: bool = False,
        soft_cap: float | None = None,
        temperatures: bool = False,
        sinks: bool = False,
        block_queries: int = 512,
        blocks: bool = False,
    ) -> None:
        context._BLOCK_QUERIES = block_queries
        self.blocks = blocks
        flex._validate_device = lambda *_: (
            None
        )  # plain operations have the gradients that torch has no kernel for
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(rounded).to(dtype)

        self.tokens, self.window, self.soft_cap = tokens, window, soft_cap
        self.query, self.key = random(rows, 8, tokens, 6), random(rows, kv_heads, tokens, 6)
        self.value, self.towards = (
            random(rows, kv_heads, tokens, value_dim),
            random(rows, tokens, 8, value_dim),
        )
        self.sinks = random(8) if sinks else None
        self.temperatures = (random(rows, tokens).abs() + 0.5).to(rounded).to(dtype) if temperatures else None
        starts = torch.tensor([[0, tokens // 5, tokens // 2], [0, tokens // 3, tokens - 7]])[:rows, :, None]
        self.documents = (
            (torch.arange(tokens) >= starts).sum(1) if documents else torch.zeros(rows, tokens).long()
        )

    def made(self, index: Tensor, queries: Tensor, attention: Any) -> tuple[Tensor, ...]:
        """What attention makes of the tokens at `index`, and the gradients of query, key, value and sinks."""
        here = index[0]
        leaves = [x[:, :, here].clone().requires_grad_() for x in (self.query, self.key, self.value)]
        sinks = None if self.sinks is None else self.sinks.clone().requires_grad_()
        at = queries.expand(self.documents.shape[0], -1)
        documents = self.documents.gather(1, at), self.documents
        out = attention(
            *leaves,
            attention_blocks(*documents, queries, self.window)
            if self.blocks and attention is not attend
            else attention_bias(*documents, queries, self.query.dtype, self.window),
            scale=0.4,
            soft_cap=self.soft_cap,
            temperatures=None if self.temperatures is None else self.temperatures.gather(1, at),
            sinks=sinks,
        )
        leaves += [] if sinks is None else [sinks]
        gradients = torch.autograd.grad(out, leaves, self.towards[:, here].transpose(1, 2))
        return out.detach(), *gradients

    def expected(self) -> tuple[Tensor, ...]:
        index = torch.arange(self.tokens)[None]
        return self.made(index, index, attend)


def world() -> Team:
    size = dist.get_world_size()
    return Team("cp", dist.get_rank(), tuple(range(size)), dist.group.WORLD)


def queries_of(exchange: str, index: Tensor, num_tokens: int) -> Tensor:
    return torch.arange(num_tokens)[None] if exchange == "all-to-all" else index


def errors(dtypes: list[torch.dtype], exchange: str, case: dict[str, Any]) -> list[list[float]]:
    """Of this rank's part of output and gradients, computed in each of `dtypes` from what the last of them can hold:
    the largest difference from one process's float64, over the largest value there is."""
    team = world()
    expected, found = Given(torch.float64, dtypes[-1], **case).expected(), []
    for dtype in dtypes:
        given = Given(dtype, dtypes[-1], **case)
        index = attended_index(given.tokens, team.size, team.place)
        attention = attend_over(exchange, team, given.tokens)
        made = list(given.made(index, queries_of(exchange, index, given.tokens), attention))
        parts = [whole[:, :, index[0]] for whole in expected[:4]]
        if given.sinks is not None:
            made[4] = total(made[4], team)
            parts.append(expected[4])
        assert all(mine.dtype == dtype for mine in made)
        assert [mine.shape for mine in made] == [part.shape for part in parts]
        found.append(
            [
                ((mine - part).abs().max() / whole.abs().max()).item()
                for mine, part, whole in zip(made, parts, expected, strict=True)
            ]
        )
    return found


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_attention_of_many_ranks_is_that_of_one_with_its_gradients(
    exchange: str, case: str, num_ranks: int
) -> None:
    for of_rank in run_ranks(errors, num_ranks, list(TOLERANCE), exchange, CASES[case]):
        for found, tolerance in zip(of_rank, TOLERANCE.values(), strict=True):
            assert len(found) == (5 if CASES[case].get("sinks") else 4)
            assert max(found) < tolerance, found


@pytest.mark.parametrize("exchange", ["all-gather", "all-to-all"])
def test_ranks_that_see_by_blocks_as_a_gpu_does_have_the_same(exchange: str) -> None:
    for (found,) in run_ranks(errors, 2, [torch.float64], exchange, {**CASES["everything"], "blocks": True}):
        assert max(found) < TOLERANCE[torch.float64], found


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_bfloat16_loses_what_its_eight_bits_lose(exchange: str) -> None:
    """2⁻⁸ is one rounding. The ring adds up in float32 and rounds once; others round scores as one device does."""
    case = CASES["everything"]
    for (found,) in run_ranks(errors, 2, [torch.bfloat16], exchange, case):
        assert max(found) < (0.01 if exchange == "ring" else 0.03), found


# --- the whole decoder ---

MODELS = {
    "lookups": tiny(
        vocab_size=7,
        num_layers=3,
        attention=GQA.model_copy(
            update={"score_temperature_tokens": 3, "window": WindowSpec(tokens=5, full_every=2)}
        ),
        ngrams=NgramSpec(orders=(2, 3), num_rows=31),
        recall=RecallSpec(orders=(1, 2)),
    ),
    "gpt_oss": VARIETIES["gpt_oss"].model_copy(update={"mlp": tiny().mlp}),
    "learned_positions": VARIETIES["learned_positions"],
    "latent": tiny(attention=LATENT.model_copy(update={"num_heads": 4})),
}


def hidden_and_gradients(
    spec: ModelSpec, exchange: str | None, recompute: Recompute = "none"
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Which tokens, their last hidden states, and the gradient of the sum of their losses."""
    model = scrambled(spec).double()
    for layer in model.layers:
        prepare_layer(layer, recompute)
    tokens = random_tokens(spec, 2, 16)
    documents = (torch.arange(16) >= torch.tensor([[6], [11]])).long()
    index, portion = torch.arange(16)[None], None
    if exchange is not None:
        team = world()
        index = attended_index(16, team.size, team.place)
        portion = Portion(index, index, queries_of(exchange, index, 16), attend_over(exchange, team, 16))
    hidden = model(tokens, documents, dtype=torch.float64, portion=portion)
    targets = tokens.roll(-1, 1)[:, index[0]]
    losses = -model.logits(hidden).double().log_softmax(-1).gather(2, targets[..., None])
    losses.sum().backward()
    return (
        index,
        hidden.detach(),
        [p.grad.to_dense().double() for p in model.parameters() if p.grad is not None],
    )


def decoder_errors(spec: ModelSpec, exchange: str, recompute: Recompute) -> list[float]:
    team = world()
    index, hidden, gradients = hidden_and_gradients(spec, exchange, recompute)
    _, all_hidden, expected = hidden_and_gradients(spec, None)
    torch.testing.assert_close(hidden, all_hidden[:, index[0]], rtol=1e-9, atol=1e-9)
    assert len(gradients) == len(expected)
    return [
        ((total(mine, team) - one).abs().max() / one.abs().max()).item()
        for mine, one in zip(gradients, expected, strict=True)
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_gradients_of_a_decoder_sum_to_those_of_one_process(exchange: str, model: str) -> None:
    """Logits are float32, hence 1e-6."""
    for found in run_ranks(decoder_errors, 2, MODELS[model], exchange, "none"):
        assert max(found) < 1e-6, found


@pytest.mark.parametrize("recompute", ["selective", "alternate", "full"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_exchanges_are_made_again_with_what_is_recomputed(exchange: str, recompute: Recompute) -> None:
    for found in run_ranks(decoder_errors, 2, MODELS["lookups"], exchange, recompute):
        assert max(found) < 1e-6, found


# --- which tokens, and what is skipped ---


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_token_is_attended_from_once_and_all_ranks_see_as_much(size: int) -> None:
    held = [attended_index(96, size, place)[0] for place in range(size)]
    assert torch.cat(held).sort().values.tolist() == list(range(96))
    assert len({int((index + 1).sum()) for index in held}) == 1


def test_a_sequence_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"36 tokens .* cp 4.* no multiple of 8. 40 tokens would do, or 32"):
        attended_index(36, 4, 0)


def products(window: int | None, calls: list[str]) -> int:
    """Pairs of scores that this rank computes in a forward pass, and what it exchanges meanwhile."""

    class Watch(TorchDispatchMode):
        pairs = 0

        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = operator(*args, **(kwargs or {}))
            calls.extend([str(operator)] if operator.namespace == "c10d" else [])
            self.pairs += out.numel() if operator is torch.ops.aten.exp_.default else 0
            return out

    given, team = Given(torch.float32, torch.float32, tokens=256, rows=1, window=window), world()
    index = attended_index(256, team.size, team.place)
    attention = attend_over("ring", team, 256)
    with torch.no_grad(), Watch() as watch:
        bias = attention_bias(given.documents[:, index[0]], given.documents, index, torch.float32, window)
        here = (x[:, :, index[0]] for x in (given.query, given.key, given.value))
        attention(*here, bias, scale=1.0)
    return watch.pairs


def watched(window: int | None) -> tuple[int, list[str]]:
    calls: list[str] = []
    return products(window, calls), calls


def test_a_ring_computes_only_what_is_seen_and_still_passes_all_on() -> None:
    chunk, heads = 256 // 8, 8
    every = run_ranks(watched, 4, None)
    assert len({pairs for pairs, _ in every}) == 1  # balanced
    near = run_ranks(watched, 4, chunk)
    for place, (pairs, calls) in enumerate(near):
        # With a window of one chunk each chunk sees itself and the one before; the first has none before it.
        assert calls.count("c10d.send.default") == calls.count("c10d.recv_.default") == 3
        blocks = 3 if place == 0 else 4
        per_block = heads * chunk * chunk
        assert blocks * per_block <= pairs < (blocks + 1) * per_block < every[place][0]


def test_a_ring_runs_on_fake_tensors_and_its_exchanges_are_seen() -> None:
    """As dry runs do: rank 1 of 4, whose exchanges nobody answers."""
    calls: list[tuple[str, int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if operator.namespace == "c10d":
                calls.append((str(operator), args[0][0].numel() * args[0][0].element_size()))
            return operator(*args, **(kwargs or {}))

    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        team = replace(world(), process_group=dist.new_group(list(range(4))))
        attention = attend_over("ring", team, 64)
        with FakeTensorMode(), Watch():
            query, key, value = (torch.empty(2, heads, 16, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
            leaves = [x.requires_grad_() for x in (query, key, value)]
            bias = torch.empty(2, 1, 16, 64, dtype=torch.bfloat16)
            made = attention(*leaves, bias, scale=0.5, soft_cap=3.0)
            gradients = torch.autograd.grad(
                made, leaves, torch.empty(2, 16, 4, 8, dtype=torch.bfloat16).transpose(1, 2)
            )
        assert made.shape == query.shape
        assert [g.shape for g in gradients] == [x.shape for x in leaves]
    finally:
        dist.destroy_process_group()
    block = 2 * 2 * 2 * 16 * 8  # keys and values of 2 rows, 2 heads
    sent = [size for name, size in calls if name == "c10d.send.default"]
    # Forward 3 times in bfloat16; backward again, beside gradients in float32, which go all the way round.
    assert sorted(sent) == sorted(6 * [2 * block] + 4 * [4 * block])
    assert sent == [size for name, size in calls if name == "c10d.recv_.default"]


# --- which models ---


@pytest.mark.parametrize(
    ("heads", "cp", "tp", "message"),
    [
        (8, 4, 2, None),
        (8, 8, 2, "4 heads on each rank .tp 2., which cp 8 does not divide.* or cp 4"),
        (6, 4, 1, "cp 3"),
    ],
)
def test_all_to_all_wants_heads_for_every_rank(heads: int, cp: int, tp: int, message: str | None) -> None:
    model = tiny(attention=GQA.model_copy(update={"num_heads": heads, "num_kv_heads": 2}))
    for exchange in ("ring", "all-gather"):
        check_exchange(model, exchange, cp, tp)
    if message is None:
        check_exchange(model, "all-to-all", cp, tp)
    else:
        with pytest.raises(ConfigError, match=message):
            check_exchange(model, "all-to-all", cp, tp)


def test_one_rank_attends_as_ever() -> None:
    assert context.attend_over("ring", None, 16) is attend
