"""Fields that most architectures' config.json have."""

from typing import Any

from colossus.errors import ConfigError
from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec, MoeSpec, NormSpec, RopeSpec
from colossus.zoo.hugging_face.fields import Fields, shown
from colossus.zoo.hugging_face.rope import Yarn, write_rope


class OtherParts(ConfigError):
    """A model is made of other parts than an architecture's, so that it is not worth naming what differs."""


# --- reading ---


def heads(fields: Fields, default_kv_heads: int | None = None) -> tuple[int, int]:
    """Numbers of heads: of queries, and of keys and values. Where the latter is null it is the former; where it is
    not there, the architecture's default."""
    num_heads = fields.integer("num_attention_heads")
    said = "num_key_value_heads" in fields.values
    num_kv_heads = fields.integer("num_key_value_heads", num_heads if said else default_kv_heads or num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"num_attention_heads is {num_heads}, but num_key_value_heads is {num_kv_heads}; every head of keys and "
            f"values must serve the same number of heads of queries"
        )
    return num_heads, num_kv_heads


def head_dim(fields: Fields, num_heads: int) -> int:
    """Channels of a head: as given, or the hidden size split among the heads."""
    hidden_size = fields.integer("hidden_size")
    if not fields.has("head_dim") and hidden_size % num_heads:
        raise ConfigError(
            f"hidden_size is {hidden_size}, no multiple of num_attention_heads, {num_heads}, and there is no head_dim"
        )
    size = fields.integer("head_dim", hidden_size // num_heads)
    if size % 2:
        raise ConfigError(f"head_dim is {size}, odd; rotary positions turn pairs of channels")
    return size


def no_window(fields: Fields) -> None:
    """Raises ConfigError if layers attend to a window that this architecture is not read with."""
    if fields.truth("use_sliding_window", False):
        raise ConfigError("use_sliding_window is true; Colossus reads this architecture without windows")
    for kind in layer_types(fields) or ():
        if kind != "full_attention":
            raise ConfigError(
                f"layer_types has {shown(kind)}; Colossus reads this architecture with full attention only"
            )


def layer_types(fields: Fields) -> tuple[str, ...] | None:
    """Each layer's kind of attention; None where it is not said."""
    kinds = fields.values.get("layer_types")
    if kinds is None:
        return None
    num_layers = fields.integer("num_hidden_layers")
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise fields.wrong("layer_types", "a list of names, one for each layer")
    if len(kinds) != num_layers:
        raise ConfigError(f"layer_types names {len(kinds)} layers, but num_hidden_layers is {num_layers}")
    return tuple(kinds)


def experts(fields: Fields, key: str, top_k_default: int | None = None) -> tuple[int, int]:
    """How many experts there are, and how many a token goes through."""
    num_experts = fields.integer(key)
    top_k = fields.integer("num_experts_per_tok", top_k_default)
    if top_k > num_experts:
        raise ConfigError(f"num_experts_per_tok is {top_k}, but {key} is {num_experts}")
    return num_experts, top_k


# --- writing ---


def grouped(model: ModelSpec) -> AttentionSpec:
    """The attention of an architecture that has heads of keys and values."""
    if not isinstance(model.attention, AttentionSpec):
        raise OtherParts("attention.kind is 'latent', which only DeepSeek's architecture has")
    return model.attention


def dense(model: ModelSpec) -> MlpSpec:
    """The feed-forward part of an architecture without experts."""
    if not isinstance(model.mlp, MlpSpec):
        raise OtherParts("mlp.kind is 'moe', which this architecture does not have")
    return model.mlp


def moe(model: ModelSpec) -> MoeSpec:
    """The feed-forward part of an architecture with experts."""
    if not isinstance(model.mlp, MoeSpec):
        raise OtherParts("mlp.kind is 'dense'; this architecture has experts")
    return model.mlp


def decoder_fields(model: ModelSpec) -> dict[str, Any]:
    """The sizes that do not depend on what the layers are made of."""
    return {
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context_tokens,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "rms_norm_eps": model.norm.epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def read_decoder_fields(fields: Fields, *, context: int, epsilon: float) -> dict[str, Any]:
    """What `decoder_fields` writes, as arguments of a ModelSpec; `context` and `epsilon` where nothing is said."""
    return {
        "vocab_size": fields.integer("vocab_size"),
        "context_tokens": fields.integer("max_position_embeddings", context),
        "num_layers": fields.integer("num_hidden_layers"),
        "hidden_size": fields.integer("hidden_size"),
        "norm": NormSpec(epsilon=fields.positive("rms_norm_eps", epsilon)),
        "tied_embeddings": fields.truth("tie_word_embeddings", False),
        "zero_init_outputs": False,
    }


def attention_fields(attention: AttentionSpec, yarn: Yarn = "rotations") -> dict[str, Any]:
    """Heads and rotary positions."""
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        **write_rope(attention.rope or RopeSpec(), yarn),
    }
