"""Chunked cross-entropy against torch's own, in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from colossus.models import chunked_cross_entropy


def expected(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    soft_cap: float | None,
    z_loss: float,
    multiplier: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Objective, loss, and the objective's gradients."""
    hidden, head = (tensor.detach().double().requires_grad_() for tensor in (hidden, head))
    logits = hidden @ head.T * multiplier
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    objective = loss + z_loss * logits.logsumexp(-1).square().sum()
    return objective, loss, *torch.autograd.grad(objective, (hidden, head))


def random_problem(tokens: int, vocab: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, generator=generator, requires_grad=True)
    head = torch.randn(vocab, size, generator=generator, requires_grad=True)
    return hidden, head, torch.randint(vocab, (tokens,), generator=generator)


def assert_as_expected(
    hidden: Tensor, head: Tensor, targets: Tensor, rtol: float = 1e-5, **settings: Any
) -> None:
    chunk_tokens = settings.pop("chunk_tokens")
    settings = {"soft_cap": None, "z_loss": 0.0, **settings}
    objective, loss, grad_hidden, grad_head = expected(hidden, head, targets, **settings)
    ours, ours_loss = chunked_cross_entropy(hidden, head, targets, chunk_tokens=chunk_tokens, **settings)
    ours_hidden, ours_head = torch.autograd.grad(ours, (hidden, head))
    assert ours.dtype == ours_loss.dtype == torch.float32
    assert ours.item() == pytest.approx(objective.item(), rel=rtol, abs=1e-6)
    assert ours_loss.item() == pytest.approx(loss.item(), rel=rtol, abs=1e-6)
    # A saturated soft-cap multiplies gradients by 1 − tanh², which float32 knows to 1e-7 of 1.
    of_logits = 1 + 2 * settings["z_loss"] * ((settings["soft_cap"] or 0) + math.log(head.shape[0]))
    largest = max(hidden.abs().max().item(), head.abs().max().item())
    known = 1e-7 * of_logits * settings.get("multiplier", 1.0) * max(1.0, largest)
    for actual, wanted in ((ours_hidden, grad_hidden), (ours_head, grad_head)):
        scale = wanted.abs().max().item()
        atol = rtol * scale + (known if settings["soft_cap"] is not None else 1e-30)
        torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=atol)


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(1, 17),
    vocab=st.integers(1, 30),
    chunk_tokens=st.integers(1, 20),
    soft_cap=st.none() | st.floats(0.1, 50),
    z_loss=st.just(0.0) | st.floats(1e-6, 1.0),
    multiplier=st.just(1.0) | st.floats(0.1, 3),
    seed=st.integers(0, 100),
)
def test_any_size_chunk_cap_multiplier_and_z_loss(
    tokens: int,
    vocab: int,
    chunk_tokens: int,
    soft_cap: float | None,
    z_loss: float,
    multiplier: float,
    seed: int,
) -> None:
    problem = random_problem(tokens, vocab, 6, seed)
    settings = {"soft_cap": soft_cap, "z_loss": z_loss, "multiplier": multiplier}
    assert_as_expected(*problem, chunk_tokens=chunk_tokens, **settings, rtol=2e-5)


@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
@pytest.mark.parametrize("soft_cap", [None, 30.0])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_logits_stay_finite(size: float, soft_cap: float | None, z_loss: float) -> None:
    hidden, head = torch.eye(3), torch.tensor([[1.0, -1, 0], [0, 1, 1], [-1, 0, 1], [-1, -1, -1]]) * size
    for targets in ([0, 1, 2], [3, 3, 3], [1, 0, 3]):
        problem = hidden.clone().requires_grad_(), head.clone().requires_grad_(), torch.tensor(targets)
        assert_as_expected(*problem, chunk_tokens=2, soft_cap=soft_cap, z_loss=z_loss)


def test_all_logits_equal_and_huge() -> None:
    hidden, head = torch.ones(2, 1, requires_grad=True), torch.full((5, 1), 1e4, requires_grad=True)
    assert_as_expected(hidden, head, torch.tensor([0, 4]), chunk_tokens=1)


def test_bfloat16_within_its_rounding() -> None:
    hidden, head, targets = random_problem(64, 50, 16)
    rounded = hidden.detach().bfloat16().requires_grad_()
    wanted, _, grad_hidden, grad_head = expected(rounded, head, targets, None, 0.0)
    objective, _ = chunked_cross_entropy(rounded, head, targets, chunk_tokens=20)
    objective.backward()
    assert objective.item() == pytest.approx(wanted.item(), rel=5e-3)
    assert (rounded.grad.dtype, head.grad.dtype) == (torch.bfloat16, torch.float32)
    for actual, exact in ((rounded.grad, grad_hidden), (head.grad, grad_head)):
        assert (actual - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_scales_without_another_rounding(dtype: torch.dtype) -> None:
    hidden, head, targets = random_problem(9, 20, 4)
    hidden = hidden.detach().to(dtype).requires_grad_()
    objective, _ = chunked_cross_entropy(hidden, head, targets, chunk_tokens=4)
    once = torch.autograd.grad(objective, (hidden, head), retain_graph=True)
    scaled = torch.autograd.grad(objective / 7, (hidden, head))
    torch.testing.assert_close(scaled[0], (once[0].float() * (1 / 7)).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(scaled[1], once[1] * (1 / 7))


def test_no_tokens_at_all_is_a_loss_of_zero() -> None:
    hidden, head, targets = random_problem(0, 20, 4)
    objective, loss = chunked_cross_entropy(hidden, head, targets, chunk_tokens=4)
    objective.backward()
    assert (objective.item(), loss.item()) == (0, 0)
    assert torch.all(head.grad == 0)


def test_the_reported_loss_carries_no_gradient() -> None:
    assert not chunked_cross_entropy(*random_problem(9, 20, 4), chunk_tokens=4)[1].requires_grad


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    num_elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_all_logits_are_never_held() -> None:
    tokens, vocab, size, chunk_tokens = 96, 1000, 16, 8
    problem = random_problem(tokens, vocab, size)
    with Largest() as largest:
        chunked_cross_entropy(*problem, chunk_tokens=chunk_tokens, soft_cap=5.0, z_loss=1e-3)[0].backward()
    assert largest.num_elements <= max(chunk_tokens * vocab, vocab * size)  # a chunk, or the head's gradient
    assert largest.num_elements < tokens * vocab / 5


def test_without_gradients_only_the_loss_is_computed() -> None:
    hidden, head, targets = random_problem(10, 20, 4)
    with_gradient, _ = chunked_cross_entropy(hidden, head, targets, chunk_tokens=3)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        without, _ = chunked_cross_entropy(hidden, head, targets, chunk_tokens=3)
    assert torch.equal(without, with_gradient)
    assert counter.get_total_flops() == 2 * 10 * 20 * 4
