"""The decoder refuses what it cannot build, and names it."""

from typing import Any

import pytest
import torch

from colossus import zoo
from colossus.errors import ConfigError
from colossus.models import Decoder
from colossus.spec.model import (
    AttentionSpec,
    FirstLayers,
    LatentAttentionSpec,
    LayerNormSpec,
    MlpSpec,
    MoeSpec,
    RopeSpec,
    WindowSpec,
    YarnScaling,
)
from tests.helpers import tiny

LATENT = LatentAttentionSpec(
    num_heads=2, kv_lora_rank=4, nope_head_dim=2, rope_head_dim=2, value_head_dim=3
)  # fmt: skip


def attention(**changes: Any) -> AttentionSpec:
    return AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=8, **changes)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"attention": LATENT}, "no latent attention"),
        ({"mlp": MoeSpec(num_experts=4, top_k=2, intermediate_size=8)}, "no mixture of experts"),
        ({"first_layers": FirstLayers(num_layers=1, mlp=MlpSpec(intermediate_size=8))}, "first_layers"),
        ({"mlp": MlpSpec(intermediate_size=8, bias=True)}, "mlp.bias"),
        ({"mlp": MlpSpec(intermediate_size=8, activation="clamped_swiglu")}, "clamped_swiglu"),
        ({"norm": LayerNormSpec()}, "no LayerNorm"),
        ({"norm_placement": "post"}, "norm_placement = 'post'"),
        ({"learned_positions": True}, "learned positions"),
        ({"embedding_multiplier": 2.0}, "embedding_multiplier"),
        ({"logit_multiplier": 2.0}, "logit_multiplier"),
        ({"attention": attention(bias="qkv")}, "attention.bias"),
        ({"attention": attention(sinks=True)}, "attention sinks"),
        ({"attention": attention(window=WindowSpec(tokens=4))}, "sliding window"),
        ({"attention": attention(score_soft_cap=30.0)}, "attention.score_soft_cap"),
        ({"attention": attention(score_temperature_tokens=8)}, "attention.score_temperature_tokens"),
        ({"attention": attention(qk_norm=True, qk_norm_weights="head")}, "attention.qk_norm_weights"),
        ({"attention": attention(rope=RopeSpec(rotated_fraction=0.5))}, "attention.rope.rotated_fraction"),
        (
            {"attention": attention(rope=RopeSpec(scaling=YarnScaling(factor=2.0, original_context_tokens=8)))},
            "attention.rope.scaling.kind = 'yarn'",
        ),
    ],
)  # fmt: skip
def test_parts_that_are_not_there_yet(changes: dict[str, Any], part: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError) as caught:
        Decoder(tiny(**changes))
    assert part in str(caught.value)
    assert str(caught.value).startswith("the decoder cannot build tiny yet: it has no ")


def test_models_of_the_zoo_are_built_or_refused_whole() -> None:
    """Never a model of other parameters than the table says."""
    built = []
    for name in zoo.names():
        try:
            with torch.device("meta"):
                model = Decoder(zoo.find(name))
        except ConfigError:
            continue
        shapes = {parameter_name: tuple(p.shape) for parameter_name, p in model.named_parameters()}
        assert shapes == {p.name: p.shape for p in zoo.find(name).parameters()}
        built.append(name)
    assert {"spark", "lighthouse", "llama2-7b", "llama3-70b", "smollm2-135m"} <= set(built)
