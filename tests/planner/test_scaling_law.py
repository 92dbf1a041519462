"""The scaling law against numeric minimisation, published losses, and its own inverse."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossus.errors import ConfigError
from colossus.planner.run.scaling_law import (
    BESIROGLU,
    HOFFMANN,
    ScalingLaw,
    compute_optimal_for_flops,
    compute_optimal_for_loss,
    loss,
    tokens_for_loss,
)

LAWS = [HOFFMANN, BESIROGLU]
CHINCHILLA_FLOPS = 5.76e23


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("flops", [1e18, CHINCHILLA_FLOPS, 4e26])
def test_no_other_split_of_the_compute_is_better(law: ScalingLaw, flops: float) -> None:
    sizes = np.geomspace(1e6, 1e14, 200_001)
    tokens = flops / 6 / sizes
    losses = (
        law.irreducible
        + law.params_factor / sizes**law.params_exponent
        + law.tokens_factor / tokens**law.tokens_exponent
    )
    best = law.optimum_for_flops(flops)
    assert best.flops == pytest.approx(flops)
    assert best.num_params == pytest.approx(sizes[np.argmin(losses)], rel=1e-3)
    assert law.loss(*best) == pytest.approx(losses.min(), rel=1e-9)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("target", [1.9, 2.0, 2.5, 3.5])
def test_no_other_size_reaches_the_loss_with_less_compute(law: ScalingLaw, target: float) -> None:
    best = law.optimum_for_loss(target)
    assert law.loss(*best) == pytest.approx(target)
    sizes = np.geomspace(law.smallest_size(target) * 1.01, best.num_params * 100, 2001)
    compute = [6 * n * law.tokens_for_loss(n, target) for n in sizes]
    assert min(compute) >= best.flops * (1 - 1e-9)
    assert min(compute) == pytest.approx(best.flops, rel=1e-3)


@given(st.floats(1e8, 1e13), st.floats(1e9, 1e15))
def test_tokens_are_the_inverse_of_loss(num_params: float, tokens: float) -> None:
    for law in LAWS:
        assert law.tokens_for_loss(num_params, law.loss(num_params, tokens)) == pytest.approx(
            tokens, rel=1e-4
        )


@given(st.floats(1e3, 1e20))
def test_the_likely_law_has_the_higher_floor(num_params: float) -> None:
    """So `tokens_for_loss` has a range wherever it has a likely value."""
    assert BESIROGLU.floor(num_params) > HOFFMANN.floor(num_params)
    reachable = tokens_for_loss(num_params, BESIROGLU.floor(num_params) + 0.1)
    assert reachable.low > 0


def test_the_replication_gives_chinchillas_own_proportion() -> None:
    """About 20 tokens per parameter, as the 70B model on 1.4T tokens was trained; the printed constants do not."""
    best = compute_optimal_for_flops(CHINCHILLA_FLOPS)
    assert 15 < best.tokens / best.num_params < 30
    assert best.num_params == pytest.approx(70e9, rel=0.1)
    printed = HOFFMANN.optimum_for_flops(CHINCHILLA_FLOPS)
    assert printed.tokens / printed.num_params > 50


@pytest.mark.parametrize(("flops", "num_params"), [(1.21e20, 1e9), (1.23e22, 10e9), (5.76e23, 67e9)])
def test_optimal_sizes_of_the_first_papers_own_first_method(flops: float, num_params: float) -> None:
    """Hoffmann et al. 2022, table 3 (recall), which needed no parametric law."""
    assert compute_optimal_for_flops(flops).num_params == pytest.approx(num_params, rel=0.12)


def test_chinchilla_is_better_than_gopher_of_the_same_compute() -> None:
    chinchilla, gopher = loss(70e9, 1.4e12), loss(280e9, 0.3e12)
    assert chinchilla.high < gopher.low
    assert chinchilla.high - chinchilla.low < 0.1  # the fits agree where there was data


def test_a_loss_that_the_size_never_reaches_names_the_size_that_does() -> None:
    smallest = BESIROGLU.smallest_size(2.0)
    assert BESIROGLU.floor(smallest) == pytest.approx(2.0)
    with pytest.raises(ConfigError, match=r"below the 2\.174 that 1B parameters reach .* more than 6\.86B"):
        tokens_for_loss(1e9, 2.0)
    assert tokens_for_loss(smallest * 1.1, 2.0).likely > compute_optimal_for_loss(2.0).tokens


@pytest.mark.parametrize("target", [1.8172, 1.0])
def test_a_loss_that_no_size_reaches(target: float) -> None:
    with pytest.raises(ConfigError, match=r"not above 1\.8172"):
        tokens_for_loss(1e12, target)
    with pytest.raises(ConfigError, match="give the goal in tokens"):
        compute_optimal_for_loss(target)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_numbers_are_sentences(bad: float) -> None:
    for call in (
        lambda: loss(bad, 1e9),
        lambda: loss(1e9, bad),
        lambda: tokens_for_loss(bad, 2.0),
        lambda: tokens_for_loss(1e9, bad),
        lambda: compute_optimal_for_flops(bad),
        lambda: compute_optimal_for_loss(bad),
    ):
        with pytest.raises(ConfigError, match="positive and finite"):
            call()
