"""Qwen2 and 2.5, dense: Llama's parts, with biases of queries, keys and values.

Read beside transformers' models/qwen2 (5.23)."""

from collections.abc import Iterator
from typing import Any

from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec, NormSpec
from colossus.zoo.hugging_face.architecture import Architecture
from colossus.zoo.hugging_face.common import (
    attention_fields,
    decoder_fields,
    dense,
    grouped,
    head_dim,
    heads,
    no_window,
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
        vocab_size=fields.integer("vocab_size"),
        context_tokens=fields.integer("max_position_embeddings", 32_768),
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=fields.integer("hidden_size"),
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim(fields, num_heads),
            rope=read_rope(fields),
            bias="qkv",
        ),
        mlp=MlpSpec(intermediate_size=fields.integer("intermediate_size")),
        norm=NormSpec(epsilon=fields.positive("rms_norm_eps", 1e-6)),
        tied_embeddings=fields.truth("tie_word_embeddings", False),
        zero_init_outputs=False,
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
