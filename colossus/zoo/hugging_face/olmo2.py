"""OLMo 2: norms after attention and MLP, and of all heads' queries and keys together.

Read beside transformers' models/olmo2 (5.23)."""

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
    read_decoder_fields,
)
from colossus.zoo.hugging_face.fields import Fields
from colossus.zoo.hugging_face.rope import read_rope
from colossus.zoo.hugging_face.tables import ATTENTION, MLP, decoder, row
from colossus.zoo.hugging_face.tensors import StoredTensor

_NORMS = (
    row("post_attention_layernorm.weight", "attention_output_norm.weight"),
    row("post_feedforward_layernorm.weight", "mlp_output_norm.weight"),
)


def _read(fields: Fields, name: str) -> ModelSpec:
    fields.only("hidden_act", "silu")
    num_heads, num_kv_heads = heads(fields)
    return ModelSpec(
        name=name,
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim(fields, num_heads),
            rope=read_rope(fields),
            qk_norm=True,
            qk_norm_weights="all_heads",
            bias="all" if fields.truth("attention_bias", False) else None,
        ),
        mlp=MlpSpec(intermediate_size=fields.integer("intermediate_size")),
        norm_placement="post",
        **read_decoder_fields(fields, context=2048, epsilon=1e-5),
    )


def _write(model: ModelSpec) -> dict[str, Any]:
    attention = grouped(model)
    return {
        **decoder_fields(model),
        **attention_fields(attention),
        "intermediate_size": dense(model).intermediate_size,
        "hidden_act": "silu",
        "attention_bias": attention.bias is not None,
    }


def _tensors(model: ModelSpec) -> Iterator[StoredTensor]:
    return decoder(model, (*ATTENTION, *MLP, *_NORMS))


OLMO2 = Architecture("Olmo2ForCausalLM", "olmo2", _read, _write, _tensors)
