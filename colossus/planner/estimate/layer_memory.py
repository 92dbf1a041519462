"""One layer on one rank of our trainer: what its forward pass keeps under each way of recomputing, and what its
backward pass needs in passing."""

from collections.abc import Iterator
from dataclasses import dataclass

from colossus.planner.one_rank.activations import (
    EXPLICIT_ATTENTION_MAX_TOKENS,
    FLOAT32,
    Shape,
    attend_bytes,
    expert_rows,
    heads_here,
    is_fused,
    layer_activation_bytes,
    mixed_channels,
    norm_bytes,
    projection_bytes,
)
from colossus.spec.model import AttentionSpec, LatentAttentionSpec, MlpSpec, ModelSpec, MoeSpec
from colossus.spec.plan import Recompute

BLOCK_QUERIES = 512
"""As in models/attend.py and parallel/context.py."""
ACTIVATION_TENSORS = {"swiglu": 2, "geglu": 2, "clamped_swiglu": 6, "gelu": 1, "squared_relu": 1}
"""What an activation's backward pass makes, as large as what it is given: gradients, and what it computes again; less
the tensor that it gave, which is free by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMemory:
    """Bytes of one micro-batch in one layer."""

    kept: int
    """From the forward pass to the backward pass."""
    again: int
    """Of what the backward pass makes again before it begins."""
    residual: int
    """The hidden states, and so their gradient."""
    mlp: int
    """Kept, or made again, for the feed-forward part."""
    mlp_most: int
    """Beside all that: what the feed-forward part's backward pass has at its fullest, less what is free by then."""
    attention_most: int
    """The same of attention, once the feed-forward part is gone."""
    waiting: int
    """Inputs and gradients that weight gradients wait with, where these are put off."""


def layer_memory(
    model: ModelSpec,
    mlp: MlpSpec | MoeSpec,
    shape: Shape,
    recompute: Recompute,
    *,
    router_losses: bool,
    first: bool = False,
) -> LayerMemory:
    """`first`: for the step's first gradients, which nothing is there to add to."""
    whole = layer_activation_bytes(model, mlp, shape, router_losses=router_losses)
    attended = attend_bytes(model.attention, shape)
    norms = norm_bytes(model, model.hidden_size, shape)
    outside = (4 if model.norm_placement == "sandwich" else 2) * norms
    attention = attended + projection_bytes(model, shape)
    residual = shape.held_values(model.hidden_size)
    again = 0
    match recompute:
        case "selective":
            again = attended - _attention_inputs(model, shape)
        case "full":
            again = whole - residual
        case "alternate":
            again = whole - residual - _every_other_matmul(model, mlp, shape)
    return LayerMemory(
        kept=whole - again,
        again=again,
        residual=residual,
        mlp=whole - attention - outside,
        mlp_most=max(_mlp_moments(model, mlp, shape, whole - attention - outside, first)),
        attention_most=max(_attention_moments(model, shape, attention, first)),
        waiting=_waiting(model, mlp, shape),
    )


# --- recomputing ---


def _attention_inputs(model: ModelSpec, shape: Shape) -> int:
    """Queries, keys and values of this rank's own tokens."""
    return shape.values(sum(heads_here(model.attention, shape)))


def _every_other_matmul(model: ModelSpec, mlp: MlpSpec | MoeSpec, shape: Shape) -> int:
    """Outputs of the first linear map, the third and so on; and of fused attention."""
    outputs = [size for size, _ in _linear_maps(model, mlp, shape)]
    kept = sum(outputs[::2])
    attention = model.attention
    ring = shape.split.cp > 1 and shape.split.exchange == "ring"
    if is_fused(attention, shape) and not shape.short and not ring:
        query = heads_here(attention, shape).query
        heads = query // attention.head_dim
        mixed = query if shape.split.on_cpu else heads * attention.value_head_dim
        kept += shape.values(mixed) + FLOAT32 * shape.tokens * heads
    return kept


def _linear_maps(model: ModelSpec, mlp: MlpSpec | MoeSpec, shape: Shape) -> Iterator[tuple[int, int]]:
    """Bytes that each puts out, and of what only it takes, in the order of the forward pass."""
    hidden, attention = model.hidden_size, model.attention
    query, key, value = heads_here(attention, shape)
    if isinstance(attention, LatentAttentionSpec):
        if attention.q_lora_rank is None:
            yield shape.values(query), shape.values(hidden)
        else:
            yield shape.held_values(attention.q_lora_rank), 0
            yield shape.values(query), shape.values(attention.q_lora_rank)
        yield shape.held_values(attention.kv_lora_rank + attention.rope_head_dim), shape.held_values(hidden)
        keys = query // attention.head_dim * attention.nope_head_dim
        yield shape.values(keys + value), shape.values(attention.kv_lora_rank)
    else:
        yield shape.values(query), shape.values(hidden)
        yield shape.values(key), 0
        yield shape.values(value), 0
    yield shape.values(hidden), shape.values(mixed_channels(attention, shape))
    if isinstance(mlp, MoeSpec):
        yield FLOAT32 * shape.held * mlp.num_experts, 0
        rows = shape.element * expert_rows(mlp, shape)
        inner = mlp.intermediate_size // shape.split.expert_tp
        if mlp.gated:
            yield rows * inner, 0
        yield rows * inner, rows * hidden
        yield rows * hidden, rows * inner
        if mlp.shared is not None:
            yield from _mlp_maps(hidden, shape.part(mlp.shared.intermediate_size), mlp.gated, shape)
        return
    yield from _mlp_maps(hidden, shape.part(mlp.intermediate_size), mlp.gated, shape)


def _mlp_maps(hidden: int, inner: int, gated: bool, shape: Shape) -> Iterator[tuple[int, int]]:
    if gated:
        yield shape.values(inner), 0
    yield shape.values(inner), shape.values(hidden)
    yield shape.values(hidden), shape.values(inner)


def _waiting(model: ModelSpec, mlp: MlpSpec | MoeSpec, shape: Shape) -> int:
    """Of each linear map but the router: what it took, and its output's gradient."""
    total = 0
    for output, taken in _linear_maps(model, mlp, shape):
        total += output + taken
    return total - (FLOAT32 * shape.held * mlp.num_experts if isinstance(mlp, MoeSpec) else 0)


# --- a backward pass ---


@dataclass(frozen=True, slots=True)
class Made:
    """What gradients of weights take in a backward pass: bytes of each number."""

    passing: int
    """As a matmul makes them and in the dtype in which they are kept."""
    kept: int
    """Until the pass is through."""

    @classmethod
    def of(cls, shape: Shape, *, gathered: bool, first: bool) -> "Made":
        """`first`: whether they are the step's first, and so are kept in place of being added to others."""
        if shape.split.deferred:
            return cls(0, 0)
        if gathered:
            return cls(shape.element, shape.element)
        return cls(shape.element + FLOAT32 if shape.element < FLOAT32 else FLOAT32, FLOAT32 if first else 0)


def _mlp_moments(
    model: ModelSpec, mlp: MlpSpec | MoeSpec, shape: Shape, kept: int, first: bool
) -> Iterator[int]:
    """What is there beside what was kept, less what is free by then."""
    hidden, tensors = model.hidden_size, ACTIVATION_TENSORS[mlp.activation]
    made = Made.of(shape, gathered=shape.split.dense_gathered, first=first)
    # The norm before it, in float32: its output again, its gradient and two products of them.
    yield (4 * FLOAT32 + shape.element) * shape.held * hidden - kept
    if not isinstance(mlp, MoeSpec):
        yield from _dense_moments(hidden, shape.part(mlp.intermediate_size), mlp.gated, tensors, shape, made)
        return
    shared = 0
    if mlp.shared is not None:
        inner = shape.part(mlp.shared.intermediate_size)
        yield from _dense_moments(hidden, inner, mlp.gated, tensors, shape, made)
        shared = shape.values((3 if mlp.gated else 2) * inner)
    rows, inner = shape.element * expert_rows(mlp, shape), mlp.intermediate_size // shape.split.expert_tp
    matrix = mlp.num_experts // shape.split.ep * hidden * inner
    made = Made.of(shape, gathered=shape.split.experts_gathered, first=first)
    cast, others = shape.cast(matrix, expert=True), 1 if mlp.gated else 0
    # Weighted rows have a gradient, and so have weights, by way of a product as large; then rows travel back.
    yield 2 * rows * hidden - shared
    yield rows * (inner + hidden - hidden) + made.passing * matrix - shared
    yield rows * (tensors * inner - hidden) + made.kept * matrix - cast - shared
    yield (
        rows * ((1 + others) * hidden - hidden - inner)
        + (made.passing + (1 + others) * made.kept) * matrix - (1 + others) * cast - shared
    )  # fmt: skip


def _dense_moments(
    hidden: int, inner: int, gated: bool, tensors: int, shape: Shape, made: Made
) -> Iterator[int]:
    matrix, cast = hidden * inner, shape.cast(hidden * inner)
    gathered = shape.values(hidden) if shape.split.tp > 1 else 0
    # The last map's gradients; what it took is free when its weight's gradient is cast.
    yield gathered + shape.values(inner) + shape.element * matrix
    yield made.passing * matrix - cast
    yield shape.values(tensors * inner) + made.kept * matrix - cast
    # The first maps', of which each has an input gradient, which is added to the other's.
    others = 1 if gated else 0
    yield (
        shape.values((1 + others) * hidden - inner) + (made.passing + (1 + others) * made.kept) * matrix
        - (1 + others) * cast
    )  # fmt: skip


def _attention_moments(model: ModelSpec, shape: Shape, kept: int, first: bool) -> Iterator[int]:
    attention, hidden = model.attention, model.hidden_size
    made = Made.of(shape, gathered=shape.split.dense_gathered, first=first)
    query, key, value = heads_here(attention, shape)
    mixed, heads, cp = mixed_channels(attention, shape), query // attention.head_dim, shape.split.cp
    matrix = mixed * hidden
    yield shape.values((hidden if shape.split.tp > 1 else 0) + mixed) + shape.element * matrix
    yield shape.values(mixed) + made.passing * matrix - shape.cast(matrix)
    # The linear maps' inputs have gradients, each of which is added to the one before.
    yield shape.values(query + key + value + 2 * hidden) + (made.passing + made.kept) * matrix - kept
    if isinstance(attention, LatentAttentionSpec) or attention.rope is not None:
        # Turned back: products with cosines and sines, and their sum.
        yield shape.values(3 * query + key + value) - attend_bytes(attention, shape)
    squares = 2
    if isinstance(attention, AttentionSpec):
        extra = (attention.score_temperature_tokens is not None) or attention.sinks
        squares += 2 if attention.score_soft_cap is not None else 1 if extra else 0
    if cp > 1 and shape.split.exchange == "ring":
        chunk = shape.sequence_tokens // (2 * cp)
        tile = FLOAT32 * shape.num_sequences * heads * min(BLOCK_QUERIES, chunk) * chunk
        # The block at hand and the one that comes; its gradients and those that come; the queries' gradient.
        passing = shape.values(2 * (key + value)) + 2 * FLOAT32 * shape.tokens * (key + value)
        yield passing + FLOAT32 * shape.tokens * query + shape.values(2 * mixed) + 3 * tile
        return
    keys, tokens, seen = shape.sequence_tokens, shape.tokens, shape.sequence_tokens
    if cp > 1 and shape.split.exchange == "all-gather":
        # Both chunks' keys and values have gradients as large as all of them.
        gathered = 2 * shape.element * tokens * cp * (key + value)
        tokens //= 2
        yield gathered + shape.element * tokens * (2 * query)
    elif cp > 1:
        query, key, value, heads, tokens = query // cp, key // cp, value // cp, heads // cp, tokens * cp
        mixed //= cp
    size = shape.element * tokens
    if shape.split.on_cpu and seen <= EXPLICIT_ATTENTION_MAX_TOKENS:
        yield size * (mixed + query + key + value + squares * heads * keys)
    elif is_fused(attention, shape):
        wide = isinstance(attention, LatentAttentionSpec) and shape.split.on_cpu
        yield size * (mixed + (4 * query if wide else query + key + value))
    else:
        # One block's scores are made again, and kept until their gradients are there.
        block = shape.element * shape.num_sequences * min(BLOCK_QUERIES, keys) * heads * keys
        yield size * (mixed + query + 2 * (key + value)) + (squares + 2) * block


# --- the loss ---


@dataclass(frozen=True, slots=True)
class LossMemory:
    gradients: int
    """Of the head and of hidden states, made in the forward pass and kept to the backward pass."""
    forward: int
    """Beside them while chunks are gone through."""
    backward: int
    """Beside them when they are scaled."""


def loss_memory(model: ModelSpec, shape: Shape, chunk: int, head_element: int, *, z_loss: bool) -> LossMemory:
    """Of the loss on the last stage; `head_element`: bytes of a number of the head as it stands there."""
    head, tp = shape.part(model.vocab_size) * model.hidden_size, shape.split.tp
    hidden = shape.values(model.hidden_size)
    # Hidden states normed, and those of all ranks' tokens; the head in the dtype of matmuls; its gradient in float32.
    beside = shape.held_values(model.hidden_size) + (hidden if tp > 1 else 0)
    beside += 0 if head_element == shape.element else shape.element * head
    beside += (FLOAT32 - head_element) * head
    capped, element = model.logit_soft_cap is not None, shape.element
    if tp == 1:
        # Logits and probabilities, for which a CPU makes logits in float32; what a cap squashed.
        copy = FLOAT32 if shape.split.on_cpu else element
        per_logit = FLOAT32 + (element + copy if element < FLOAT32 else FLOAT32)
        per_logit += element + FLOAT32 if capped else 0
    else:
        # As they are multiplied and in float32; what a cap squashed and its slope.
        per_logit = (element if element < FLOAT32 else 0) + FLOAT32 + (2 * FLOAT32 if capped else 0)
    per_logit += FLOAT32 if z_loss else 0
    logits = min(chunk, shape.tokens) * shape.part(model.vocab_size)
    # A chunk's part of the head's gradient, when only the logits' gradient is left.
    forward = beside + max(logits * per_logit, element * logits + element * head)
    gradients = head_element * head + hidden
    return LossMemory(gradients, forward, gradients)
