"""What one rank holds in memory at the peak of a training step, counted from the model's specification.

What stays (weights, optimizer state, checkpoint copy) is counted exactly. What comes and goes is counted at the three
moments that can be the peak, and the largest counts: as the backward pass begins, when all activations are there; as
it ends, when all gradients are; and in the optimizer, which needs room of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from colossus.spec.model import BYTES_PER_ELEMENT, Dtype, ModelSpec
from colossus.spec.rank import Machine, Memory
from colossus.spec.run import Muon, RunConfig

EXPLICIT_ATTENTION_MAX_TOKENS = 512
"""Up to here a CPU keeps the probabilities of attention, from here on only what the fused kernel needs; as in
models/attention.py."""
LIBRARY_BYTES = 24 * 2**20
"""Scratch memory that the matmul libraries take at their first large products and keep (measured: 17 to 33 MB)."""
SAVING_BYTES = 8 * 2**20
"""The buffer through which a checkpoint is written."""
FRAGMENTATION = 0.42
"""What the allocator cannot use again of the memory that comes and goes, because other blocks lie in between: glibc
took 30 to 50 % more than was in use on the CPU (measured, benchmarks/memory.md)."""


def step_memory(config: RunConfig, machine: Machine, dtype: Dtype, micro_batch: int, chunk: int) -> Memory:
    """The memory of training by `config` on `machine`, `micro_batch` sequences at a time in `dtype`."""
    model = config.model
    weights = 4 * model.num_params() + _buffer_bytes(model)
    optimizer = _optimizer_bytes(config)
    held = max(_moments(config, dtype, micro_batch, chunk), key=lambda moment: moment.total_bytes)
    return Memory(
        baseline_bytes=machine.baseline_bytes,
        weight_bytes=weights,
        gradient_bytes=held.gradient_bytes,
        optimizer_bytes=optimizer,
        activation_bytes=held.activation_bytes,
        loss_bytes=held.loss_bytes,
        workspace_bytes=held.workspace_bytes + LIBRARY_BYTES,
        fragmentation_bytes=int(FRAGMENTATION * held.total_bytes),
        checkpoint_bytes=weights - _buffer_bytes(model) + optimizer + SAVING_BYTES,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moment:
    """What comes and goes in a step, at one instant of it."""

    gradient_bytes: int
    activation_bytes: int = 0
    loss_bytes: int = 0
    workspace_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.gradient_bytes + self.activation_bytes + self.loss_bytes + self.workspace_bytes


def _moments(config: RunConfig, dtype: Dtype, micro_batch: int, chunk: int) -> Iterator[_Moment]:
    model, length = config.model, config.batch.sequence_tokens
    tokens = micro_batch * length
    activations = activation_bytes(model, micro_batch, length, dtype)
    transient = _layer_transient_bytes(model, micro_batch, length, dtype)
    gradients = 4 * sum(p.num_elements for p in model.parameters() if p.role != "sparse_embedding")
    lookups = (len(model.ngrams.orders) if model.ngrams else 0) + (1 if model.recall else 0)
    # A sparse gradient has a row and an index for each lookup, twice while equal rows are added up.
    sparse = 2 * lookups * tokens * (4 * model.hidden_size + 8)
    # Gradients of earlier micro-batches are all there while the next one is in its forward and backward pass.
    earlier = gradients + sparse if micro_batch < config.batch.sequences else 0
    yield _Moment(
        gradient_bytes=earlier,
        activation_bytes=activations,
        loss_bytes=_loss_bytes(model, tokens, chunk, dtype),
        workspace_bytes=transient,
    )
    yield _Moment(
        gradient_bytes=max(gradients + sparse, earlier + sparse),
        activation_bytes=activations // model.num_layers,
        workspace_bytes=transient,
    )
    yield _Moment(gradient_bytes=gradients + sparse, workspace_bytes=_optimizer_work_bytes(config, dtype))


def _buffer_bytes(model: ModelSpec) -> int:
    """Every layer's table of rotations."""
    per_layer = 2 * 4 * model.context_tokens * model.attention.head_dim
    return model.num_layers * per_layer if model.attention.rope is not None else 0


def _optimizer_bytes(config: RunConfig) -> int:
    """State of the optimizers: two moments of AdamW's, one of Muon's, a number per row of a sparse table."""
    total = 0
    for parameter in config.model.parameters():
        if parameter.role == "sparse_embedding":
            total += 4 * parameter.shape[0]
        elif parameter.role == "matrix" and isinstance(config.optimizer, Muon):
            total += 4 * parameter.num_elements
        else:
            total += 8 * parameter.num_elements
    return total


def _optimizer_work_bytes(config: RunConfig, dtype: Dtype) -> int:
    """Muon takes all matrices of a shape together: their updates, two iterates in `dtype`, and two Gram matrices."""
    if not isinstance(config.optimizer, Muon):
        return 0
    counts: dict[tuple[int, ...], int] = {}
    for parameter in config.model.parameters():
        if parameter.role == "matrix":
            counts[parameter.shape] = counts.get(parameter.shape, 0) + 1
    element = BYTES_PER_ELEMENT[dtype]
    work = 0
    for (rows, columns), count in counts.items():
        updates = 4 * count * rows * columns
        iterates, grams = 2 * element * count * rows * columns, 2 * element * count * min(rows, columns) ** 2
        # The updates are made one by one, then stacked.
        work = max(work, updates + max(updates, iterates + grams))
    return work


def _loss_bytes(model: ModelSpec, tokens: int, chunk: int, dtype: Dtype) -> int:
    """The gradients of head and hidden states, made in the forward pass, and scaled copies of them in the backward
    pass; or in the forward pass the head in `dtype`, its share of a gradient, and a chunk's logits."""
    element = BYTES_PER_ELEMENT[dtype]
    head, hidden = model.vocab_size * model.hidden_size, tokens * model.hidden_size
    gradients = 4 * head + element * hidden
    cast = element * head if dtype != "float32" else 0
    forward = cast + element * head + chunk * model.vocab_size * (4 + 2 * element)
    return gradients + max(gradients, forward)


def _layer_transient_bytes(model: ModelSpec, num_sequences: int, sequence_tokens: int, dtype: Dtype) -> int:
    """What one layer's backward pass needs for itself: gradients of the residual stream, and of the inner tensors of
    its feed-forward network or its attention, whichever are more."""
    element = BYTES_PER_ELEMENT[dtype]
    tokens = num_sequences * sequence_tokens
    query = tokens * model.attention.num_heads * model.attention.head_dim
    scores = 0
    if sequence_tokens <= EXPLICIT_ATTENTION_MAX_TOKENS:
        scores = num_sequences * model.attention.num_heads * sequence_tokens**2
    inner = tokens * model.mlp.intermediate_size * (3 if model.mlp.gated else 2)
    return element * max(inner, 2 * scores + 4 * query) + (2 * 4 + element) * tokens * model.hidden_size


# --- activations ---


def activation_bytes(model: ModelSpec, num_sequences: int, sequence_tokens: int, dtype: Dtype) -> int:
    """Bytes that the decoder's forward pass keeps for its backward pass: to the byte what autograd saves on a CPU
    (a contract test compares them), weights and tables aside. The parts are those of models/."""
    tokens = num_sequences * sequence_tokens
    lookups = 1 + (len(model.ngrams.orders) if model.ngrams else 0) + (1 if model.recall else 0)
    norms = (2 if model.embedding_norm else 1) * _norm_bytes(model, tokens, dtype)
    layer = (
        2 * _norm_bytes(model, tokens, dtype)
        + _attention_bytes(model, num_sequences, sequence_tokens, dtype)
        + _mlp_bytes(model, tokens, dtype)
    )
    return 8 * lookups * tokens + norms + model.num_layers * layer


def _cast_bytes(num_elements: int, dtype: Dtype) -> int:
    """A weight's copy in `dtype`, kept for the input's gradient."""
    return 0 if dtype == "float32" else BYTES_PER_ELEMENT[dtype] * num_elements


def _norm_bytes(model: ModelSpec, tokens: int, dtype: Dtype) -> int:
    """Input and scale, float32 whatever `dtype` is; where there is a weight, what it multiplies too."""
    values = 4 * tokens * model.hidden_size
    weighted = values + _cast_bytes(model.hidden_size, dtype) if model.norm.weighted else 0
    return values + 4 * tokens + weighted


def _attention_bytes(model: ModelSpec, num_sequences: int, sequence_tokens: int, dtype: Dtype) -> int:
    attention, element = model.attention, BYTES_PER_ELEMENT[dtype]
    tokens = num_sequences * sequence_tokens
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    query, kv = heads * attention.head_dim, kv_heads * attention.head_dim
    total = element * tokens * model.hidden_size + _cast_bytes(2 * model.hidden_size * (query + kv), dtype)
    if attention.qk_norm:
        total += 4 * tokens * (query + kv + heads + kv_heads)
    if attention.rope is not None:
        total += _cast_bytes(4 * sequence_tokens * attention.head_dim, dtype)  # sines, cosines, twice
    if sequence_tokens <= EXPLICIT_ATTENTION_MAX_TOKENS:
        # Queries, keys and values of every head, what was mixed, and the probabilities.
        return total + element * (4 * tokens * query + heads * tokens * sequence_tokens)
    # The fused kernel keeps its mask in `dtype`, and a number per query.
    return total + element * (2 * tokens * (query + kv) + tokens * sequence_tokens) + 4 * tokens * heads


def _mlp_bytes(model: ModelSpec, tokens: int, dtype: Dtype) -> int:
    element, inner = BYTES_PER_ELEMENT[dtype], model.mlp.intermediate_size
    matrices, tensors = (3, 4) if model.mlp.gated else (2, 2)
    kept = element * tokens * (model.hidden_size + tensors * inner)
    return kept + _cast_bytes(matrices * model.hidden_size * inner, dtype)
