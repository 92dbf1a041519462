"""Models to and from Hugging Face's config.json, and the tables of their tensors."""

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus import zoo
from colossus.errors import ConfigError
from colossus.spec.model import (
    AttentionSpec,
    Llama3Scaling,
    ModelSpec,
    RopeSpec,
    WindowSpec,
    YarnScaling,
)
from colossus.zoo.hugging_face import (
    ARCHITECTURES,
    architecture_in,
    architecture_of,
    model_of,
    quantization_in,
    safe_name,
)
from tests.zoo.hugging_face_models import BALANCED, LATENT, MODELS, NAMES, heads
from tests.zoo.published_configs import PUBLISHED

LADDER = ("spark", "candle", "lamp", "beacon", "lighthouse")
UNHELD = (*LADDER, "nemotron4-15b", "nemotron4-340b", "dbrx")


def _round_trip(model: ModelSpec) -> ModelSpec:
    """Through the text of a config.json."""
    config = json.loads(json.dumps(architecture_of(model).write(model)))
    assert architecture_in(config) is architecture_of(model)
    return model_of(config, model.name)


def _changed(model: ModelSpec, part: str, **changes: Any) -> ModelSpec:
    return model.model_copy(update={part: getattr(model, part).model_copy(update=changes)})


# --- configurations ---


@pytest.mark.parametrize("name", [name for name in zoo.names() if name not in UNHELD])
def test_every_model_of_the_zoo_there_and_back(name: str) -> None:
    model = zoo.find(name)
    assert _round_trip(model) == model
    num_elements = sum(math.prod(tensor.shape) for tensor in architecture_of(model).tensors(model))
    assert num_elements == model.num_params()


@pytest.mark.parametrize("name", UNHELD)
def test_models_that_no_architecture_holds(name: str) -> None:
    with pytest.raises(ConfigError, match="no Hugging Face architecture"):
        architecture_of(zoo.find(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_models_of_the_zoo(name: str) -> None:
    config, model = PUBLISHED[name], zoo.find(name)
    assert model_of(config, name) == model


@given(data=st.data(), name=st.sampled_from(sorted(MODELS)))
@settings(max_examples=150, deadline=None)
def test_variants_there_and_back(data: st.DataObject, name: str) -> None:
    model = MODELS[name]
    positive = st.integers(1, 5)
    changes: dict[str, Any] = {
        "vocab_size": data.draw(st.integers(1, 200_000)),
        "context_tokens": data.draw(st.integers(1, 10_000)),
        "num_layers": data.draw(st.integers(2, 9)),
        "tied_embeddings": data.draw(st.booleans()),
    }
    attention, mlp = model.attention, model.mlp
    if isinstance(attention, AttentionSpec):
        groups, kv_heads, half = data.draw(positive), data.draw(positive), data.draw(positive)
        if attention.rope is None or name == "grok-1":  # whose heads share the hidden size
            kv_heads = groups * kv_heads if attention.rope is None else kv_heads
            groups = 1 if attention.rope is None else groups
            changes["hidden_size"] = groups * kv_heads * 2 * half
        elif "llama" in name:
            changes["hidden_size"] = groups * kv_heads * data.draw(positive)
        shape = {"num_heads": groups * kv_heads, "num_kv_heads": kv_heads, "head_dim": 2 * half}
        attention = attention.model_copy(update=shape)
        if attention.rope is not None and not name.startswith("grok"):
            attention = attention.model_copy(update={"rope": data.draw(_ropes())})
    else:
        attention = attention.model_copy(
            update={
                "num_heads": data.draw(positive),
                "kv_lora_rank": data.draw(positive),
                "rope": data.draw(_ropes()),
            }
        )
        size = data.draw(positive)
        mlp = mlp.model_copy(
            update={
                "intermediate_size": size,
                "shared": mlp.shared.model_copy(update={"intermediate_size": size * data.draw(positive)}),
            }
        )
    epsilon = model.norm.epsilon if "deepseek" in name else data.draw(st.floats(1e-8, 1e-3))
    changes |= {
        "attention": attention,
        "mlp": mlp,
        "norm": model.norm.model_copy(update={"epsilon": epsilon}),
    }
    variant = ModelSpec.model_validate(model.model_copy(update=changes).model_dump())
    assert architecture_of(variant).name == NAMES[name]
    assert _round_trip(variant) == variant


def _ropes() -> st.SearchStrategy[RopeSpec]:
    factors, tokens = st.floats(1.5, 64), st.integers(1, 8192)
    llama3 = st.builds(
        Llama3Scaling,
        factor=factors,
        original_context_tokens=tokens,
        low_frequency_factor=st.floats(0.5, 2),
        high_frequency_factor=st.floats(3, 9),
    )
    yarn = st.builds(
        YarnScaling,
        factor=factors,
        original_context_tokens=tokens,
        beta_fast=st.floats(2, 40),
        magnitude=st.sampled_from([0.0, 0.25, 0.707, 1.0, 1.3]),
        whole_channels=st.booleans(),
    )
    return st.builds(RopeSpec, base=st.floats(2, 1e7), scaling=st.none() | llama3 | yarn)


# --- tables ---


def _numbered(model: ModelSpec) -> dict[str, Any]:
    """Every parameter, its elements numbered on through the model."""
    start = itertools.accumulate((p.num_elements for p in model.parameters()), initial=0)
    return {
        p.name: np.arange(first, first + p.num_elements).reshape(p.shape)
        for p, first in zip(model.parameters(), start, strict=False)
    }


def _stored(model: ModelSpec) -> dict[str, Any]:
    """What the tables make of it."""
    parameters, stored = _numbered(model), {}
    for tensor in architecture_of(model).tensors(model):
        assert tensor.name not in stored
        array = np.full(tensor.shape, -1)
        for part in tensor.parts:
            value = parameters[part.parameter]
            if part.expert is not None:
                value = value[part.expert]
            if part.rows is not None:
                value = np.take(value, part.rows, axis=max(value.ndim - 2, 0))
            if part.transposed:
                value = np.swapaxes(value, -1, -2)
            box = part.box or (slice(None),) * array.ndim
            assert (array[box] == -1).all(), "two parts share a place"
            array[box] = value
        stored[tensor.name] = array
    return stored


@pytest.mark.parametrize("name", MODELS)
def test_every_element_has_one_place_and_every_place_one_element(name: str) -> None:
    model = MODELS[name]
    stored = np.concatenate([array.ravel() for array in _stored(model).values()])
    assert sorted(stored) == list(range(model.num_params()))


def test_gpt2_stores_queries_keys_and_values_side_by_side() -> None:
    stored, ours = _stored(MODELS["gpt2"]), _numbered(MODELS["gpt2"])
    fused = stored["transformer.h.1.attn.c_attn.weight"]
    assert fused.shape == (12, 36)
    for i, part in enumerate(("query", "key", "value")):
        expected = ours[f"layers.1.attention.{part}.weight"].T
        assert (fused[:, 12 * i : 12 * (i + 1)] == expected).all()


def test_gpt_oss_alternates_gate_and_up() -> None:
    stored, ours = _stored(MODELS["gpt-oss"]), _numbered(MODELS["gpt-oss"])
    fused = stored["model.layers.2.mlp.experts.gate_up_proj"]  # (experts, hidden, 2 · intermediate)
    assert (fused[3, :, 1::2] == ours["layers.2.mlp.experts.up.weight"][3].T).all()
    assert (fused[3, :, 0] == ours["layers.2.mlp.experts.gate.weight"][3, 0]).all()


def test_deepseek_stores_the_two_channels_of_a_rotation_as_neighbours() -> None:
    stored, ours = _stored(MODELS["deepseek-v3"]), _numbered(MODELS["deepseek-v3"])
    query = stored["model.layers.0.self_attn.q_b_proj.weight"].reshape(3, 9, 8)  # heads, channels, rank
    expected = ours["layers.0.attention.query_up.weight"].reshape(3, 9, 8)
    assert (query[:, :5] == expected[:, :5]).all()
    # Channel i turns with channel i + 2 here, 2i with 2i + 1 there.
    assert (query[:, 5:] == expected[:, [5, 7, 6, 8]]).all()
    key = stored["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    expected = ours["layers.0.attention.key_value_down.weight"]
    assert (key[10:] == expected[[10, 12, 11, 13]]).all()


def test_names_and_shapes_of_grok_2() -> None:
    model = zoo.find("grok-2")
    stored = {tensor.name: tensor.shape for tensor in architecture_of(model).tensors(model)}
    for layer in (0, 63):
        at = f"model.layers.{layer}."
        assert stored[f"{at}self_attn.q_proj.weight"] == (8192, 8192)
        assert stored[f"{at}self_attn.k_proj.weight"] == (1024, 8192)
        assert stored[f"{at}block_sparse_moe.gate.weight"] == (8, 8192)
        assert stored[f"{at}block_sparse_moe.experts.7.w1.weight"] == (16_384, 8192)
        assert stored[f"{at}block_sparse_moe.experts.7.w2.weight"] == (8192, 16_384)
        assert stored[f"{at}mlp.gate_proj.weight"] == (32_768, 8192)
        assert stored[f"{at}mlp.down_proj.weight"] == (8192, 32_768)
        norms = {f"{at}{which}_norm.weight" for which in ("pre_attn", "post_attn", "pre_moe", "post_moe")}
        assert norms <= stored.keys()
    assert not any(name.startswith("model.layers.64.") for name in stored)
    assert stored["lm_head.weight"] == stored["model.embed_tokens.weight"] == (131_072, 8192)
    assert next(iter(stored)) == "model.embed_tokens.weight"
    assert list(stored)[-1] == "lm_head.weight"


def test_names_of_grok_1() -> None:
    model = MODELS["grok-1"]
    stored = [tensor.name for tensor in architecture_of(model).tensors(model)]
    assert stored[:5] == [
        "model.embed_tokens.weight",
        *(f"model.layers.0.attn.{part}_proj.weight" for part in "qkvo"),
    ]
    assert "model.layers.1.moe_block.experts.3.linear_v.weight" in stored
    assert stored[-1] == "model.norm.scale"
    ours, theirs = _numbered(model), _stored(model)
    gate = theirs["model.layers.1.moe_block.experts.3.linear.weight"]
    assert (gate == ours["layers.1.mlp.experts.gate.weight"][3]).all()
    canonical = architecture_of(model).canonical
    assert canonical("model.layers.1.pre_moe_norm.weight") == "model.layers.1.pre_moe_norm.scale"


def test_names_that_other_files_have() -> None:
    gpt2 = architecture_of(MODELS["gpt2"])
    assert gpt2.canonical("h.0.attn.c_attn.bias") == "transformer.h.0.attn.c_attn.bias"
    assert gpt2.ignored("h.0.attn.bias")
    assert gpt2.ignored("transformer.h.11.attn.masked_bias")
    assert gpt2.ignored("lm_head.weight")
    assert not gpt2.ignored("transformer.h.0.attn.c_attn.bias")
    llama = architecture_of(MODELS["llama"])
    assert llama.ignored("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not llama.ignored("model.layers.3.self_attn.q_proj.weight")
    deepseek = architecture_of(MODELS["deepseek-v3"])
    assert deepseek.ignored("model.layers.61.eh_proj.weight")
    assert deepseek.ignored("model.layers.3.eh_proj.weight", MODELS["deepseek-v3"])
    assert not deepseek.ignored("model.layers.4.mlp.gate.weight", MODELS["deepseek-v3"])


def test_windows_of_mistral() -> None:
    """null is none, and no such field is the first release's, as in transformers."""
    config = architecture_of(MODELS["mistral"]).write(MODELS["mistral"])
    assert model_of(config, "small") == MODELS["mistral"]
    none = model_of({**config, "sliding_window": None}, "small")
    assert none == _changed(MODELS["mistral"], "attention", window=None)
    assert architecture_of(none).name == "LlamaForCausalLM"  # of which it is one then
    unsaid = {key: value for key, value in config.items() if key != "sliding_window"}
    assert model_of(unsaid, "small").attention.window == WindowSpec(tokens=4096)


# --- refusals ---


def _refused(name: str, **changes: Any) -> str:
    """What is said of a config.json with some fields changed; None: without the field."""
    model = MODELS[name]
    config = {**architecture_of(model).write(model), **changes}
    with pytest.raises(ConfigError) as caught:
        model_of({key: value for key, value in config.items() if value is not None}, "changed")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_absurd_and_contradicting_numbers() -> None:
    assert "vocab_size is 1000000000000; more than 10,000,000" in _refused("llama", vocab_size=10**12)
    assert "vocab_size is missing" in _refused("llama", vocab_size=None)
    assert "hidden_size is -1" in _refused("llama", hidden_size=-1)
    assert "hidden_size is '12'; it must be a whole number" in _refused("llama", hidden_size="12")
    assert "num_attention_heads is true" in _refused("llama", num_attention_heads=True)
    assert "rms_norm_eps is nan" in _refused("llama", rms_norm_eps=math.nan)
    assert "4, but num_key_value_heads is 3" in _refused("qwen3", num_key_value_heads=3)
    assert "no multiple of num_attention_heads" in _refused("llama", hidden_size=13)
    assert "num_experts_per_tok is 5, but num_local_experts is 4" in _refused(
        "mixtral", num_experts_per_tok=5
    )
    assert "names 1 layers, but num_hidden_layers is 3" in _refused("gpt-oss", layer_types=["full_attention"])
    assert "n_embd is 13, no multiple of n_head" in _refused("gpt2", n_embd=13)
    assert "first_k_dense_replace is 3" in _refused("deepseek-v3", first_k_dense_replace=3)
    assert "n_group is 3" in _refused("deepseek-v3", n_group=3)
    assert "cannot choose 4" in _refused("deepseek-v3", num_experts_per_tok=4)
    assert "more than any model has" in _refused(
        "llama", hidden_size=2_000_000, intermediate_size=2_000_000, num_hidden_layers=9000
    )


def test_what_a_model_spec_cannot_say() -> None:
    assert "hidden_act is 'gelu'" in _refused("llama", hidden_act="gelu")
    assert "use_sliding_window is true" in _refused("qwen3", use_sliding_window=True)
    assert "use_sliding_window is true" in _refused("qwen2", use_sliding_window=True)
    assert "sliding_window is 0; it must be a whole number" in _refused("mistral", sliding_window=0)
    assert "some layers are dense" in _refused("qwen3-moe", decoder_sparse_step=2)
    assert "some layers are dense" in _refused("qwen3-moe", mlp_only_layers=[0])
    assert "no regular order" in _refused(
        "gpt-oss", layer_types=["full_attention", "sliding_attention", "full_attention"]
    )
    assert "chunked_attention" in _refused("gpt-oss", layer_types=["chunked_attention"] * 3)
    assert "rope_interleave is false" in _refused("deepseek-v3", rope_interleave=False)
    assert "scoring_func is 'softmax'" in _refused("deepseek-v3", scoring_func="softmax")
    assert "rms_norm_eps is 1e-05" in _refused("deepseek-v3", rms_norm_eps=1e-5)
    assert "scale_attn_by_inverse_layer_idx is true" in _refused("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert "attn_output_multiplier is 1" in _refused("grok-1", attn_output_multiplier=1.0)
    assert "rope_type is 'yarn_log'" in _refused("grok-2", rope_type="yarn_log")


def test_rope_scalings() -> None:
    old = {"rope_parameters": None}
    assert "rope_type is 'longrope'" in _refused("llama", rope_scaling={"type": "longrope"}, **old)
    assert "rope_parameters must agree" not in _refused("llama", rope_scaling="yarn")
    assert "rope_scaling is 'yarn'; it must be a table" in _refused("llama", rope_scaling="yarn")
    assert "factor is missing" in _refused(
        "llama-tied-scaled",
        rope_scaling={"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4},
        **old,
    )
    assert "factor is 0.5; it must be a number of at least 1" in _refused(
        "llama", rope_scaling={"rope_type": "yarn", "factor": 0.5}, **old
    )
    assert "they must agree" in _refused("llama-yarn", rope_scaling={"rope_type": "yarn", "factor": 2.0})
    assert "rope_theta outside it is 77" in _refused("llama", rope_theta=77, rope_scaling=None)
    yarn = {"rope_type": "yarn", "factor": 2.0}
    assert "Groks without any" in _refused("grok-1", rope_scaling=yarn, **old)
    assert "partial_rotary_factor is 0.5" in _refused("llama", partial_rotary_factor=0.5)
    unequal = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    assert "mscale is 1 and mscale_all_dim 0.5" in _refused("deepseek-v3", rope_scaling=unequal, **old)


def test_unknown_architectures() -> None:
    with pytest.raises(
        ConfigError, match=r"'LlamaForCasualLM', unknown to Colossus\. Did you mean 'LlamaForCausalLM'"
    ):
        model_of({"architectures": ["LlamaForCasualLM"]}, "x")
    with pytest.raises(
        ConfigError, match=r"does not read NemotronForCausalLM: it stores the weights of its norms less 1"
    ):
        model_of({"architectures": ["NemotronForCausalLM"]}, "x")
    for wrong in ({}, {"architectures": []}, {"architectures": "LlamaForCausalLM"}, {"architectures": [3]}):
        with pytest.raises(ConfigError, match=r"not a model's config\.json"):
            model_of(wrong, "x")
    assert model_of({**PUBLISHED["gpt2"], "architectures": None}, "gpt2") == zoo.find("gpt2")
    assert quantization_in(PUBLISHED["gpt-oss-20b"]) == "mxfp4"
    assert quantization_in(PUBLISHED["gpt2"]) is None


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            _changed(MODELS["llama"], "attention", window=WindowSpec(tokens=4, full_every=2)),
            r"attention\.window = none \(here set\)",
        ),
        (
            _changed(MODELS["qwen2"], "attention", window=WindowSpec(tokens=4)),
            r"attention\.bias = none \(here 'qkv'\)",
        ),
        (
            _changed(MODELS["llama"], "attention", score_soft_cap=30.0),
            r"score_soft_cap = none \(here 30\.0\)",
        ),
        (
            _changed(MODELS["llama"], "mlp", activation="geglu"),
            r"mlp\.activation = 'swiglu' \(here 'geglu'\)",
        ),
        (_changed(MODELS["llama"], "attention", rope=None), r"attention\.rope"),
        (_changed(MODELS["gpt2"], "norm", bias=False), r"norm\.bias = true \(here false\)"),
        (_changed(MODELS["olmo2"], "norm", weighted=False), r"Olmo2ForCausalLM.*norm\.weighted"),
        (
            _changed(MODELS["deepseek-v3"], "norm", epsilon=1e-5),
            "DeepseekV3ForCausalLM: there, rms_norm_eps is 1e-05",
        ),
        (MODELS["grok-2"].model_copy(update={"embedding_norm": True}), "a norm of the embeddings"),
        (
            MODELS["qwen3"].model_copy(update={"logit_multiplier": 0.5}),
            r"logit_multiplier = 1\.0 \(here 0\.5\)",
        ),
        (
            MODELS["deepseek-v3"].model_copy(update={"mlp": BALANCED.model_copy(update={"shared": None})}),
            "mlp.shared must be a whole number",
        ),
        (
            MODELS["llama"].model_copy(update={"attention": LATENT}),
            "holds small",
        ),
        (
            _changed(MODELS["grok-2"], "attention", window=WindowSpec(tokens=9)),
            r"Grok1ForCausalLM.*window",
        ),
        (
            MODELS["llama"].model_copy(
                update={"attention": heads(head_dim=8, rope=RopeSpec(rotated_fraction=0.5))}
            ),
            "rotated",
        ),
    ],
)
def test_models_that_would_lose_something_are_refused(model: ModelSpec, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        architecture_of(model)
    assert "\n" not in str(caught.value)


JUNK = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        10**9,
        10**30,
        10**400,
        0.5,
        -2.0,
        1e308,
        math.nan,
        math.inf,
        "",
        "yarn",
        "x" * 5000,
        [],
        [1],
        {},
    ]
) | st.just({"rope_type": "yarn", "factor": 1e308, "mscale": 1e308, "mscale_all_dim": 1e308})


@given(name=st.sampled_from(sorted(MODELS)), data=st.data())
@settings(max_examples=400, deadline=None)
def test_whatever_a_config_holds_gives_a_model_or_a_sentence(name: str, data: st.DataObject) -> None:
    model = MODELS[name]
    config = copy.deepcopy(architecture_of(model).write(model))
    for _ in range(data.draw(st.integers(1, 3))):
        table = config
        inner = [key for key, value in config.items() if isinstance(value, dict) and value]
        if inner and data.draw(st.booleans()):
            table = config[data.draw(st.sampled_from(inner))]
        key = data.draw(st.sampled_from(sorted(table)))
        table[key] = data.draw(JUNK)
    said, read = "", None
    try:
        read = model_of(config, "junk")
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 500
    if read is not None:
        assert read.num_params() > 0
        assert len(read.layer_groups()) > 0


# --- files ---


def test_a_directory_with_a_config_is_a_model(tmp_path: Path) -> None:
    directory = tmp_path / "My Model (v2)"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(PUBLISHED["grok-2"]))
    assert zoo.load(directory) == zoo.load(directory / "config.json")
    assert zoo.load(directory) == zoo.find("grok-2").model_copy(update={"name": "My-Model-v2"})
    with pytest.raises(ConfigError, match=r"a directory without config\.json"):
        zoo.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not a JSON file"),
        ("[]", "must be a table of fields"),
        ("[" * 100_000, "nested too deeply"),
        ('{"architectures": ["LlamaForCausalLM"], "vocab_size": ' + "9" * 5000 + "}", "is not a JSON file"),
        ('{"architectures": ["LlamaForCausalLM"]}', r"LlamaForCausalLM: num_attention_heads is missing"),
    ],
)
def test_files_that_are_no_config(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        zoo.load(tmp_path)
    if said != "must be a table of fields":
        with pytest.raises(ConfigError):
            zoo.load(tmp_path / "config.json")


def test_names_are_made_safe() -> None:
    assert safe_name("../../etc/passwd") == "etc-passwd"
    assert safe_name("...") == "model"
    assert safe_name("meta-llama/Llama-3.1-8B") == "meta-llama-Llama-3.1-8B"


def test_architectures_have_names_of_their_own() -> None:
    assert len({one.name for one in ARCHITECTURES}) == len(ARCHITECTURES)
    assert {NAMES[name] for name in NAMES} == {one.name for one in ARCHITECTURES}
