"""Mistral: Llama's parts, with a window in every layer or in none.

Read beside transformers' models/mistral (5.23)."""

from collections.abc import Iterator
from typing import Any

from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec, NormSpec, WindowSpec
from colossus.zoo.hugging_face.architecture import Architecture
from colossus.zoo.hugging_face.common import attention_fields, decoder_fields, dense, grouped, head_dim, heads
from colossus.zoo.hugging_face.fields import Fields
from colossus.zoo.hugging_face.rope import read_rope
from colossus.zoo.hugging_face.tables import ATTENTION, MLP, PRE_NORMS, decoder
from colossus.zoo.hugging_face.tensors import StoredTensor


def _read(fields: Fields, name: str) -> ModelSpec:
    fields.only("hidden_act", "silu")
    num_heads, num_kv_heads = heads(fields, 8)
    return ModelSpec(
        name=name,
        vocab_size=fields.integer("vocab_size", 32_000),
        context_tokens=fields.integer("max_position_embeddings", 131_072),
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=fields.integer("hidden_size"),
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim(fields, num_heads),
            rope=read_rope(fields),
            window=_window(fields),
        ),
        mlp=MlpSpec(intermediate_size=fields.integer("intermediate_size")),
        norm=NormSpec(epsilon=fields.positive("rms_norm_eps", 1e-6)),
        tied_embeddings=fields.truth("tie_word_embeddings", False),
        zero_init_outputs=False,
    )


def _window(fields: Fields) -> WindowSpec | None:
    """null is none; where nothing is said, it is the first release's."""
    if "sliding_window" in fields.values and not fields.has("sliding_window"):
        return None
    return WindowSpec(tokens=fields.integer("sliding_window", 4096))


def _write(model: ModelSpec) -> dict[str, Any]:
    attention = grouped(model)
    return {
        **decoder_fields(model),
        **attention_fields(attention),
        "intermediate_size": dense(model).intermediate_size,
        "hidden_act": "silu",
        "sliding_window": None if attention.window is None else attention.window.tokens,
    }


def _tensors(model: ModelSpec) -> Iterator[StoredTensor]:
    return decoder(model, (*ATTENTION, *MLP, *PRE_NORMS))


MISTRAL = Architecture("MistralForCausalLM", "mistral", _read, _write, _tensors)
