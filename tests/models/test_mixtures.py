"""Mixtures of experts: the experts' matmuls, their load, and who is chosen."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colossus.models import moe
from colossus.models.grouped import multiply_groups
from colossus.models.moe import choose
from colossus.models.parts import GATED, PLAIN
from colossus.spec.model import ModelSpec, MoeSpec, RouterGroups, RouterSpec
from tests.helpers import VARIETIES, random_tokens, scrambled
from tests.models.reference import reference_logits

MIXTURES = {name: spec for name, spec in VARIETIES.items() if isinstance(spec.mlp, MoeSpec)}
every_mixture = pytest.mark.parametrize("spec", MIXTURES.values(), ids=MIXTURES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "num_rows", [(3, 0, 5, 0, 2), (0, 0, 7, 1, 0), (0, 0, 0, 0, 9), (9, 0, 0, 0, 0), (2, 2, 2, 2, 2)]
)
def test_groups_are_multiplied_as_rows_are_and_as_torch_does(
    num_rows: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Also where experts have no rows at all, whose weights then have a gradient of zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(num_rows), 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(5, 24, 16, generator=generator).to(dtype).requires_grad_()
    ends = torch.tensor(num_rows).cumsum(0).int()
    experts = torch.arange(5).repeat_interleave(torch.tensor(num_rows))
    towards = torch.randn(sum(num_rows), 24, generator=generator).to(dtype)
    expected = torch.stack(
        [weight[expert].double() @ row.double() for row, expert in zip(x, experts, strict=True)]
    )
    expected_gradients = torch.autograd.grad(expected, (x, weight), towards.double())
    # A CPU's kernels may add up in bfloat16: of sums whose terms are about 1, up to nine or sixteen of them.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 6e-2}
    for made in (multiply_groups(x, weight, ends), F.grouped_mm(x, weight.transpose(1, 2), offs=ends)):
        torch.testing.assert_close(made, expected.to(dtype), **tolerance)
        for ours, theirs in zip(
            torch.autograd.grad(made, (x, weight), towards), expected_gradients, strict=True
        ):
            torch.testing.assert_close(ours, theirs.to(dtype), **tolerance)


def test_multiplying_groups_is_a_proper_operator() -> None:
    """Gradients by finite differences; and what compiling and meta tensors ask of it, by torch's own checks."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda a, b: multiply_groups(a, b, ends), (x, weight))
    torch.library.opcheck(torch.ops.colossus.multiply_groups.default, (x, weight, ends))
    torch.library.opcheck(torch.ops.colossus.sum_groups.default, (torch.randn(7, 5), torch.randn(7, 4), ends))


@every_mixture
def test_load_counts_the_tokens_of_each_expert(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = scrambled(spec), []

    def recorded(*args: object) -> tuple[Tensor, Tensor]:
        chosen, weights = choose(*args)
        seen.append(chosen)
        return chosen, weights

    monkeypatch.setattr(moe, "choose", recorded)
    mixtures = [layer.mlp for layer in model.layers if layer.is_mixture]
    with torch.no_grad():
        model(random_tokens(spec, 2, 9))
    assert all(torch.all(mixture.load == 0) for mixture in mixtures)  # no training pass: nothing counts
    seen.clear()
    for seed in (1, 2):  # two micro-batches of one step
        model(random_tokens(spec, 2, 9, seed=seed)).sum().backward()
    for number, mixture in enumerate(mixtures):
        given = torch.cat(seen[number :: len(mixtures)]).flatten().tolist()
        assert len(given) == 2 * 2 * 9 * spec.mlp.top_k
        assert mixture.load.tolist() == [given.count(expert) for expert in range(spec.mlp.num_experts)]
        mixture.reset_buffers()
        assert torch.all(mixture.load == 0)
    model.double()  # the load is another tensor then
    model(random_tokens(spec, 2, 9), dtype=torch.float64).sum().backward()
    assert all(mixture.load.sum() == 2 * 9 * spec.mlp.top_k for mixture in mixtures)


def test_the_sum_with_the_shared_mlp_is_multiplied() -> None:
    """Grok-2 normalises that sum, which hides its size; here nothing does."""
    spec = VARIETIES["expert_biases"]
    shared = spec.mlp.shared.model_copy(update={"sum_multiplier": 0.3})
    spec = spec.model_copy(update={"mlp": spec.mlp.model_copy(update={"shared": shared})})
    assert spec.norm_placement == "pre"
    model, tokens = scrambled(spec).double(), random_tokens(spec, 9)
    with torch.no_grad():
        logits = model.logits(model(tokens[None], dtype=torch.float64))[0]
    expected = reference_logits(model, tokens.tolist(), [0] * 9)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def spec_of(num_experts: int, top_k: int, **router: object) -> MoeSpec:
    return MoeSpec(num_experts=num_experts, top_k=top_k, intermediate_size=8, router=RouterSpec(**router))


def test_a_balancing_bias_moves_the_choice_and_not_the_weights() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.2]])
    balance = torch.tensor([0.0, -1.0, 1.0, 0.0])
    spec = spec_of(4, 2, scoring="sigmoid", balancing_bias=True, weight_multiplier=2.5)
    chosen, weights = choose(scores, balance, spec)
    assert chosen.tolist() == [[2, 0]]
    torch.testing.assert_close(weights, torch.tensor([[0.1, 0.9]]) * 2.5)


def test_groups_with_a_balancing_bias_are_as_good_as_their_two_best() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.7, 0.2, 0.3]])  # the best alone; the best two; none
    groups = RouterGroups(num_groups=3, top_groups=1)
    without, _ = choose(scores, None, spec_of(6, 2, groups=groups))
    balanced, _ = choose(scores, torch.zeros(6), spec_of(6, 2, groups=groups, balancing_bias=True))
    assert without.tolist() == [[0, 1]]
    assert balanced.tolist() == [[3, 2]]


def test_no_expert_outside_of_the_best_groups_is_chosen_however_low_the_rest() -> None:
    scores, balance = torch.full((1, 4), 0.5), torch.tensor([-3.0, -2.0, -5.0, -4.0])
    spec = spec_of(4, 2, balancing_bias=True, groups=RouterGroups(num_groups=2, top_groups=1))
    assert choose(scores, balance, spec)[0].tolist() == [[1, 0]]


SIZES = torch.linspace(-12, 12, 97, dtype=torch.float64)


def on_paper(name: str, gate: float, up: float) -> float:
    def gelu(x: float) -> float:
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    match name:
        case "gelu":
            return gelu(up)
        case "squared_relu":
            return max(up, 0.0) ** 2
        case "geglu":
            return gelu(gate) * up
        case "swiglu":
            return gate / (1 + math.exp(-gate)) * up
    gate, up = min(gate, 7.0), min(max(up, -7.0), 7.0)
    return gate / (1 + math.exp(-1.702 * gate)) * (up + 1)


@pytest.mark.parametrize("name", [*GATED, *PLAIN])
def test_activations_and_their_slopes_are_those_on_paper(name: str) -> None:
    """Far out too, where clamped_swiglu is cut off. Slopes against differences."""
    gate, up = (x.flatten().clone().requires_grad_() for x in torch.meshgrid(SIZES, SIZES, indexing="ij"))
    made = GATED[name](gate, up) if name in GATED else PLAIN[name](up)
    pairs = list(zip(gate.tolist(), up.tolist(), strict=True))
    expected = torch.tensor([on_paper(name, g, u) for g, u in pairs], dtype=torch.float64)
    torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-12)
    leaves = (gate, up) if name in GATED else (up,)
    step = 1e-6
    for leaf, slopes in zip(leaves, torch.autograd.grad(made.sum(), leaves), strict=True):
        ahead, behind = (
            torch.tensor(
                [
                    on_paper(name, g + (move if leaf is gate else 0), u + (move if leaf is up else 0))
                    for g, u in pairs
                ],
                dtype=torch.float64,
            )
            for move in (step, -step)
        )
        at_a_corner = (
            (leaf.detach().abs() == 7) if name == "clamped_swiglu" else torch.zeros(len(pairs)).bool()
        )
        smooth = ~at_a_corner
        difference = (ahead - behind) / (2 * step)
        torch.testing.assert_close(slopes[smooth], difference[smooth], rtol=1e-6, atol=1e-6)
