"""Muon against the singular value decomposition, and against torch's own Muon."""

import math

import pytest
import torch
from torch import Tensor

from colossus.optim import Muon
from colossus.optim.muon import POLAR_EXPRESS, QUINTIC, Coefficients, orthogonalise, polynomials

SHAPES = [(8, 8), (24, 8), (8, 24), (1, 6), (6, 1), (40, 64)]
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_singular_values(rows: int, columns: int, values: Tensor) -> Tensor:
    left, _ = torch.linalg.qr(random(rows, min(rows, columns)))
    right, _ = torch.linalg.qr(random(columns, min(rows, columns), seed=1))
    return left @ torch.diag(values) @ right.T


def by_svd(matrix: Tensor, coefficients: tuple[Coefficients, ...]) -> Tensor:
    """What the iteration means: each polynomial acts on the singular values, and on nothing else."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / (1.01 * matrix.double().norm() + 1e-7)
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


# --- orthogonalising ---


@pytest.mark.parametrize("coefficients", [POLAR_EXPRESS, (QUINTIC,) * 5], ids=["polar", "quintic"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_polynomials_act_on_singular_values(
    shape: tuple[int, int], coefficients: tuple[Coefficients, ...]
) -> None:
    matrices = torch.stack([random(*shape, seed=seed) for seed in range(3)])
    actual = orthogonalise(matrices.double(), coefficients, torch.float64)
    expected = torch.stack([by_svd(matrix, coefficients) for matrix in matrices])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_nears_the_orthogonal_factor(shape: tuple[int, int], dtype: torch.dtype) -> None:
    # Conditioned so that five steps reach: the smallest singular value is a thirtieth of the largest.
    matrix = with_singular_values(*shape, torch.linspace(1, 1 / 30, min(shape)))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest = left @ right
    result = orthogonalise(matrix[None], POLAR_EXPRESS, dtype)[0]
    assert result.dtype == dtype
    assert torch.linalg.svdvals(result.float()) == pytest.approx(1, abs=0.15)
    assert torch.nn.functional.cosine_similarity(result.float().flatten(), nearest.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_singular_value_ever_runs_away(dtype: torch.dtype) -> None:
    """One direction dominates by any amount: where rounding could leave the range of the next polynomial."""
    shares = torch.linspace(0.02, 0.999, 150)
    rest = torch.rand(15, generator=torch.Generator().manual_seed(2))
    rest /= rest.norm()
    matrices = torch.stack(
        [with_singular_values(16, 48, torch.cat([s[None], rest * (1 - s**2).sqrt()])) for s in shares]
    )
    for num_steps in range(1, 11):
        values = torch.linalg.svdvals(orthogonalise(matrices, polynomials(num_steps), dtype).float())
        assert values.max() < 2.1, num_steps
        if num_steps >= 5:
            assert values.max() < 1.2, num_steps


def test_more_steps_come_nearer() -> None:
    matrix = with_singular_values(16, 16, torch.logspace(0, -2, 16))

    def error(num_steps: int) -> float:
        result = orthogonalise(matrix[None].double(), polynomials(num_steps), torch.float64)[0]
        return (torch.linalg.svdvals(result) - 1).abs().max().item()

    errors = [error(num_steps) for num_steps in range(3, 10)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e12])
def test_the_size_of_a_matrix_does_not_matter(scale: float, dtype: torch.dtype) -> None:
    matrix = random(12, 20)
    if scale < 1e-7:
        assert torch.isfinite(orthogonalise(matrix[None] * scale, POLAR_EXPRESS, dtype)).all()
        return
    one, other = (orthogonalise(m[None], POLAR_EXPRESS, dtype).float() for m in (matrix, matrix * scale))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3 if dtype == torch.float32 else 0.05)


def test_a_batch_is_its_matrices_one_by_one() -> None:
    matrices = torch.stack([random(6, 10), 100 * random(6, 10, seed=1), torch.zeros(6, 10)])
    together = orthogonalise(matrices, POLAR_EXPRESS, torch.float32)
    alone = torch.cat([orthogonalise(matrix[None], POLAR_EXPRESS, torch.float32) for matrix in matrices])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert torch.all(together[2] == 0)


# --- the optimizer ---


def run(optimizer: torch.optim.Optimizer, parameters: list[Tensor], num_steps: int) -> None:
    for step in range(num_steps):
        for number, parameter in enumerate(parameters):
            parameter.grad = random(*parameter.shape, seed=100 * step + number)
        optimizer.step()


def start() -> list[Tensor]:
    shapes = [(8, 8), (24, 8), (8, 24), (24, 8)]
    return [torch.nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.95])
def test_torchs_muon_takes_the_same_steps(momentum: float, weight_decay: float) -> None:
    """In one iteration, with the factor that keeps our norm below 1 put into torch's coefficients; up to
    the bfloat16 in which torch's runs."""
    a, b, c = QUINTIC
    ours, theirs = start(), start()
    settings = {"lr": 0.05, "momentum": momentum, "weight_decay": weight_decay}
    run(Muon(ours, coefficients=(QUINTIC,), dtype=torch.bfloat16, **settings), ours, 4)
    scaled = (a / 1.01, b / 1.01**3, c / 1.01**5)
    run(torch.optim.Muon(theirs, ns_coefficients=scaled, ns_steps=1, **settings), theirs, 4)
    for one, other, first in zip(ours, theirs, start(), strict=True):
        assert (one - other).abs().max() < 4 * 0.05 * 0.02
        assert (one - other).norm() < 0.02 * (one - first).norm()


def test_torchs_muon_ends_near_after_five_iterations() -> None:
    ours, theirs = start(), start()
    run(Muon(ours, lr=0.05, momentum=0.9, coefficients=(QUINTIC,) * 5), ours, 6)
    run(torch.optim.Muon(theirs, lr=0.05, momentum=0.9, weight_decay=0.0), theirs, 6)
    for one, other, first in zip(ours, theirs, start(), strict=True):
        assert (one - other).norm() < 0.1 * (one - first).norm()


def test_steps_written_out() -> None:
    (ours,) = parameters = [torch.nn.Parameter(random(10, 4).double())]
    optimizer = Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.01, dtype=torch.float64)
    expected, average = ours.detach().clone(), torch.zeros(10, 4, dtype=torch.float64)
    for step in range(3):
        gradient = random(10, 4, seed=step).double()
        average = 0.9 * average + 0.1 * gradient
        direction = by_svd(0.1 * gradient + 0.9 * average, POLAR_EXPRESS)
        expected = expected * (1 - 0.1 * 0.01) - 0.1 * math.sqrt(10 / 4) * direction
        ours.grad = gradient
        optimizer.step()
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gradient_and_a_zero_gradient_change_nothing(dtype: torch.dtype) -> None:
    with_none, with_zero = start()[:2]
    before = with_none.detach().clone(), with_zero.detach().clone()
    optimizer = Muon([with_none, with_zero], lr=0.1, dtype=dtype)
    with_zero.grad = torch.zeros_like(with_zero)
    optimizer.step()
    assert torch.equal(with_none, before[0])
    assert torch.equal(with_zero, before[1])


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Muon is for matrices and stacks of matrices; got shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def test_a_stack_is_updated_as_its_matrices_are() -> None:
    stack = torch.nn.Parameter(random(3, 8, 12))
    apart = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    together, one_by_one = Muon([stack], lr=0.1, weight_decay=0.3), Muon(apart, lr=0.1, weight_decay=0.3)
    for step in range(3):
        stack.grad = random(3, 8, 12, seed=10 + step)
        for matrix, gradient in zip(apart, stack.grad, strict=True):
            matrix.grad = gradient.clone()
        together.step()
        one_by_one.step()
    torch.testing.assert_close(stack.detach(), torch.stack([m.detach() for m in apart]), rtol=1e-5, atol=1e-6)


def test_momentum_in_bfloat16_stays_near() -> None:
    narrow, wide = start(), start()
    settings = {"lr": 0.05, "momentum": 0.95}
    optimizer = Muon(narrow, state_dtype=torch.bfloat16, **settings)
    run(optimizer, narrow, 10)
    run(Muon(wide, **settings), wide, 10)
    assert all(optimizer.state[p]["momentum"].dtype == torch.bfloat16 for p in narrow)
    for one, other, first in zip(narrow, wide, start(), strict=True):
        assert 0 < (one - other).norm() < 0.03 * (other - first).norm()
