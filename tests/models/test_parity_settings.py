"""The zoo's own settings of positions against `transformers`, and Nemotron-4, which no table of tensors holds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from colossus import zoo
from colossus.models import Decoder
from colossus.models.positions import frequencies, score_multiplier
from colossus.spec.model import LatentAttentionSpec, ModelSpec
from colossus.zoo.hugging_face import architecture_of
from tests.helpers import scrambled

transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")


def config_of(spec: ModelSpec, directory: Path) -> Any:
    (directory / "config.json").write_text(json.dumps(architecture_of(spec).write(spec)))
    return transformers.AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize(
    "name", ["llama3.1-8b", "llama3.2-1b", "gpt-oss-20b", "gpt-oss-120b", "deepseek-v3", "kimi-k2"]
)
def test_stretched_rotations_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    spec = zoo.find(name)
    config = config_of(spec, tmp_path)
    kind = config.rope_parameters["rope_type"]
    assert kind in ("llama3", "yarn")
    expected, of_rotation = rope_utils.ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    latent = isinstance(spec.attention, LatentAttentionSpec)
    num_channels = spec.attention.rope_head_dim if latent else spec.attention.head_dim
    ours = frequencies(spec.attention.rope, num_channels)
    assert ours.dtype == torch.float64
    # There they are made in float32. Interpolation between channels loses some digits.
    torch.testing.assert_close(ours.float(), expected.float(), rtol=3e-6, atol=0)

    # It multiplies rotated queries and keys, each once; in DeepSeek's models it multiplies scores.
    theirs = of_rotation**2
    if latent:
        config.num_hidden_layers, config.vocab_size, config.n_routed_experts = 1, 16, 8
        with torch.device("meta"):
            built = transformers.AutoModelForCausalLM.from_config(config)
        scale = built.model.layers[0].self_attn.scaling
        theirs *= scale * spec.attention.head_dim**0.5
        with torch.device("meta"):
            one_layer = Decoder(spec.model_copy(update={"num_layers": 2, "vocab_size": 16}))
        assert one_layer.layers[0].attention.scale == pytest.approx(scale, rel=1e-6)
    assert score_multiplier(spec.attention.rope) == pytest.approx(theirs, rel=1e-6)


NEMOTRON = {
    "embedding.weight": "model.embed_tokens.weight",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "final_norm": "model.norm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "head.weight": "lm_head.weight",
}
"""Our names and its, for parts of names."""


def test_nemotron() -> None:
    """LayerNorm, squared ReLU, and rotations of half of a head's channels."""
    published = zoo.find("nemotron4-15b")
    attention = published.attention.model_copy(update={"num_heads": 4, "num_kv_heads": 2, "head_dim": 8})
    sizes = {"num_layers": 2, "hidden_size": 32, "vocab_size": 50, "attention": attention}
    spec = published.model_copy(
        update={**sizes, "mlp": published.mlp.model_copy(update={"intermediate_size": 40})}
    )
    model = scrambled(spec)
    config = transformers.NemotronConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=spec.attention.rope.base,
        partial_rotary_factor=spec.attention.rope.rotated_fraction,
        norm_eps=spec.norm.epsilon,
        hidden_act="relu2",
    )
    theirs = transformers.NemotronForCausalLM._from_config(config, attn_implementation="eager").eval()
    parameters = dict(theirs.named_parameters())

    def their_name(name: str) -> str:
        for our_part, their_part in NEMOTRON.items():
            name = name.replace(our_part, their_part)
        return f"model.{name}" if name.startswith("layers.") else name

    assert {their_name(name) for name, _ in model.named_parameters()} == parameters.keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Its norms multiply by 1 more than their weights.
            less = 1 if name.endswith("norm.weight") else 0
            parameters[their_name(name)].copy_(parameter - less)
    tokens = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))
    logits, expected = model.logits(model(tokens)), theirs(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (logits * towards).sum().backward()
    (expected * towards).sum().backward()
    for name, parameter in model.named_parameters():
        gradient = parameters[their_name(name)].grad
        scale = gradient.abs().max().item()
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5 * max(scale, 1))
