"""GPT-2, and GPT-3 and others of its shape.

Its matrices are stored (inputs, outputs), those of queries, keys and values as one. Names begin with `transformer.`;
the first releases left that away. Read beside transformers' models/gpt2 (5.23)."""

from collections.abc import Iterator
from typing import Any

from colossus.errors import ConfigError
from colossus.spec.model import AttentionSpec, LayerNormSpec, MlpSpec, ModelSpec
from colossus.zoo.hugging_face.architecture import NO_WEIGHTS, Architecture
from colossus.zoo.hugging_face.common import dense, grouped
from colossus.zoo.hugging_face.fields import Fields
from colossus.zoo.hugging_face.tables import Row, decoder, row
from colossus.zoo.hugging_face.tensors import StoredTensor

_MASKS = r"|transformer\.h\.\d+\.attn\.(bias|masked_bias)"
_QKV = ("attention.query", "attention.key", "attention.value")

_LAYER = (
    row("ln_1.weight", "attention_norm.weight"),
    row("ln_1.bias", "attention_norm.bias"),
    Row("attn.c_attn.weight", tuple(f"{part}.weight" for part in _QKV), transposed=True),
    row("attn.c_attn.bias", *(f"{part}.bias" for part in _QKV)),
    Row("attn.c_proj.weight", ("attention.output.weight",), transposed=True),
    row("attn.c_proj.bias", "attention.output.bias"),
    row("ln_2.weight", "mlp_norm.weight"),
    row("ln_2.bias", "mlp_norm.bias"),
    Row("mlp.c_fc.weight", ("mlp.up.weight",), transposed=True),
    row("mlp.c_fc.bias", "mlp.up.bias"),
    Row("mlp.c_proj.weight", ("mlp.down.weight",), transposed=True),
    row("mlp.c_proj.bias", "mlp.down.bias"),
)
_FIRST = (
    row("transformer.wte.weight", "embedding.weight"),
    row("transformer.wpe.weight", "position_embedding.weight"),
)
_LAST = (
    row("transformer.ln_f.weight", "final_norm.weight"),
    row("transformer.ln_f.bias", "final_norm.bias"),
    row("lm_head.weight", "head.weight"),
)


def _read(fields: Fields, name: str) -> ModelSpec:
    fields.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    hidden_size, num_heads = fields.integer("n_embd"), fields.integer("n_head")
    if hidden_size % num_heads:
        raise ConfigError(f"n_embd is {hidden_size}, no multiple of n_head, {num_heads}")
    return ModelSpec(
        name=name,
        vocab_size=fields.integer("vocab_size"),
        context_tokens=fields.integer("n_positions", 1024),
        num_layers=fields.integer("n_layer"),
        hidden_size=hidden_size,
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=hidden_size // num_heads,
            rope=None,
            bias="all",
        ),
        mlp=MlpSpec(
            intermediate_size=fields.integer("n_inner", 4 * hidden_size), activation="gelu", bias=True
        ),
        norm=LayerNormSpec(epsilon=fields.positive("layer_norm_epsilon", 1e-5)),
        learned_positions=True,
        tied_embeddings=fields.truth("tie_word_embeddings", True),
        zero_init_outputs=False,
    )


def _write(model: ModelSpec) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "n_positions": model.context_tokens,
        "n_ctx": model.context_tokens,
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": grouped(model).num_heads,
        "n_inner": dense(model).intermediate_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm.epsilon,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": model.tied_embeddings,
    }


def _tensors(model: ModelSpec) -> Iterator[StoredTensor]:
    return decoder(model, _LAYER, _FIRST, _LAST, layers="transformer.h.")


def _canonical(name: str) -> str:
    begins = name.partition(".")[0]
    return f"transformer.{name}" if begins in ("wte", "wpe", "h", "ln_f") else name


GPT2 = Architecture(
    "GPT2LMHeadModel", "gpt2", _read, _write, _tensors, no_weights=NO_WEIGHTS + _MASKS, canonical=_canonical
)
