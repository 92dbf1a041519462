"""What a ModelSpec says of a model, and what the built model is."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from colossus.models import Decoder, build, chunked_cross_entropy
from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec, RopeSpec
from colossus.zoo.ladder import RUNGS, ladder
from tests.helpers import VARIETIES, random_tokens

MODELS = VARIETIES | {name: ladder(name) for name in RUNGS}

every_model = pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)
every_tiny_model = pytest.mark.parametrize("spec", VARIETIES.values(), ids=VARIETIES)


def on_meta(spec: ModelSpec) -> Decoder:
    with torch.device("meta"):
        return Decoder(spec)


def published(
    name: str, vocab_size: int, layers: int, hidden: int, heads: int, kv_heads: int, inner: int
) -> ModelSpec:
    return ModelSpec(
        name=name,
        vocab_size=vocab_size,
        context_tokens=2048,
        num_layers=layers,
        hidden_size=hidden,
        attention=AttentionSpec(
            num_heads=heads, num_kv_heads=kv_heads, head_dim=hidden // heads, rope=RopeSpec(base=5e5)
        ),
        mlp=MlpSpec(intermediate_size=inner),
    )


@every_model
def test_names_shapes_and_order_of_parameters(spec: ModelSpec) -> None:
    built = [(name, tuple(parameter.shape)) for name, parameter in on_meta(spec).named_parameters()]
    assert [(parameter.name, parameter.shape) for parameter in spec.parameters()] == built


@every_model
def test_number_of_parameters(spec: ModelSpec) -> None:
    assert spec.num_params() == sum(parameter.numel() for parameter in on_meta(spec).parameters())


@pytest.mark.parametrize(
    ("spec", "num_params"),
    [
        (published("llama-3-8b", 128_256, 32, 4096, 32, 8, 14_336), 8_030_261_248),
        (published("llama-2-7b", 32_000, 32, 4096, 32, 32, 11_008), 6_738_415_616),
        (published("tinyllama", 32_000, 22, 2048, 32, 4, 5632), 1_100_048_384),
    ],
    ids=lambda value: value.name if isinstance(value, ModelSpec) else "",
)
def test_published_models_have_their_published_size(spec: ModelSpec, num_params: int) -> None:
    assert spec.num_params() == num_params


def test_bytes() -> None:
    llama = published("llama-3-8b", 128_256, 32, 4096, 32, 8, 14_336)
    assert llama.kv_cache_bytes_per_token("bfloat16") == 128 * 1024
    assert llama.weight_bytes("bfloat16") * 2 == llama.weight_bytes("float32") == 4 * 8_030_261_248


@every_model
def test_flops_of_a_forward_pass_are_what_torch_counts(spec: ModelSpec) -> None:
    model = on_meta(spec)
    tokens = torch.zeros(2, spec.context_tokens, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.logits(model(tokens))
    assert counter.get_total_flops() == spec.forward_flops(2, spec.context_tokens)


@every_tiny_model
def test_flops_on_a_real_device(spec: ModelSpec) -> None:
    model = build(spec, seed=0)
    with FlopCounterMode(display=False) as counter:
        model.logits(model(random_tokens(spec, 3, 11)))
    assert counter.get_total_flops() == spec.forward_flops(3, 11)


@every_tiny_model
def test_a_training_step_costs_three_forward_passes(spec: ModelSpec) -> None:
    """Every matmul, also those of attention, has two in the backward pass; the loss computes none twice."""
    model = build(spec, seed=0)
    tokens = random_tokens(spec, 3, 11)
    with FlopCounterMode(display=False) as counter:
        hidden = model(tokens).flatten(0, 1)
        chunked_cross_entropy(
            hidden, model.head_weight, tokens.flatten(), chunk_tokens=5, soft_cap=spec.logit_soft_cap
        )[0].backward()
    assert counter.get_total_flops() == 3 * spec.forward_flops(3, 11)


@every_model
def test_model_flops_count_only_the_pairs_that_attention_uses(spec: ModelSpec) -> None:
    tokens = 12
    attention, pairs = spec.attention, [(query, key) for query in range(tokens) for key in range(tokens)]
    used_pairs = 0
    for layer in range(spec.num_layers):
        window = attention.window
        sees_all = window is None or (window.full_every is not None and (layer + 1) % window.full_every == 0)
        reach = tokens if sees_all else window.tokens
        used_pairs += sum(1 for query, key in pairs if query - reach < key <= query)
    # The product of query and key, and the value's share: heads of latent attention have narrower values.
    per_pair = 2 * attention.num_heads * (attention.head_dim + attention.value_head_dim)
    unused = 3 * per_pair * (spec.num_layers * tokens**2 - used_pairs)
    assert tokens * spec.flops_per_token(tokens) == 3 * spec.forward_flops(1, tokens) - unused
