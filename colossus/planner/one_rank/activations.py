"""What the decoder's forward pass keeps for its backward pass, counted from the model's specification.

A function for each part of models/, in the same order; of one process, or of one rank of many. On a CPU it is to the
byte what autograd saves (a contract test compares them). It depends on the model and the batch's shape alone: which
expert a token chooses moves rows about in tensors that are as large in any case.
"""

from dataclasses import dataclass
from math import lcm
from typing import NamedTuple

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
from colossus.spec.plan import ContextExchange

EXPLICIT_ATTENTION_MAX_TOKENS = 512
"""Up to here a CPU keeps the probabilities of attention, from here on only what the fused kernel or blocks of queries
need; as in models/attend.py."""
BLOCK_TOKENS = 128
"""As in models/blocks.py."""
FLOAT32, INT32, INT64 = 4, 4, 8


@dataclass(frozen=True, slots=True)
class Split:
    """Over how many ranks a pass is split, and what of it this rank keeps because of that."""

    tp: int = 1
    cp: int = 1
    cp_place: int = 0
    ep: int = 1
    expert_tp: int = 1
    exchange: ContextExchange = "all-gather"
    dense_gathered: bool = False
    """Weights are gathered in the dtype of matmuls: no copies of them are kept."""
    experts_gathered: bool = False
    deferred: bool = False
    """Weight gradients may be put off: linear maps keep no copies of weights."""
    on_cpu: bool = True


@dataclass(frozen=True, slots=True)
class Shape:
    """What a pass is over: `num_sequences` of `sequence_tokens` each, in `dtype`, or one rank's part of that."""

    num_sequences: int
    sequence_tokens: int
    dtype: Dtype
    split: Split = Split()

    @property
    def tokens(self) -> int:
        """Whose queries, keys and values are made here."""
        return self.num_sequences * self.sequence_tokens // self.split.cp

    @property
    def held(self) -> int:
        """Tokens whose hidden states stand here."""
        return self.tokens // self.split.tp

    @property
    def queries(self) -> int:
        """Of each sequence, those that meet keys here."""
        cp = 1 if self.split.exchange == "all-to-all" else self.split.cp
        return self.sequence_tokens // cp

    def part(self, channels: int) -> int:
        """This rank's of so many inner channels."""
        return -(-channels // self.split.tp)

    def heads(self, num_heads: int) -> int:
        """This rank's; where there are fewer than ranks, some have the same."""
        return max(1, num_heads // self.split.tp)

    @property
    def element(self) -> int:
        """Bytes of a number in `dtype`."""
        return BYTES_PER_ELEMENT[self.dtype]

    @property
    def short(self) -> bool:
        """Whether attention keeps its probabilities."""
        return self.split.on_cpu and self.sequence_tokens <= EXPLICIT_ATTENTION_MAX_TOKENS

    @property
    def in_blocks(self) -> bool:
        """Whether attention is told in blocks who sees whom, as in models/blocks.py; else for each pair of tokens."""
        return not self.split.on_cpu and not (self.split.cp > 1 and self.split.exchange == "ring")

    @property
    def pairs(self) -> int:
        """Of tokens, for each of which it is told."""
        return 0 if self.in_blocks else self.num_sequences * self.queries * self.sequence_tokens

    def values(self, per_token: int) -> int:
        """Bytes of so many numbers for each token, in `dtype`."""
        return self.element * self.tokens * per_token

    def held_values(self, per_token: int) -> int:
        """The same of tokens whose hidden states stand here."""
        return self.element * self.held * per_token

    def cast(self, num_weights: int, *, linear: bool = True, expert: bool = False) -> int:
        """Bytes of weights' copy in `dtype`, kept for the input's gradient."""
        gathered = self.split.experts_gathered if expert else self.split.dense_gathered
        if self.dtype == "float32" or gathered or (linear and self.split.deferred):
            return 0
        return self.element * num_weights


def activation_bytes(
    model: ModelSpec, num_sequences: int, sequence_tokens: int, dtype: Dtype, *, router_losses: bool = False
) -> int:
    """Bytes that the decoder's forward pass keeps, weights and tables aside. `router_losses`: with the losses that
    keep the routers of a mixture healthy."""
    shape = Shape(num_sequences, sequence_tokens, dtype)
    total = (
        embedding_bytes(model, shape)
        + norm_bytes(model, model.hidden_size, shape)
        + sight_bytes(model, shape)
    )
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
    hidden = model.hidden_size
    total = norms * norm_bytes(model, hidden, shape)
    total += projection_bytes(model, shape) + attend_bytes(model.attention, shape)
    if isinstance(mlp, MoeSpec):
        return total + _mixture(hidden, mlp, shape, router_losses=router_losses)
    return total + shape.values(hidden) + _mlp(hidden, shape.part(mlp.intermediate_size), mlp.gated, shape)


# --- around the layers ---


def embedding_bytes(model: ModelSpec, shape: Shape) -> int:
    """Every table's rows that were looked up; where there is a norm, what it keeps."""
    others = 1 if model.learned_positions else 0
    others += (len(model.ngrams.orders) if model.ngrams else 0) + (1 if model.recall else 0)
    norm = norm_bytes(model, model.hidden_size, shape) if model.embedding_norm else 0
    rows = INT64 * (shape.tokens + others * shape.held)
    if shape.split.tp > 1:  # which of them are not here
        rows += shape.tokens
    return rows + norm


def sight_bytes(model: ModelSpec, shape: Shape, *, with_bias: bool = False) -> int:
    """What all layers share: cosines and sines; temperatures; and, where attention is not explicit or is made again
    (`with_bias`), who sees whom, for layers with a window and for layers without."""
    attention, total = model.attention, 0
    if attention.rope is not None:
        turned = attention.rope_head_dim if isinstance(attention, LatentAttentionSpec) else attention.head_dim
        attended = shape.sequence_tokens // shape.split.cp
        total += 2 * shape.element * attended * int(attention.rope.rotated_fraction * turned)
    if isinstance(attention, AttentionSpec) and attention.score_temperature_tokens is not None:
        total += shape.element * shape.num_sequences * shape.queries
    if not with_bias and (shape.short if shape.split.cp == 1 else False):
        return total
    return total + num_kinds_of_sight(model) * bias_bytes(shape)


def bias_bytes(shape: Shape) -> int:
    """Who sees whom, in one kind of layers: of blocks, those that are seen in part and those that are as a whole, for
    queries and for keys; and the tokens' documents."""
    if not shape.in_blocks:
        return shape.element * shape.pairs
    blocks = -(-shape.queries // BLOCK_TOKENS) * -(-shape.sequence_tokens // BLOCK_TOKENS)
    return INT32 * shape.num_sequences * (4 * blocks + shape.queries + shape.sequence_tokens)


def num_kinds_of_sight(model: ModelSpec) -> int:
    """2 where some layers have a window and others do not."""
    window = model.attention.window
    if window is None:
        return 1
    return 1 if window.num_window_layers(model.num_layers) in (0, model.num_layers) else 2


def norm_bytes(
    model: ModelSpec, size: int, shape: Shape, stored: int | None = None, *, tokens: int | None = None
) -> int:
    """The input, which may be a part of `stored` channels, and statistics: for RMS a float32 scale."""
    tokens = shape.held if tokens is None else tokens
    inputs = shape.element * tokens * (stored or size)
    if isinstance(model.norm, LayerNormSpec):
        weights = (2 if model.norm.bias else 1) * size
        return inputs + shape.element * tokens * 2 + shape.cast(weights, linear=False)
    return inputs + FLOAT32 * tokens + (shape.cast(size, linear=False) if model.norm.weighted else 0)


# --- attention ---


class Heads(NamedTuple):
    """Channels of all heads that are here."""

    query: int
    key: int
    value: int


def heads_here(attention: AttentionSpec | LatentAttentionSpec, shape: Shape) -> Heads:
    heads, kv_heads = shape.heads(attention.num_heads), shape.heads(attention.num_kv_heads)
    return Heads(
        heads * attention.head_dim, kv_heads * attention.head_dim, kv_heads * attention.value_head_dim
    )


def mixed_channels(attention: AttentionSpec | LatentAttentionSpec, shape: Shape) -> int:
    """Of what attention puts out, in all heads that are here."""
    return shape.heads(attention.num_heads) * attention.value_head_dim


def projection_bytes(model: ModelSpec, shape: Shape) -> int:
    """All that attention keeps outside of itself: what its linear maps and its norms take."""
    attention, hidden = model.attention, model.hidden_size
    query, key, value = heads_here(attention, shape)
    if isinstance(attention, LatentAttentionSpec):
        return _latent_projections(model, attention, shape, query, value)
    total = shape.values(hidden) + shape.cast(hidden * (query + key + value))
    total += shape.values(query) + shape.cast(query * hidden)
    if attention.qk_norm:
        total += _qk_norm(attention, attention.num_heads, shape)
        total += _qk_norm(attention, attention.num_kv_heads, shape)
    return total


def _qk_norm(attention: AttentionSpec, num_heads: int, shape: Shape) -> int:
    """Input and a float32 scale for each head, or one for all of them."""
    num_here, together = shape.heads(num_heads), attention.qk_norm_weights == "all_heads"
    size = num_here * attention.head_dim
    weights = {None: 0, "head": attention.head_dim, "all_heads": size}[attention.qk_norm_weights]
    if (
        together and shape.split.tp > 1
    ):  # by torch's own operators: input and its float32 form, what is multiplied
        wide = 0 if shape.dtype == "float32" else FLOAT32 * shape.tokens * size
        return wide + shape.values(2 * size) + 2 * FLOAT32 * shape.tokens + shape.cast(weights, linear=False)
    scales = FLOAT32 * shape.tokens * (1 if together else num_here)
    return shape.values(size) + scales + shape.cast(weights, linear=False)


def _latent_projections(
    model: ModelSpec, attention: LatentAttentionSpec, shape: Shape, query: int, value: int
) -> int:
    hidden, latent = model.hidden_size, attention.kv_lora_rank
    down = latent + attention.rope_head_dim
    # Latents are made of the tokens that are held, and gathered.
    gathers_input = attention.q_lora_rank is None and shape.split.tp > 1
    total = shape.held_values(hidden) + shape.cast(hidden * down)
    if attention.q_lora_rank is None:
        total += shape.cast(hidden * query) + (shape.values(hidden) if gathers_input else 0)
    else:
        rank = attention.q_lora_rank
        total += shape.cast((hidden + query) * rank) + shape.values(rank)
        total += norm_bytes(model, rank, shape, tokens=shape.tokens)
    total += norm_bytes(model, latent, shape, stored=down, tokens=shape.tokens)
    keys = query // attention.head_dim * attention.nope_head_dim
    total += shape.values(latent) + shape.cast(latent * (keys + value))
    return total + shape.values(value) + shape.cast(value * hidden)


def attend_bytes(attention: AttentionSpec | LatentAttentionSpec, shape: Shape) -> int:
    """Beside what was mixed, which is counted as the output projection's input: queries, keys and values, of so many
    channels in all heads; and probabilities, with a soft cap also what it squashed, with sinks what those took."""
    query, key, value = heads_here(attention, shape)
    cp, heads, tokens = shape.split.cp, shape.heads(attention.num_heads), shape.tokens
    if cp == 1:
        return _attend(attention, query, key, value, shape, tokens, shape.sequence_tokens)
    if shape.split.exchange == "ring":
        # What it has mixed and the logarithm of each query's sum; and what was mixed once more, as it is projected.
        return shape.values(2 * query + key + value - query) + shape.values(query) + FLOAT32 * tokens * heads
    if shape.split.exchange == "all-to-all":
        # All tokens of some of the heads.
        copies = lcm(shape.heads(attention.num_kv_heads), cp) // shape.heads(attention.num_kv_heads)
        inside = _attend(
            attention,
            query // cp,
            key * copies // cp,
            value * copies // cp,
            shape,
            tokens * cp,
            shape.sequence_tokens,
        )
        return inside + (shape.values(query) if is_fused(attention, shape) and not shape.short else 0)
    # Two chunks of queries, from either end; keys and values of all ranks.
    chunk, gathered = shape.sequence_tokens // (2 * cp), tokens * cp
    total = shape.element * gathered * (key + value)
    for seen in ((shape.split.cp_place + 1) * chunk, (2 * cp - shape.split.cp_place) * chunk):
        explicit = shape.split.on_cpu and seen <= EXPLICIT_ATTENTION_MAX_TOKENS
        part = _attend(attention, query, 0, 0, shape, tokens // 2, seen, explicit=explicit)
        apart = is_fused(attention, shape) and not explicit
        total += part + (shape.element * tokens // 2 * query if apart else 0)
    return total


def _attend(
    attention: AttentionSpec | LatentAttentionSpec,
    query: int,
    key: int,
    value: int,
    shape: Shape,
    tokens: int,
    keys: int,
    *,
    explicit: bool | None = None,
) -> int:
    """Of `tokens` queries, each of which meets `keys`."""
    heads, per_head = query // attention.head_dim, keys
    if isinstance(attention, AttentionSpec):
        per_head *= 1 if attention.score_soft_cap is None else 2
        per_head += 1 if attention.sinks else 0
    size = shape.element * tokens
    if shape.short if explicit is None else explicit:
        return size * (query + key + value + heads * per_head)
    if not is_fused(attention, shape):
        return size * (query + key + value)  # blocks of queries are computed again
    kept = size * (query + key) + FLOAT32 * tokens * heads
    if (
        isinstance(attention, AttentionSpec) and attention.sinks
    ):  # what was mixed, and the share that it is left
        kept += size * query + FLOAT32 * tokens * heads
    if attention.value_head_dim == attention.head_dim or not shape.split.on_cpu:
        return kept + size * value
    # The kernel wants values as wide as keys, and keeps what it mixed of them.
    return kept + size * 2 * query


def is_fused(attention: AttentionSpec | LatentAttentionSpec, shape: Shape) -> bool:
    """Whether a fused kernel can do it, as in models/attend.py."""
    if shape.in_blocks:
        return True
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
    # And how many tokens each expert was given.
    total = _router(hidden, moe, shape) + _experts(hidden, moe, shape) + FLOAT32 * moe.num_experts
    if moe.shared is not None:
        # In float32 its input is the router's, where that has not been gathered.
        same = shape.dtype == "float32" and shape.split.tp == 1
        total += 0 if same else shape.values(hidden)
        total += _mlp(hidden, shape.part(moe.shared.intermediate_size), moe.gated, shape)
    if router_losses:
        # Logits, their log-partition and the scores' sum of each token; each sequence's counts; the loss.
        per_token = FLOAT32 * shape.held * (moe.num_experts + 2)
        total += per_token + FLOAT32 * shape.num_sequences * moe.num_experts + FLOAT32
    return total


def _router(hidden: int, moe: MoeSpec, shape: Shape) -> int:
    """In float32: input, scores and what a soft cap squashed. Then the choice and, where they are renormalised, the
    chosen scores and their sum."""
    router, chosen = moe.router, moe.top_k
    scores = FLOAT32 * shape.held * (hidden + (1 if router.soft_cap is None else 2) * moe.num_experts)
    renormalised = FLOAT32 * shape.held * (chosen + 1) if router.renormalized else 0
    return scores + INT64 * shape.held * chosen + renormalised


def expert_rows(moe: MoeSpec, shape: Shape) -> int:
    """That come to the experts here, when all are chosen alike."""
    return shape.held * shape.split.expert_tp * moe.top_k


def _experts(hidden: int, moe: MoeSpec, shape: Shape) -> int:
    """Rows sorted by expert, as an MLP's input; what it made, back in the tokens' order, and the weights of the sum.
    Indices: where rows come from, where they go to and, for biases, whose they are; where they travel, once more."""
    split, tensors = shape.split, 3 if moe.gated else 2
    rows, inner = expert_rows(moe, shape), moe.intermediate_size // split.expert_tp
    num_here = moe.num_experts // split.ep
    kept = shape.element * rows * (2 * hidden + tensors * inner + 1)
    indices = INT64 * rows * ((3 if moe.bias else 2) + (1 if split.ep > 1 else 0))
    weights = shape.cast(tensors * num_here * hidden * inner, expert=True)
    ends = 4 * num_here  # where each expert's rows end
    return kept + indices + weights + ends
