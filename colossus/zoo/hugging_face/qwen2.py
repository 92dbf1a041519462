"""Qwen2 and 2.5, dense: Llama's parts, with biases of queries, keys and values.

Read beside transformers' models/qwen2 (5.23)."""

from collections.abc import Iterator
from typing import Any

from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec
from colossus.zoo.hugging_face.architecture import Architecture
from colossus.zoo.hugging_face.common import (
    attention_fields,
    decoder_fields,
    dense,
    grouped,
    head_dim,
    heads,
    no_window,
    read_decoder_fields,
)
from colossus.zoo.hugging_face.fields import Fields
from colossus.zoo.hugging_face.rope import read_rope
from colossus.zoo.hugging_face.tables import ATTENTION, MLP, PRE_NORMS, decoder
from colossus.zoo.hugging_face.tensors import StoredTensor


def _read(fields: Fields, name: str) -> ModelSpec:
    fields.only("hidden_act", "silu")
    no_window(fields)
    num_heads, num_kv_heads = heads(fields, 32)
    return ModelSpec(
        name=name,
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim(fields, num_heads),
            rope=read_rope(fields),
            bias="qkv",
        ),
        mlp=MlpSpec(intermediate_size=fields.integer("intermediate_size")),
        **read_decoder_fields(fields, context=32_768, epsilon=1e-6),
    )


def _write(model: ModelSpec) -> dict[str, Any]:
    return {
        **decoder_fields(model),
        **attention_fields(grouped(model)),
        "intermediate_size": dense(model).intermediate_size,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": model.num_layers,
    }


def _tensors(model: ModelSpec) -> Iterator[StoredTensor]:
    return decoder(model, (*ATTENTION, *MLP, *PRE_NORMS))


QWEN2 = Architecture("Qwen2ForCausalLM", "qwen2", _read, _write, _tensors)
