"""Which parameter is optimised how; and the gradient's norm."""

from copy import deepcopy

import pytest
import torch

from colossus.models import Decoder, build
from colossus.optim import (
    Balancing,
    Muon,
    RowAdagrad,
    build_optimizers,
    gradient_norm,
    optimizers_of,
    scale_gradients,
    set_learning_rates,
)
from colossus.spec.model import ModelSpec, NgramSpec
from colossus.spec.run import AdamW
from colossus.spec.run import Muon as MuonConfig
from tests.helpers import VARIETIES, random_tokens, scrambled, tiny

ADAMW = AdamW(
    learning_rate=1e-3,
    embedding_learning_rate=2e-3,
    head_learning_rate=3e-3,
    weight_decay=0.1,
    sparse_learning_rate=0.4,
)
MUON = MuonConfig(learning_rate=0.02, weight_decay=0.05, rest=ADAMW)

RULES = {  # role: (optimizer, learning rate, weight decay)
    "adamw": {
        "embedding": (torch.optim.AdamW, 2e-3, 0.0),
        "head": (torch.optim.AdamW, 3e-3, 0.1),
        "vector": (torch.optim.AdamW, 1e-3, 0.0),
        "matrix": (torch.optim.AdamW, 1e-3, 0.1),
        "sparse_embedding": (RowAdagrad, 0.4, None),
        "balance": (Balancing, 0.003, None),
    },
    "muon": {
        "embedding": (torch.optim.AdamW, 2e-3, 0.0),
        "head": (torch.optim.AdamW, 3e-3, 0.1),
        "vector": (torch.optim.AdamW, 1e-3, 0.0),
        "matrix": (Muon, 0.02, 0.05),
        "sparse_embedding": (RowAdagrad, 0.4, None),
        "balance": (Balancing, 0.003, None),
    },
}


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=lambda config: config.kind)
@pytest.mark.parametrize("spec", VARIETIES.values(), ids=VARIETIES)
def test_each_parameter_is_in_one_group_by_its_role(spec: ModelSpec, config: AdamW | MuonConfig) -> None:
    model = build(spec, seed=0)
    groups = [
        (parameter, type(optimizer), group["lr"], group.get("weight_decay"))
        for optimizer in optimizers_of(model, spec, config, balancing_step=0.003)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(groups) == len(list(model.parameters()))
    rules = {id(parameter): tuple(rule) for parameter, *rule in groups}
    parameters = dict(model.named_parameters())
    for parameter in spec.parameters():
        expected = RULES[config.kind][parameter.role]
        assert rules[id(parameters[parameter.name])] == expected, parameter.name


def test_rates_that_are_not_given_are_the_general_one() -> None:
    spec = tiny()
    (adamw,) = optimizers_of(build(spec, seed=0), spec, AdamW(learning_rate=0.7))
    assert {group["lr"] for group in adamw.param_groups} == {0.7}


def test_learning_rates_are_multiples_of_their_peaks() -> None:
    spec = tiny()
    optimizers = optimizers_of(build(spec, seed=0), spec, MUON)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    for multiplier in (0.5, 0.1, 1.0):  # not of the one before
        set_learning_rates(optimizers, multiplier)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert rates == [peak * multiplier for peak in peaks]


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=lambda config: config.kind)
def test_some_of_a_models_parameters_will_do(config: AdamW | MuonConfig) -> None:
    """Those of a pipeline's stage: roles that do not occur there get no optimizer."""
    spec = tiny()
    model = build(spec, seed=0)
    specs = {parameter.name: parameter for parameter in spec.parameters()}
    parameters = {name: p for name, p in model.named_parameters() if name.startswith("final_norm")}
    (only,) = build_optimizers(parameters, specs, config)
    assert [p for group in only.param_groups for p in group["params"]] == [model.final_norm.weight]


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=lambda config: config.kind)
def test_averages_are_kept_as_asked(config: AdamW | MuonConfig) -> None:
    model, _ = model_with_gradients()
    optimizers = optimizers_of(model, model.spec, config, state_dtype=torch.bfloat16)
    for optimizer in optimizers:
        optimizer.step()
    kept = {
        (key, value.dtype)
        for optimizer in optimizers
        for state in optimizer.state.values()
        for key, value in state.items()
        if value.dim()
    }
    averages = {"exp_avg", "exp_avg_sq"} | ({"momentum"} if config is MUON else set())
    assert kept == {(name, torch.bfloat16) for name in averages} | {("square_sum", torch.float32)}


# --- the gradient's norm ---


def model_with_gradients() -> tuple[Decoder, Decoder]:
    """One as it is, with sparse gradients that name rows twice; and a copy whose gradients are all dense."""
    spec = tiny(ngrams=NgramSpec(orders=(2, 3), num_rows=5))
    model = scrambled(spec)
    for seed in range(2):
        model.logits(model(random_tokens(spec, 3, 16, seed=seed))).square().sum().backward()
    dense = deepcopy(model)
    for parameter, original in zip(dense.parameters(), model.parameters(), strict=True):
        parameter.grad = original.grad.to_dense().clone()
    assert not model.ngram_embedding.weight.grad.is_coalesced()
    return model, dense


@pytest.mark.parametrize("largest", [0.5, 1e6])
def test_clipping_is_torchs_of_the_dense_gradient(largest: float) -> None:
    model, dense = model_with_gradients()
    expected = torch.nn.utils.clip_grad_norm_(dense.parameters(), largest)
    norm = gradient_norm(model)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    if norm > largest:
        scale_gradients(model.parameters(), largest / norm)
    for (name, parameter), reference in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.to_dense(), reference.grad, rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["ngram_embedding.weight", "layers.1.mlp_norm.weight"])
def test_one_bad_number_anywhere_shows_in_the_norm(name: str, poison: float) -> None:
    model, _ = model_with_gradients()
    gradient = dict(model.named_parameters())[name].grad
    (gradient._values() if gradient.is_sparse else gradient).view(-1)[-1] = poison
    assert not torch.isfinite(gradient_norm(model))


def test_parameters_without_gradients_count_for_nothing() -> None:
    model, dense = model_with_gradients()
    model.final_norm.weight.grad = None
    dense.final_norm.weight.grad = None
    expected = torch.nn.utils.get_total_norm([p.grad for p in dense.parameters() if p.grad is not None])
    assert gradient_norm(model).item() == pytest.approx(expected.item(), rel=1e-6)
    scale_gradients(model.parameters(), torch.tensor(0.5))
    assert gradient_norm(model).item() == pytest.approx(expected.item() / 2, rel=1e-6)
