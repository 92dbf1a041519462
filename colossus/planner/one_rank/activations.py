"""What the decoder's forward pass keeps for its backward pass, counted from the model's specification.

A function for each part of models/, in the same order. On a CPU it is to the byte what autograd saves (a contract test
compares them). It depends on the model and the batch's shape alone: which expert a token chooses moves rows about in
tensors that are as large in any case.
"""

from dataclasses import dataclass

from colossus.spec.model import (
    BYTES_PER_ELEMENT,
    AttentionSpec,
    Dtype,
    LatentAttentionSpec,
    LayerNormSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)

EXPLICIT_ATTENTION_MAX_TOKENS = 512
"""Up to here a CPU keeps the probabilities of attention, from here on only what the fused kernel or blocks of queries
need; as in models/attend.py."""
FLOAT32, INT64 = 4, 8


@dataclass(frozen=True, slots=True)
class Shape:
    """What a pass is over: `num_sequences` of `sequence_tokens` each, in `dtype`."""

    num_sequences: int
    sequence_tokens: int
    dtype: Dtype

    @property
    def tokens(self) -> int:
        return self.num_sequences * self.sequence_tokens

    @property
    def element(self) -> int:
        """Bytes of a number in `dtype`."""
        return BYTES_PER_ELEMENT[self.dtype]

    @property
    def short(self) -> bool:
        """Whether attention keeps its probabilities."""
        return self.sequence_tokens <= EXPLICIT_ATTENTION_MAX_TOKENS

    def values(self, per_token: int) -> int:
        """Bytes of so many numbers for each token, in `dtype`."""
        return self.element * self.tokens * per_token

    def cast(self, num_weights: int) -> int:
        """Bytes of weights' copy in `dtype`, kept for the input's gradient."""
        return 0 if self.dtype == "float32" else self.element * num_weights


def activation_bytes(
    model: ModelSpec, num_sequences: int, sequence_tokens: int, dtype: Dtype, *, router_losses: bool = False
) -> int:
    """Bytes that the decoder's forward pass keeps, weights and tables aside. `router_losses`: with the losses that
    keep the routers of a mixture healthy."""
    shape = Shape(num_sequences, sequence_tokens, dtype)
    total = _embeddings(model, shape) + _norm(model, model.hidden_size, shape) + _sight(model, shape)
    num_mixtures = 0
    for group in model.layer_groups():
        total += group.num_layers * layer_activation_bytes(
            model, group.mlp, shape, router_losses=router_losses
        )
        num_mixtures += group.num_layers if isinstance(group.mlp, MoeSpec) else 0
    # Each of the two losses' weights, one number for all layers.
    return total + (2 * FLOAT32 if router_losses and num_mixtures else 0)


def layer_activation_bytes(
    model: ModelSpec, mlp: MlpSpec | MoeSpec, shape: Shape, *, router_losses: bool = False
) -> int:
    """What one layer with this feed-forward part keeps."""
    norms = 4 if model.norm_placement == "sandwich" else 2
    attention, hidden = model.attention, model.hidden_size
    total = norms * _norm(model, hidden, shape)
    if isinstance(attention, LatentAttentionSpec):
        total += _latent_attention(model, attention, shape)
    else:
        total += _attention(hidden, attention, shape)
    if isinstance(mlp, MoeSpec):
        return total + _mixture(hidden, mlp, shape, router_losses=router_losses)
    return total + shape.values(hidden) + _mlp(hidden, mlp.intermediate_size, mlp.gated, shape)


# --- around the layers ---


def _embeddings(model: ModelSpec, shape: Shape) -> int:
    """Every table's rows that were looked up; where there is a norm, what it keeps."""
    tables = 1 + (1 if model.learned_positions else 0)
    tables += (len(model.ngrams.orders) if model.ngrams else 0) + (1 if model.recall else 0)
    norm = _norm(model, model.hidden_size, shape) if model.embedding_norm else 0
    return INT64 * tables * shape.tokens + norm


def _sight(model: ModelSpec, shape: Shape) -> int:
    """What all layers share: cosines and sines; temperatures; and, where attention is not explicit, who sees whom,
    for layers with a window and for layers without."""
    attention, total = model.attention, 0
    if attention.rope is not None:
        turned = attention.rope_head_dim if isinstance(attention, LatentAttentionSpec) else attention.head_dim
        total += 2 * shape.element * shape.sequence_tokens * int(attention.rope.rotated_fraction * turned)
    if isinstance(attention, AttentionSpec) and attention.score_temperature_tokens is not None:
        total += shape.values(1)
    if shape.short:
        return total
    return total + num_kinds_of_sight(model) * shape.values(shape.sequence_tokens)


def num_kinds_of_sight(model: ModelSpec) -> int:
    """2 where some layers have a window and others do not."""
    window = model.attention.window
    if window is None:
        return 1
    return 1 if window.num_window_layers(model.num_layers) in (0, model.num_layers) else 2


def _norm(model: ModelSpec, size: int, shape: Shape, stored: int | None = None) -> int:
    """The input, which may be a part of `stored` channels, and statistics: for RMS a float32 scale."""
    inputs = shape.values(stored or size)
    if isinstance(model.norm, LayerNormSpec):
        return inputs + shape.values(2) + shape.cast((2 if model.norm.bias else 1) * size)
    return inputs + FLOAT32 * shape.tokens + (shape.cast(size) if model.norm.weighted else 0)


# --- attention ---


def _attention(hidden: int, attention: AttentionSpec, shape: Shape) -> int:
    query = attention.num_heads * attention.head_dim
    key = value = attention.num_kv_heads * attention.head_dim
    projections = shape.values(hidden) + shape.cast(hidden * (query + key + value))
    output = shape.values(query) + shape.cast(query * hidden)
    return (
        projections
        + (_qk_norm(attention, attention.num_heads, shape) if attention.qk_norm else 0)
        + (_qk_norm(attention, attention.num_kv_heads, shape) if attention.qk_norm else 0)
        + _attend(attention, query, key, value, shape)
        + output
    )


def _qk_norm(attention: AttentionSpec, num_heads: int, shape: Shape) -> int:
    """Input and a float32 scale for each head, or one for all of them."""
    size, together = num_heads * attention.head_dim, attention.qk_norm_weights == "all_heads"
    weights = {None: 0, "head": attention.head_dim, "all_heads": size}[attention.qk_norm_weights]
    scales = FLOAT32 * shape.tokens * (1 if together else num_heads)
    return shape.values(size) + scales + shape.cast(weights)


def _latent_attention(model: ModelSpec, attention: LatentAttentionSpec, shape: Shape) -> int:
    hidden, heads = model.hidden_size, attention.num_heads
    latent, query = attention.kv_lora_rank, heads * attention.head_dim
    down, value = latent + attention.rope_head_dim, heads * attention.value_head_dim
    total = shape.values(hidden) + shape.cast(hidden * down)
    if attention.q_lora_rank is None:
        total += shape.cast(hidden * query)
    else:
        rank = attention.q_lora_rank
        total += shape.cast((hidden + query) * rank) + _norm(model, rank, shape) + shape.values(rank)
    total += _norm(model, latent, shape, stored=down)
    total += shape.values(latent) + shape.cast(latent * (heads * attention.nope_head_dim + value))
    output = shape.values(value) + shape.cast(value * hidden)
    return total + _attend(attention, query, query, value, shape) + output


def _attend(
    attention: AttentionSpec | LatentAttentionSpec, query: int, key: int, value: int, shape: Shape
) -> int:
    """Beside what was mixed, which is counted as the output projection's input: queries, keys and values, of so many
    channels in all heads; and probabilities, with a soft cap also what it squashed, with sinks what those took."""
    heads, per_head = attention.num_heads, shape.sequence_tokens
    if isinstance(attention, AttentionSpec):
        per_head *= 1 if attention.score_soft_cap is None else 2
        per_head += 1 if attention.sinks else 0
    if shape.short:
        return shape.values(query + key + value + heads * per_head)
    if not is_fused(attention):
        return shape.values(query + key + value)  # blocks of queries are computed again
    kept = shape.values(query + key) + FLOAT32 * shape.tokens * heads
    if attention.value_head_dim == attention.head_dim:
        return kept + shape.values(value)
    # The kernel wants values as wide as keys, and keeps what it mixed of them.
    return kept + shape.values(2 * query)


def is_fused(attention: AttentionSpec | LatentAttentionSpec) -> bool:
    """Whether a fused kernel can do it, as in models/attend.py."""
    if isinstance(attention, LatentAttentionSpec):
        return attention.value_head_dim <= attention.head_dim
    return (
        attention.score_soft_cap is None
        and attention.score_temperature_tokens is None
        and not attention.sinks
    )


# --- feed-forward ---


def _mlp(hidden: int, inner: int, gated: bool, shape: Shape) -> int:
    """Beside its input: what the activation takes (gate and up, or up) and gives."""
    return shape.values((3 if gated else 2) * inner) + shape.cast((3 if gated else 2) * hidden * inner)


def _mixture(hidden: int, moe: MoeSpec, shape: Shape, *, router_losses: bool) -> int:
    total = _router(hidden, moe, shape) + _experts(hidden, moe, shape)
    if moe.shared is not None:
        # In float32 its input is the router's.
        inputs = 0 if shape.dtype == "float32" else shape.values(hidden)
        total += inputs + _mlp(hidden, moe.shared.intermediate_size, moe.gated, shape)
    if router_losses:
        # Logits, their log-partition and the scores' sum of each token; each sequence's counts; the loss.
        per_token = FLOAT32 * shape.tokens * (moe.num_experts + 2)
        total += per_token + FLOAT32 * shape.num_sequences * moe.num_experts + FLOAT32
    return total


def _router(hidden: int, moe: MoeSpec, shape: Shape) -> int:
    """In float32: input, scores and what a soft cap squashed. Then the choice and, where they are renormalised, the
    chosen scores and their sum."""
    router, chosen = moe.router, moe.top_k
    scores = FLOAT32 * shape.tokens * (hidden + (1 if router.soft_cap is None else 2) * moe.num_experts)
    renormalised = FLOAT32 * shape.tokens * (chosen + 1) if router.renormalized else 0
    return scores + INT64 * shape.tokens * chosen + renormalised


def _experts(hidden: int, moe: MoeSpec, shape: Shape) -> int:
    """Rows sorted by expert, as an MLP's input; what it made, back in the tokens' order, and the weights of the sum.
    Indices: where rows come from, where they go to and, for biases, whose they are."""
    rows, tensors = moe.top_k, 3 if moe.gated else 2
    kept = shape.values(rows * (2 * hidden + tensors * moe.intermediate_size + 1))
    indices = INT64 * shape.tokens * rows * (3 if moe.bias else 2)
    weights = shape.cast(tensors * moe.num_experts * hidden * moe.intermediate_size)
    ends = 4 * moe.num_experts  # where each expert's rows end
    return kept + indices + weights + ends
