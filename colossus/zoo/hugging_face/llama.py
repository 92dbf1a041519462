"""Llama 2 to 3.2, and SmolLM2, whose files say that they are Llamas.

Read beside transformers' models/llama (5.23)."""

from collections.abc import Iterator
from typing import Any

from colossus.errors import ConfigError
from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec
from colossus.zoo.hugging_face.architecture import Architecture
from colossus.zoo.hugging_face.common import (
    attention_fields,
    decoder_fields,
    dense,
    grouped,
    head_dim,
    heads,
    read_decoder_fields,
)
from colossus.zoo.hugging_face.fields import Fields
from colossus.zoo.hugging_face.rope import read_rope
from colossus.zoo.hugging_face.tables import ATTENTION, MLP, PRE_NORMS, decoder
from colossus.zoo.hugging_face.tensors import StoredTensor


def _read(fields: Fields, name: str) -> ModelSpec:
    fields.only("hidden_act", "silu")
    num_heads, num_kv_heads = heads(fields)
    if fields.integer("hidden_size") % num_heads:
        raise ConfigError(
            f"hidden_size is {fields.integer('hidden_size')}, no multiple of num_attention_heads, {num_heads}; "
            f"transformers refuses such a Llama"
        )
    return ModelSpec(
        name=name,
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim(fields, num_heads),
            rope=read_rope(fields),
            bias="all" if fields.truth("attention_bias", False) else None,
        ),
        mlp=MlpSpec(
            intermediate_size=fields.integer("intermediate_size"), bias=fields.truth("mlp_bias", False)
        ),
        **read_decoder_fields(fields, context=2048, epsilon=1e-6),
    )


def _write(model: ModelSpec) -> dict[str, Any]:
    mlp = dense(model)
    return {
        **decoder_fields(model),
        **attention_fields(grouped(model)),
        "intermediate_size": mlp.intermediate_size,
        "hidden_act": "silu",
        "attention_bias": grouped(model).bias is not None,
        "mlp_bias": mlp.bias,
    }


def _tensors(model: ModelSpec) -> Iterator[StoredTensor]:
    return decoder(model, (*ATTENTION, *MLP, *PRE_NORMS))


LLAMA = Architecture("LlamaForCausalLM", "llama", _read, _write, _tensors)
