"""The decoder against `transformers`: the same files, the same logits and gradients, both ways, in float32."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from colossus.checkpoint.hugging_face.convert import fill, stored
from colossus.models import Decoder, reset_buffers
from colossus.spec.model import ModelSpec
from colossus.zoo.hugging_face import architecture_of, model_of
from tests.helpers import scrambled
from tests.zoo.hugging_face_models import MODELS

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

NUM_TOKENS = 60
"""More than the windows of these models, and than the context that rotations are stretched from."""

IN_TRANSFORMERS = {name: spec for name, spec in MODELS.items() if not name.startswith("grok")}
every_architecture = pytest.mark.parametrize("spec", IN_TRANSFORMERS.values(), ids=IN_TRANSFORMERS)


def tokens_of(spec: ModelSpec) -> Tensor:
    return torch.randint(spec.vocab_size, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(0))


def write(model: Decoder, directory: Path) -> Path:
    """The model as files for `transformers`."""
    architecture = architecture_of(model.spec)
    parameters = dict(model.named_parameters())
    tensors = {
        tensor.name: stored(tensor, parameters.__getitem__).clone().contiguous()
        for tensor in architecture.tensors(model.spec)
    }
    directory.mkdir()
    safetensors_torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(architecture.write(model.spec) | {"dtype": "float32"}))
    return directory


def load(directory: Path) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report  # nothing missing, left over, or of another shape
    return model.eval()


def read(spec: ModelSpec, directory: Path) -> dict[str, Tensor]:
    """Our parameters from files that `transformers` has written."""
    data: Mapping[str, Tensor] = safetensors_torch.load_file(directory / "model.safetensors")
    parameters = {p.name: torch.full(p.shape, torch.nan) for p in spec.parameters()}
    tensors = list(architecture_of(spec).tensors(spec))
    assert {tensor.name for tensor in tensors} == data.keys()
    for tensor in tensors:
        fill(tensor, data[tensor.name], parameters)
    return parameters


def build(spec: ModelSpec, parameters: Mapping[str, Tensor]) -> Decoder:
    with torch.device("meta"):
        model = Decoder(spec)
    model.to_empty(device="cpu")
    reset_buffers(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])
    return model


def assert_close(actual: Tensor, expected: Tensor, what: str = "logits") -> None:
    scale = expected.abs().max().item()
    assert scale > 0, what
    torch.testing.assert_close(
        actual, expected, rtol=1e-5, atol=1e-5 * max(scale, 1), msg=lambda text: f"{what}: {text}"
    )


def all_tensors(model: Any) -> Iterator[Tensor]:
    """All that is learned; a balancing bias is a buffer in `transformers`."""
    yield from model.parameters()
    yield from (buffer for name, buffer in model.named_buffers() if "correction_bias" in name)


@every_architecture
def test_transformers_computes_our_logits_from_our_weights(spec: ModelSpec, tmp_path: Path) -> None:
    model, tokens = scrambled(spec), tokens_of(spec)
    theirs = load(write(model, tmp_path / "ours"))
    with torch.no_grad():
        assert_close(theirs(tokens).logits, model.logits(model(tokens)))


@every_architecture
def test_we_compute_the_logits_of_transformers_from_its_weights(spec: ModelSpec, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(architecture_of(spec).write(spec)))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for tensor in all_tensors(theirs):
            tensor += 0.3 * torch.randn(tensor.shape)
    theirs.save_pretrained(tmp_path / "theirs")
    found = model_of(json.loads((tmp_path / "theirs" / "config.json").read_text()), spec.name)
    model = build(found, read(found, tmp_path / "theirs"))
    tokens = tokens_of(spec)
    with torch.no_grad():
        assert_close(model.logits(model(tokens)), theirs(tokens).logits)


@every_architecture
def test_gradients_of_all_parameters_are_those_of_transformers(spec: ModelSpec, tmp_path: Path) -> None:
    model, tokens = scrambled(spec), tokens_of(spec)
    theirs = load(write(model, tmp_path / "ours"))
    towards = torch.randn(2, NUM_TOKENS, spec.vocab_size, generator=torch.Generator().manual_seed(1))
    (theirs(tokens).logits * towards).sum().backward()
    (model.logits(model(tokens)) * towards).sum().backward()
    # Its parameters may be others than those in its files. So a model whose parameters are the gradients is written.
    for parameter in theirs.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    theirs.save_pretrained(tmp_path / "gradients")
    expected = read(spec, tmp_path / "gradients")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, expected[name], name)
