"""Initial weights are a function of the seed and the parameter's name."""

import math

import pytest
import torch

from colossus.models import build
from colossus.spec.model import ModelSpec, NgramSpec, NormSpec
from tests.helpers import VARIETIES, tiny


def weights(spec: ModelSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in build(spec, seed=seed).named_parameters()}


def assert_shared_are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    shared = one.keys() & other.keys()
    assert len(shared) > 3
    for name in shared:
        assert torch.equal(one[name], other[name]), name


def test_more_layers_leave_the_others_as_they_were() -> None:
    few, many = (weights(tiny(num_layers=n, zero_init_outputs=True)) for n in (2, 5))
    assert_shared_are_equal(few, many)


def test_other_parts_around_a_parameter_do_not_change_it() -> None:
    plain = weights(tiny())
    extended = weights(tiny(norm=NormSpec(weighted=False), ngrams=NgramSpec(num_rows=8), embedding_norm=True))
    assert_shared_are_equal(plain, extended)


def test_neither_the_global_generator_nor_the_default_dtype_matters() -> None:
    torch.manual_seed(1)
    one = weights(tiny())
    torch.manual_seed(2)
    assert_shared_are_equal(one, weights(tiny()))


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(tiny(), seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_another_seed_or_name_gives_other_values() -> None:
    one, other = weights(tiny(), seed=0), weights(tiny(), seed=1)
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert not torch.equal(one["layers.0.attention.key.weight"], one["layers.0.attention.value.weight"])
    assert not torch.equal(one["layers.0.mlp.up.weight"], one["layers.1.mlp.up.weight"])


@pytest.mark.parametrize("spec", VARIETIES.values(), ids=VARIETIES)
@pytest.mark.parametrize("zero_init_outputs", [False, True])
def test_spreads_are_as_the_table_says(spec: ModelSpec, zero_init_outputs: bool) -> None:
    spec = spec.model_copy(update={"hidden_size": 40, "zero_init_outputs": zero_init_outputs})
    built = weights(spec)
    for parameter in spec.parameters():
        values = built[parameter.name]
        if parameter.std == 0:
            assert torch.all(values == parameter.start), parameter.name
            continue
        tolerance = 5 / math.sqrt(values.numel())  # five standard errors
        assert values.std().item() == pytest.approx(parameter.std, rel=tolerance), parameter.name
        assert abs(values.mean().item()) < tolerance * parameter.std, parameter.name


def test_hidden_states_keep_their_size_through_many_layers() -> None:
    """The scaling of outputs by 1/√(2·layers): the residual sum grows by a factor and not with depth."""
    spec = tiny(num_layers=24, hidden_size=48)
    model = build(spec, seed=0)
    seen: list[float] = []
    model.final_norm.register_forward_pre_hook(lambda _, x: seen.append(x[0].std().item()))
    model(torch.arange(16)[None])
    assert 1 < seen[0] < 2


def test_a_model_with_zero_outputs_predicts_every_token_alike() -> None:
    spec = tiny(zero_init_outputs=True)
    model = build(spec, seed=0)
    assert torch.all(model.logits(model(torch.arange(16)[None])) == 0)
