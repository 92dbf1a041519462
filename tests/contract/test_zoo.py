"""Contract 1 for the whole zoo: parameters and FLOPs of the built models are what their ModelSpec says."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from colossus import zoo
from colossus.models import Decoder
from colossus.spec.model import ModelSpec

MODELS = {name: zoo.find(name) for name in zoo.names()}


def on_meta(spec: ModelSpec) -> Decoder:
    with torch.device("meta"):
        return Decoder(spec)


@pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)
def test_names_shapes_and_order_of_parameters(spec: ModelSpec) -> None:
    """All layers of all models, however large: nothing is allocated on the meta device."""
    built = [(name, parameter.shape) for name, parameter in on_meta(spec).named_parameters()]
    assert [(parameter.name, parameter.shape) for parameter in spec.parameters()] == built
    assert spec.num_params() == sum(shape.numel() for _, shape in built)


ONE_OF_EACH = (
    "spark",
    "gpt2",
    "gpt3-6.7b",
    "llama2-7b",
    "llama3.2-1b",
    "smollm2-135m",
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "qwen3-30b-a3b",
    "olmo2-7b",
    "nemotron4-15b",
    "mistral-7b",
    "mixtral-8x7b",
    "dbrx",
    "gpt-oss-20b",
    "deepseek-v3",
    "kimi-k2",
    "grok-1",
    "grok-2",
)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_flops_of_a_forward_pass_are_what_torch_counts(name: str) -> None:
    """Real sizes, few layers: FLOPs are a sum over layers, and these have all kinds that there are."""
    spec = zoo.find(name)
    first = 0 if spec.first_layers is None else spec.first_layers.num_layers
    spec = spec.model_copy(update={"num_layers": first + 2})
    model, tokens = on_meta(spec), torch.zeros(2, 40, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.logits(model(tokens))
    assert counter.get_total_flops() == spec.forward_flops(2, 40)


def test_no_family_is_left_out() -> None:
    assert {zoo.family(name) for name in ONE_OF_EACH} == {zoo.family(name) for name in zoo.names()}
