"""Gradients of the decoder against those of the one written on paper, in float64."""

import pytest
import torch
from torch import Tensor

from colossus.models import Decoder, RouterLosses
from colossus.models.moe import balance_loss
from colossus.spec.model import ModelSpec, MoeSpec
from tests.helpers import VARIETIES, random_tokens, scrambled
from tests.models import reference
from tests.models.reference_mlp import Routed

DOCUMENTS = [0] * 7 + [1] * 5
MIXTURES = {name: spec for name, spec in VARIETIES.items() if isinstance(spec.mlp, MoeSpec)}

# Rotations and temperatures go by way of float32, at 6e-8 each; the sums over them are larger than most of a gradient.
RTOL, SHARE_OF_LARGEST = 1e-5, 2e-6


def direction(size: int) -> Tensor:
    """So that every channel counts differently."""
    return torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def objective_of(hidden: Tensor) -> Tensor:
    return (hidden * direction(hidden.shape[-1])).square().sum()


def gradients_on_paper(objective: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    made = torch.autograd.grad(objective, list(weights.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for (name, weight), gradient in zip(weights.items(), made, strict=True)
    }


def assert_gradients(model: Decoder, expected: dict[str, Tensor]) -> None:
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, parameter in model.named_parameters():
        actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
        if name.endswith(".balance"):
            assert parameter.grad is None  # moved by load, not by a gradient
        torch.testing.assert_close(
            actual,
            expected[name],
            rtol=RTOL,
            atol=SHARE_OF_LARGEST * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("spec", VARIETIES.values(), ids=VARIETIES)
def test_gradients_of_all_parameters_are_those_on_paper(spec: ModelSpec) -> None:
    model = scrambled(spec).double()
    tokens = random_tokens(spec, 1, len(DOCUMENTS), seed=5)
    objective_of(model(tokens, torch.tensor([DOCUMENTS]), dtype=torch.float64)).backward()
    weights = reference.weights_of(model)
    on_paper = reference.hidden_states(spec, weights, tokens[0].tolist(), DOCUMENTS)
    assert_gradients(model, gradients_on_paper(objective_of(on_paper), weights))


def router_losses(spec: MoeSpec, routed: list[Routed]) -> tuple[Tensor, Tensor]:
    """Of one sequence in one layer: the load-balance loss of arXiv:2101.03961 times its tokens, with each of `top_k`
    choices a part of a token, and the z-loss of arXiv:2202.08906 as a sum."""
    balance = torch.zeros((), dtype=torch.float64)
    for expert in range(spec.num_experts):
        share = sum(expert in one.chosen for one in routed) / (len(routed) * spec.top_k)
        # A sigmoid router's scores are made a distribution for it (arXiv:2412.19437, equation 19).
        mean = sum(one.scores[expert] / one.scores.sum() for one in routed) / len(routed)
        balance = balance + spec.num_experts * share * mean * len(routed)
    return balance, sum(one.logits.exp().sum().log() ** 2 for one in routed)


@pytest.mark.parametrize("spec", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_gradients_with_the_routers_losses(spec: ModelSpec, scale: float) -> None:
    """The losses' gradients join those of the objective with weight 1, whatever multiplies the objective."""
    model = scrambled(spec).double()
    tokens = random_tokens(spec, 2, 10, seed=5)
    weights_of_losses = {"balance": 0.7, "z": 0.05}
    losses = RouterLosses(**{key: torch.tensor(value) for key, value in weights_of_losses.items()})
    hidden = model(tokens, dtype=torch.float64, router_losses=losses)
    (scale * objective_of(hidden)).backward()

    weights = reference.weights_of(model)
    objective = torch.zeros((), dtype=torch.float64)
    for row in tokens.tolist():
        routed: list[list[Routed]] = []
        on_paper = reference.hidden_states(spec, weights, row, [0] * len(row), routed)
        objective = objective + scale * objective_of(on_paper)
        first = 0 if spec.first_layers is None else spec.first_layers.num_layers
        assert len(routed) == spec.num_layers - first
        for layer in routed:
            balance, z = router_losses(spec.mlp, layer)
            objective = objective + weights_of_losses["balance"] * balance + weights_of_losses["z"] * z
    assert_gradients(model, gradients_on_paper(objective, weights))


@pytest.mark.parametrize("spec", MIXTURES.values(), ids=MIXTURES)
def test_the_routers_losses_leave_hidden_states_as_they_are(spec: ModelSpec) -> None:
    model, tokens = scrambled(spec), random_tokens(spec, 2, 10)
    losses = RouterLosses(balance=torch.tensor(0.7), z=torch.tensor(0.05))
    assert torch.equal(model(tokens), model(tokens, router_losses=losses))


def test_the_balance_loss_is_one_per_token_when_all_experts_are_chosen_alike() -> None:
    scores = torch.full((3, 8, 4), 0.25)
    chosen = torch.tensor([[0, 1], [2, 3]]).repeat(4, 1).expand(3, 8, 2)
    assert balance_loss(scores, chosen).item() == pytest.approx(24)
    # All tokens to one expert, whose router is sure of it: as many times as there are experts.
    sure = torch.zeros(1, 8, 4)
    sure[..., 2] = 1
    assert balance_loss(sure, torch.full((1, 8, 1), 2)).item() == pytest.approx(32)
