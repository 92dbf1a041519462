"""Row-wise Adagrad against loops over the whole table."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colossus.optim import RowAdagrad

BATCHES = [[1, 1, 4, 2], [4, 4, 4], [0, 5, 1], []]


def table() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)))


def fill_gradient(parameter: torch.nn.Parameter, rows: list[int], *, sparse: bool) -> None:
    parameter.grad = None
    factors = torch.arange(1, len(rows) * 3 + 1).view(-1, 3).sin()
    (F.embedding(torch.tensor(rows, dtype=torch.long), parameter, sparse=sparse) * factors).sum().backward()


def on_paper(lr: float) -> Tensor:
    weights = table().detach().double()
    sums = [0.0] * len(weights)
    for rows in BATCHES:
        factors = torch.arange(1, len(rows) * 3 + 1).view(-1, 3).sin().double()
        for row in set(rows):
            gradient = sum(factors[i] for i, other in enumerate(rows) if other == row)
            sums[row] += float((gradient**2).mean())
            weights[row] -= lr * gradient / sums[row] ** 0.5
    return weights


@pytest.mark.parametrize("sparse", [True, False])
def test_rows_that_occur_several_times(sparse: bool) -> None:
    parameter = table()
    optimizer = RowAdagrad([parameter], lr=0.3)
    for rows in BATCHES:
        fill_gradient(parameter, rows, sparse=sparse)
        optimizer.step()
    torch.testing.assert_close(parameter.detach().double(), on_paper(0.3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sparse", [True, False])
def test_rows_that_do_not_occur_keep_their_bits(sparse: bool) -> None:
    parameter = table()
    optimizer = RowAdagrad([parameter], lr=0.3)
    fill_gradient(parameter, [1, 1, 4], sparse=sparse)
    optimizer.step()
    untouched = [0, 2, 3, 5, 6]
    assert torch.equal(parameter[untouched], table()[untouched])
    assert not torch.equal(parameter[[1, 4]], table()[[1, 4]])


def test_the_state_is_one_number_a_row() -> None:
    parameter = table()
    optimizer = RowAdagrad([parameter], lr=0.3)
    fill_gradient(parameter, [1], sparse=True)
    optimizer.step()
    assert {name: value.shape for name, value in optimizer.state[parameter].items()} == {
        "square_sum": torch.Size([7])
    }


def test_the_size_of_the_loss_does_not_matter_to_the_first_step() -> None:
    one, other = table(), table()
    for parameter, scale in ((one, 1.0), (other, 1e-4)):
        fill_gradient(parameter, [1, 2], sparse=True)
        parameter.grad = parameter.grad * scale
        RowAdagrad([parameter], lr=0.3).step()
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
