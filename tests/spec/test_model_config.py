"""Models with parts of several kinds, as configurations spell them."""

import pytest

from colossus import zoo
from colossus.errors import ConfigError
from colossus.spec.config import from_toml, override, to_toml
from colossus.spec.model import (
    AttentionSpec,
    LatentAttentionSpec,
    LayerNormSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
)
from tests.spec.configs import small_config

WRITTEN_BEFORE_THERE_WERE_KINDS = """
name = "old"
[model]
name = "old"
vocab_size = 512
context_tokens = 64
num_layers = 2
hidden_size = 32
[model.attention]
num_heads = 2
num_kv_heads = 1
head_dim = 15
rope = false
[model.mlp]
intermediate_size = 64
activation = "gelu"
[model.norm]
weighted = false
[data.tokenizer]
kind = "bpe"
vocab_size = 512
[batch]
sequences = 4
sequence_tokens = 64
[budget]
amount = 10
unit = "steps"
"""


def test_parts_without_a_kind_are_what_they_were() -> None:
    model = from_toml(WRITTEN_BEFORE_THERE_WERE_KINDS).model
    assert model.attention == AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=15, rope=None)
    assert model.mlp == MlpSpec(intermediate_size=64, activation="gelu")
    assert model.norm == NormSpec(weighted=False)


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_of_the_zoo_as_toml_and_json(name: str) -> None:
    model = zoo.find(name)
    config = small_config().model_copy(update={"model": model})
    assert from_toml(to_toml(config)).model == model
    assert ModelSpec.model_validate_json(model.model_dump_json()) == model


def test_a_part_becomes_one_of_another_kind() -> None:
    latent = ["num_heads=2", "kv_lora_rank=8", "nope_head_dim=4", "rope_head_dim=2", "value_head_dim=4"]
    changed = override(
        small_config(),
        [
            "model.mlp.kind=moe",
            "model.mlp.num_experts=4",
            "model.mlp.top_k=2",
            "model.mlp.intermediate_size=16",
            "model.norm.kind=layer",
            "model.attention.kind=latent",
            *(f"model.attention.{setting}" for setting in latent),
        ],
    ).model
    assert changed.mlp == MoeSpec(num_experts=4, top_k=2, intermediate_size=16)
    assert changed.norm == LayerNormSpec()
    assert isinstance(changed.attention, LatentAttentionSpec)
    assert changed.attention.head_dim == 6


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("model.mlp.kind=mo", "model.mlp.kind is 'mo'; valid: 'dense', 'moe'"),
        ("model.mlp.num_experts=4", "It belongs to model.mlp.kind = 'moe'"),
        ("model.mlp=3", "model.mlp is 3; it must be a table"),
        ("model.attention.kv_lora_rank=4", "It belongs to model.attention.kind = 'latent'"),
        ("model.attention.head_dim=0", "model.attention.head_dim is 0; it must be above 0"),
        ("model.norm_placement=before", "model.norm_placement is 'before'; valid: 'pre', 'post' or 'sandwich'"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(setting: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(small_config(), [setting])
    assert sentence in str(caught.value)
