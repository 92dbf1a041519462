"""AdamW with averages in bfloat16 against torch's in float32; and the rounding that makes it work."""

import pytest
import torch
from torch import Tensor

from colossus.optim import NarrowAdamW
from colossus.optim.rounding import round_stochastically

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()


# --- rounding ---


def test_it_rounds_to_a_neighbour_and_leaves_what_fits() -> None:
    values = random(10_000) * torch.logspace(-20, 20, 10_000)
    rounded = round_stochastically(values, torch.tensor(3))
    assert rounded.dtype == torch.bfloat16
    # Neighbours are at most 1/128 of the smaller one apart.
    assert ((rounded.float() - values).abs() < values.abs() / 128).all()
    exact = values.to(torch.bfloat16)
    assert torch.equal(round_stochastically(exact.float(), torch.tensor(3)), exact)
    special = torch.tensor([0.0, torch.inf, -torch.inf])
    assert torch.equal(round_stochastically(special, torch.tensor(1)).float(), special)


@pytest.mark.parametrize("value", [1.0 + 1 / 1024, -3.3, 7.7e-6, 1.0 + 0.9 / 128])
def test_over_many_steps_the_mean_is_right(value: float) -> None:
    """One number, which never changes: only the step does."""
    num_steps = 4000
    same = torch.full((1,), value)
    rounded = torch.cat([round_stochastically(same, torch.tensor(step)) for step in range(num_steps)])
    low, high = rounded.float().min().item(), rounded.float().max().item()
    assert low < same.item() < high
    # Five standard errors of a coin that falls on either neighbour.
    error = 5 * 0.5 * (high - low) / num_steps**0.5
    assert rounded.double().mean().item() == pytest.approx(same.item(), abs=error)


def test_over_many_numbers_the_mean_is_right() -> None:
    values = 1 + torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
    errors = round_stochastically(values, torch.tensor(11)).double() - values.double()
    assert errors.mean().abs() < 0.05 / 128  # 128 neighbours with a coin each; to the nearest below: 0.5
    assert errors.std().item() == pytest.approx(1 / 128 / 6**0.5, rel=0.2)


def test_decisions_differ_between_steps() -> None:
    values = random(4096)
    one, other = (round_stochastically(values, torch.tensor(step)) for step in (1, 2))
    # Of numbers anywhere between neighbours, 1 in 3 goes another way with another coin.
    assert (one != other).float().mean().item() == pytest.approx(1 / 3, abs=0.1)


# --- the optimizer ---


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_takes_torchs_steps_up_to_what_bfloat16_keeps(weight_decay: float) -> None:
    settings = {**SETTINGS, "weight_decay": weight_decay}
    gradients = [random(40, 30, seed=step) + 0.5 for step in range(30)]
    ours, theirs = (torch.nn.Parameter(random(40, 30, seed=-1)) for _ in range(2))
    start = ours.detach().clone()
    steps(NarrowAdamW([ours], **settings), ours, gradients)
    steps(torch.optim.AdamW([theirs], **settings), theirs, gradients)
    assert (ours - theirs).norm() < 0.01 * (theirs - start).norm()


def test_its_first_step_is_torchs() -> None:
    """Averages are rounded after they are used."""
    ours, theirs = (torch.nn.Parameter(random(40, 30, seed=-1)) for _ in range(2))
    steps(NarrowAdamW([ours], **SETTINGS), ours, [random(40, 30)])
    steps(torch.optim.AdamW([theirs], **SETTINGS), theirs, [random(40, 30)])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_large_gradient_is_forgotten() -> None:
    """β₂ = 0.999 takes 0.1% off a step, less than half of what bfloat16 tells apart."""
    parameter = torch.nn.Parameter(torch.zeros(256))
    optimizer = NarrowAdamW([parameter], **SETTINGS)
    num_steps = 2000
    steps(optimizer, parameter, [torch.linspace(1, 2, 256), *[torch.zeros(256)] * num_steps])
    left = optimizer.state[parameter]["exp_avg_sq"].double()
    expected = 0.001 * torch.linspace(1, 2, 256).double().square() * 0.999**num_steps
    # Each decay is right on average; over all of them it strays by some percent.
    torch.testing.assert_close(left, expected, rtol=0.25, atol=0)
    assert (left / expected).mean().item() == pytest.approx(1, abs=0.05)


def test_state_has_torchs_names_and_half_its_size() -> None:
    ours, theirs = (torch.nn.Parameter(random(4, 3)) for _ in range(2))
    kept = {}
    for parameter, kind in ((ours, NarrowAdamW), (theirs, torch.optim.AdamW)):
        optimizer = kind([parameter], **SETTINGS)
        steps(optimizer, parameter, [random(4, 3)] * 2)
        kept[kind] = optimizer.state[parameter]
    assert {name: tensor.shape for name, tensor in kept[NarrowAdamW].items()} == {
        name: tensor.shape for name, tensor in kept[torch.optim.AdamW].items()
    }
    assert kept[NarrowAdamW]["step"] == kept[torch.optim.AdamW]["step"] == 2
    assert all(kept[NarrowAdamW][name].dtype == torch.bfloat16 for name in ("exp_avg", "exp_avg_sq"))


def test_a_parameter_of_which_nothing_is_here_takes_steps_too() -> None:
    parameter = torch.nn.Parameter(torch.empty(0, 3))
    optimizer = NarrowAdamW([parameter], **SETTINGS)
    steps(optimizer, parameter, [torch.empty(0, 3)] * 3)
    assert optimizer.state[parameter]["step"] == 3
