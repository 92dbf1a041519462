"""A model in words: what it is made of and what it costs, a line for each thing."""

from collections.abc import Iterator

from colossus.errors import ConfigError
from colossus.spec.model import (
    AttentionSpec,
    LatentAttentionSpec,
    LayerNormSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    RopeSpec,
)
from colossus.units import format_bytes
from colossus.zoo.hugging_face import architecture_of


def model_lines(model: ModelSpec) -> Iterator[tuple[str, str]]:
    """A label and a text for each thing to say of a model."""
    yield "parameters", f"{model.num_params():,}"
    yield "active", f"{model.num_active_params():,} for one token"
    yield "layers", f"{model.num_layers} × {model.hidden_size:,}"
    yield "attention", ", ".join(_attention(model.attention))
    if model.attention.rope is not None:
        yield "positions", _rope(model.attention.rope)
    elif model.learned_positions:
        yield "positions", "learned, one for each token of the context"
    yield "feed-forward", _feed_forward(model)
    if isinstance(model.mlp, MoeSpec):
        yield "router", ", ".join(_router(model.mlp))
    yield "norms", _norms(model)
    yield "embeddings", ", ".join(_embeddings(model))
    yield "logits", ", ".join(_logits(model))
    yield "context", f"{model.context_tokens:,} tokens"
    for tokens in sorted({min(4096, model.context_tokens), model.context_tokens}):
        yield (
            "training",
            f"{model.flops_per_token(tokens):.3e} FLOPs per token, in sequences of {tokens:,}",
        )
    yield "weights", f"{format_bytes(model.weight_bytes('bfloat16'))} in bfloat16"
    cache = format_bytes(model.kv_cache_bytes(model.context_tokens, "bfloat16"))
    yield "cache", f"{cache} in bfloat16 at full context"
    yield "files", _files(model)


def _attention(attention: AttentionSpec | LatentAttentionSpec) -> Iterator[str]:
    if isinstance(attention, LatentAttentionSpec):
        yield f"latent, {attention.num_heads} heads of {attention.nope_head_dim} + {attention.rope_head_dim}"
        yield f"keys and values from {attention.kv_lora_rank} channels"
        return
    yield f"{attention.num_heads} heads of {attention.head_dim}"
    if attention.num_kv_heads != attention.num_heads:
        yield f"{attention.num_kv_heads} of keys and values"
    if attention.qk_norm:
        yield "queries and keys normalised"
    if attention.window is not None:
        every = attention.window.full_every
        where = "in all layers" if every is None else f"in all but each {_ordinal(every)} layer"
        yield f"a window of {attention.window.tokens:,} tokens {where}"
    if attention.score_soft_cap is not None:
        yield f"scores capped softly at {attention.score_soft_cap:g}"
    if attention.score_temperature_tokens is not None:
        yield f"sharper beyond {attention.score_temperature_tokens:,} tokens"
    if attention.sinks:
        yield "a sink for each head"
    if attention.bias is not None:
        yield "biases" if attention.bias == "all" else "biases of queries, keys and values"


def _ordinal(number: int) -> str:
    return {2: "2nd", 3: "3rd"}.get(number, f"{number}th")


def _rope(rope: RopeSpec) -> str:
    turned = "" if rope.rotated_fraction == 1 else f" of {rope.rotated_fraction:.0%} of each head"
    text = f"rotations{turned}, base {rope.base:,.0f}"
    if rope.scaling is None:
        return text
    kind = {"llama3": "Llama 3's way", "yarn": "YaRN"}[rope.scaling.kind]
    before = rope.scaling.original_context_tokens
    return f"{text}, stretched {rope.scaling.factor:g} times from {before:,} tokens ({kind})"


def _feed_forward(model: ModelSpec) -> str:
    first = model.first_layers
    return _mlp(model.mlp) + (
        "" if first is None else f"; in the first {first.num_layers}: {_mlp(first.mlp)}"
    )


def _mlp(mlp: MlpSpec | MoeSpec) -> str:
    if isinstance(mlp, MlpSpec):
        return f"{mlp.intermediate_size:,} {mlp.activation}"
    text = f"{mlp.top_k} of {mlp.num_experts} experts of {mlp.intermediate_size:,} {mlp.activation}"
    if mlp.shared is None:
        return text
    times = "" if mlp.shared.sum_multiplier == 1 else f", their sum × {mlp.shared.sum_multiplier:.4g}"
    return f"{text}, beside a shared {mlp.shared.intermediate_size:,}{times}"


def _router(moe: MoeSpec) -> Iterator[str]:
    router = moe.router
    yield f"{router.scoring} over all experts"
    yield "weights of the chosen add up to 1" if router.renormalized else "weights as they are"
    if router.weight_multiplier != 1:
        yield f"× {router.weight_multiplier:g}"
    if router.soft_cap is not None:
        yield f"logits capped softly at {router.soft_cap:g}"
    if router.groups is not None:
        yield f"within {router.groups.top_groups} of {router.groups.num_groups} groups"
    if router.balancing_bias:
        yield "balanced by biases"


def _norms(model: ModelSpec) -> str:
    kind = "LayerNorm" if isinstance(model.norm, LayerNormSpec) else "RMS"
    where = {"pre": "before", "post": "after", "sandwich": "before and after"}[model.norm_placement]
    return f"{kind}, {where} attention and feed-forward"


def _embeddings(model: ModelSpec) -> Iterator[str]:
    yield f"{model.vocab_size:,} tokens"
    if model.embedding_multiplier != 1:
        yield f"× {model.embedding_multiplier:.4g}"
    if model.ngrams is not None:
        yield f"and the last {', '.join(map(str, model.ngrams.orders))} tokens together"
    if model.recall is not None:
        yield "and what came next the last time"


def _logits(model: ModelSpec) -> Iterator[str]:
    yield "by the embeddings" if model.tied_embeddings else "by a head of their own"
    if model.logit_multiplier != 1:
        yield f"× {model.logit_multiplier:.4g}"
    if model.logit_soft_cap is not None:
        yield f"capped softly at {model.logit_soft_cap:g}"


def _files(model: ModelSpec) -> str:
    """What its weights are called elsewhere."""
    try:
        architecture = architecture_of(model)
    except ConfigError as error:
        return f"Colossus' own alone: {str(error).partition(';')[0]}"
    where = "" if architecture.in_transformers else ", in vLLM and SGLang; transformers has none"
    return f"{architecture.name} of Hugging Face{where}"
