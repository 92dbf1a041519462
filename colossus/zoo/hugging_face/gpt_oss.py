"""gpt-oss: all experts of a layer in one tensor, stored (inputs, outputs), gate and up channels taking turns.

Weights in bfloat16 or float32; the releases of openai themselves hold experts in MXFP4. Read beside transformers'
models/gpt_oss (5.23)."""

from collections.abc import Iterator
from typing import Any

from colossus.errors import ConfigError
from colossus.spec.model import (
    AttentionSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RopeSpec,
    RouterSpec,
    WindowSpec,
    YarnScaling,
)
from colossus.zoo.hugging_face.architecture import Architecture
from colossus.zoo.hugging_face.common import (
    attention_fields,
    decoder_fields,
    experts,
    grouped,
    heads,
    layer_types,
    moe,
)
from colossus.zoo.hugging_face.fields import Fields, shown
from colossus.zoo.hugging_face.rope import read_rope
from colossus.zoo.hugging_face.tables import ATTENTION, PRE_NORMS, Row, decoder, row
from colossus.zoo.hugging_face.tensors import StoredTensor

_GATE_UP = ("mlp.experts.gate", "mlp.experts.up")
_LAYER = (
    row("self_attn.sinks", "attention.sinks"),
    *ATTENTION,
    row("mlp.router.weight", "mlp.router.weight"),
    row("mlp.router.bias", "mlp.router.bias"),
    Row(
        "mlp.experts.gate_up_proj",
        tuple(f"{part}.weight" for part in _GATE_UP),
        transposed=True,
        alternating=True,
    ),
    Row("mlp.experts.gate_up_proj_bias", tuple(f"{part}.bias" for part in _GATE_UP), alternating=True),
    Row("mlp.experts.down_proj", ("mlp.experts.down.weight",), transposed=True),
    row("mlp.experts.down_proj_bias", "mlp.experts.down.bias"),
    *PRE_NORMS,
)
_DEFAULT_ROPE = RopeSpec(
    base=150_000.0,
    scaling=YarnScaling(factor=32.0, original_context_tokens=4096, whole_channels=False),
)


def _read(fields: Fields, name: str) -> ModelSpec:
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", True, default=True)
    fields.only("swiglu_alpha", 1.702)
    if fields.number("swiglu_limit", 7.0) != 7:
        raise ConfigError(
            f"swiglu_limit is {fields.number('swiglu_limit'):g}; Colossus clamps this activation at 7"
        )
    num_heads, num_kv_heads = heads(fields, 8)
    num_experts, top_k = experts(fields, "num_local_experts", 4)
    said = fields.has("rope_parameters") or fields.has("rope_scaling")
    return ModelSpec(
        name=name,
        vocab_size=fields.integer("vocab_size"),
        context_tokens=fields.integer("max_position_embeddings", 131_072),
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=fields.integer("hidden_size"),
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=fields.integer("head_dim", 64),
            rope=read_rope(fields, default_base=150_000.0) if said else _DEFAULT_ROPE,
            window=_window(fields),
            sinks=True,
            bias="all",
        ),
        mlp=MoeSpec(
            num_experts=num_experts,
            top_k=top_k,
            intermediate_size=fields.integer("intermediate_size"),
            activation="clamped_swiglu",
            bias=True,
            router=RouterSpec(bias=True),
        ),
        norm=NormSpec(epsilon=fields.positive("rms_norm_eps", 1e-5)),
        tied_embeddings=fields.truth("tie_word_embeddings", False),
        zero_init_outputs=False,
    )


def _window(fields: Fields) -> WindowSpec | None:
    """Layers with a window, as `layer_types` names them; every other one, the first among them, if it does not."""
    kinds = layer_types(fields)
    if kinds is None:
        return WindowSpec(tokens=fields.integer("sliding_window", 128), full_every=2)
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ConfigError(
            f"layer_types has {shown(min(unknown))}; Colossus knows sliding_attention and full_attention"
        )
    if "sliding_attention" not in kinds:
        return None
    full = kinds.index("full_attention") + 1 if "full_attention" in kinds else None
    tokens = fields.integer("sliding_window", 128)
    if full is None or full >= 2:
        window = WindowSpec(tokens=tokens, full_every=full)
        if kinds == _layer_types(window, len(kinds)):
            return window
    raise ConfigError(
        "layer_types has windows in no regular order; Colossus can read it where every so many-th layer sees all"
    )


def _layer_types(window: WindowSpec | None, num_layers: int) -> tuple[str, ...]:
    return tuple(
        "sliding_attention" if window is not None and window.in_layer(i) else "full_attention"
        for i in range(num_layers)
    )


def _write(model: ModelSpec) -> dict[str, Any]:
    mlp, attention = moe(model), grouped(model)
    return {
        **decoder_fields(model),
        **attention_fields(attention),
        "attention_bias": True,
        "sliding_window": None if attention.window is None else attention.window.tokens,
        "layer_types": list(_layer_types(attention.window, model.num_layers)),
        "intermediate_size": mlp.intermediate_size,
        "num_local_experts": mlp.num_experts,
        "num_experts_per_tok": mlp.top_k,
        "experts_per_token": mlp.top_k,
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        "output_router_logits": False,
    }


def _tensors(model: ModelSpec) -> Iterator[StoredTensor]:
    return decoder(model, _LAYER)


GPT_OSS = Architecture("GptOssForCausalLM", "gpt_oss", _read, _write, _tensors)
