"""A dense run becomes a mixture that starts where it stopped."""

from pathlib import Path

import pytest
import torch

from colossus.checkpoint import load_newest, save
from colossus.checkpoint.continued import continued
from colossus.checkpoint.upcycle import upcycle_run, upcycled
from colossus.data import Tokenizer
from colossus.errors import ConfigError
from colossus.models import Decoder, build
from colossus.observe.run_directory import RunDirectory
from colossus.spec.model import MlpSpec, ModelSpec
from tests.helpers import GQA, VARIETIES, random_tokens, scrambled, tiny

DENSE = {
    "swiglu": tiny(attention=GQA, vocab_size=300),
    "biases": tiny(mlp=MlpSpec(intermediate_size=16, activation="gelu", bias=True), vocab_size=300),
    "squared_relu": tiny(mlp=MlpSpec(intermediate_size=16, activation="squared_relu"), vocab_size=300),
}


def dense_run(folder: Path, model: Decoder) -> RunDirectory:
    run = RunDirectory.create(folder, "dense")
    Tokenizer.train(["some text for a tokenizer"], 260).save(run.tokenizer_path)
    run.write_description(continued(model.spec))
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    save(run.checkpoints_path, 7, tensors, {}, model=model.spec)
    return run


def loaded(run: RunDirectory) -> Decoder:
    config = run.config()
    model = build(config.model, seed=config.seed)
    tensors = load_newest(run.checkpoints_path, expect=config.model)[0].tensors
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    return model


@pytest.mark.parametrize("spec", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (3, 1), (2, 2)])
def test_it_computes_what_the_dense_model_did(
    tmp_path: Path, spec: ModelSpec, num_experts: int, top_k: int
) -> None:
    dense = scrambled(spec)
    model = upcycled(spec, num_experts=num_experts, top_k=top_k)
    run = upcycle_run(dense_run(tmp_path, dense), continued(model), runs_directory=tmp_path, name="mixture")
    mixture, tokens = loaded(run), random_tokens(spec, 3, 16)
    with torch.no_grad():
        torch.testing.assert_close(mixture(tokens), dense(tokens), rtol=1e-4, atol=1e-4)
    assert run.config().model.num_params() > spec.num_params()


def test_experts_are_given_different_tokens(tmp_path: Path) -> None:
    """The router starts at random, so that copies do not stay copies."""
    model = upcycled(DENSE["swiglu"], num_experts=4, top_k=1)
    run = upcycle_run(
        dense_run(tmp_path, scrambled(DENSE["swiglu"])), continued(model), runs_directory=tmp_path, name="x"
    )
    mixture = loaded(run)
    mixture(random_tokens(model, 4, 16)).square().sum().backward()
    gradient = mixture.layers[0].mlp.experts.up.weight.grad
    assert (mixture.layers[0].mlp.load > 0).sum() > 1
    assert not torch.allclose(gradient[0], gradient[1])


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 5), (4, 0)])
def test_impossible_numbers_are_refused(num_experts: int, top_k: int) -> None:
    with pytest.raises(ConfigError, match=f"asked for {num_experts} experts"):
        upcycled(tiny(), num_experts=num_experts, top_k=top_k)


def test_settings_that_make_another_model_are_refused(tmp_path: Path) -> None:
    run = dense_run(tmp_path, scrambled(DENSE["swiglu"]))
    model = upcycled(DENSE["swiglu"], num_experts=4, top_k=1)
    for change in ({"num_layers": 5}, {"mlp": DENSE["swiglu"].mlp}):
        with pytest.raises(ConfigError, match=r"Leave model.\* as it is|leave model.\* as it is"):
            upcycle_run(
                run, continued(model.model_copy(update=change)), runs_directory=tmp_path, name="other"
            )
    assert [path.name for path in tmp_path.glob("other*")] == []


def test_a_mixture_is_not_upcycled() -> None:
    with pytest.raises(ConfigError, match="a mixture of experts already"):
        upcycled(VARIETIES["mixture"], num_experts=4, top_k=2)
