"""What one rank holds in memory at the peak of a training step, counted from the model's specification.

What stays (weights, optimizer state, checkpoint copy) is counted exactly. What comes and goes is counted at the
moments that can be the peak, and the largest counts: in the loss and as the backward pass begins, when all activations
are there; as it ends, when all gradients are; and in the optimizer, which needs room of its own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from colossus.planner.one_rank.activations import (
    FLOAT32,
    INT64,
    Shape,
    activation_bytes,
    is_fused,
    layer_activation_bytes,
)
from colossus.spec.model import (
    BYTES_PER_ELEMENT,
    AttentionSpec,
    Dtype,
    LatentAttentionSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)
from colossus.spec.rank import Machine, Memory
from colossus.spec.run import Muon, RunConfig

BLOCK_QUERIES = 512
"""Queries of one block, where long attention has no fused kernel; as in models/attend.py."""
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
    shape = Shape(micro_batch, length, dtype)
    has_losses = config.routing.balance_loss > 0 or config.routing.z_loss > 0
    activations = activation_bytes(model, micro_batch, length, dtype, router_losses=has_losses)
    groups = model.layer_groups()
    # The backward pass begins in the last layer and ends in the first.
    first, last = groups[0].mlp, groups[-1].mlp
    gradients = FLOAT32 * sum(
        p.num_elements for p in model.parameters() if p.role not in ("sparse_embedding", "balance")
    )
    lookups = (len(model.ngrams.orders) if model.ngrams else 0) + (1 if model.recall else 0)
    # A sparse gradient has a row and an index for each lookup, twice while equal rows are added up.
    sparse = 2 * lookups * shape.tokens * (FLOAT32 * model.hidden_size + INT64)
    # Gradients of earlier micro-batches are all there while the next one is in its forward and backward pass.
    earlier = gradients + sparse if micro_batch < config.batch.sequences else 0
    loss_gradients, loss_forward = _loss_bytes(config, shape, chunk)
    yield _Moment(
        gradient_bytes=earlier, activation_bytes=activations, loss_bytes=loss_gradients + loss_forward
    )
    yield _Moment(
        gradient_bytes=earlier,
        activation_bytes=activations,
        loss_bytes=loss_gradients,
        workspace_bytes=_layer_transient_bytes(model, last, shape),
    )
    yield _Moment(
        gradient_bytes=max(gradients + sparse, earlier + sparse),
        activation_bytes=layer_activation_bytes(model, first, shape, router_losses=has_losses),
        workspace_bytes=_layer_transient_bytes(model, first, shape),
    )
    yield _Moment(gradient_bytes=gradients + sparse, workspace_bytes=_optimizer_work_bytes(config, dtype))


def _buffer_bytes(model: ModelSpec) -> int:
    """The frequencies of rotations, float64; and every mixture's count of its experts' tokens."""
    attention, total = model.attention, 0
    if attention.rope is not None:
        turned = attention.rope_head_dim if isinstance(attention, LatentAttentionSpec) else attention.head_dim
        total += 8 * (int(attention.rope.rotated_fraction * turned) // 2)
    for group in model.layer_groups():
        if isinstance(group.mlp, MoeSpec):
            total += group.num_layers * FLOAT32 * group.mlp.num_experts
    return total


def _optimizer_bytes(config: RunConfig) -> int:
    """State of the optimizers: two moments of AdamW's, one of Muon's, a number per row of a sparse table."""
    total = 0
    for parameter in config.model.parameters():
        if parameter.role == "balance":
            continue  # moved by loads, which are no state
        if parameter.role == "sparse_embedding":
            total += 4 * parameter.shape[0]
        elif parameter.role == "matrix" and isinstance(config.optimizer, Muon):
            total += 4 * parameter.num_elements
        else:
            total += 8 * parameter.num_elements
    return total


def _optimizer_work_bytes(config: RunConfig, dtype: Dtype) -> int:
    """Muon takes all matrices of a shape together, every expert's among them: their updates, two iterates in `dtype`,
    and two Gram matrices."""
    if not isinstance(config.optimizer, Muon):
        return 0
    counts: dict[tuple[int, ...], int] = {}
    for parameter in config.model.parameters():
        if parameter.role == "matrix":
            counts[parameter.shape] = counts.get(parameter.shape, 0) + 1
    element = BYTES_PER_ELEMENT[dtype]
    work = 0
    for (*stack, rows, columns), num_parameters in counts.items():
        count = num_parameters * math.prod(stack)
        updates = element * count * rows * columns
        iterates, grams = 2 * element * count * rows * columns, 2 * element * count * min(rows, columns) ** 2
        # The updates are made one by one, then stacked.
        work = max(work, updates + max(updates, iterates + grams))
    return work


def _loss_bytes(config: RunConfig, shape: Shape, chunk: int) -> tuple[int, int]:
    """The gradients of head and hidden states, made in the forward pass; and what that needs beside them: the head in
    `dtype`, its share of a gradient, and a chunk's logits; or, in the backward pass, scaled copies of the gradients."""
    model = config.model
    head = model.vocab_size * model.hidden_size
    gradients = FLOAT32 * head + shape.values(model.hidden_size)
    # Logits, probabilities and their gradient; what a cap squashed and its slope; what the z-loss adds.
    per_logit = FLOAT32 + 2 * shape.element
    per_logit += 0 if model.logit_soft_cap is None else shape.element + FLOAT32
    per_logit += FLOAT32 if config.z_loss else 0
    forward = shape.cast(head) + shape.element * head + chunk * model.vocab_size * per_logit
    return gradients, max(gradients, forward)


# --- a layer's backward pass ---


def _layer_transient_bytes(model: ModelSpec, mlp: MlpSpec | MoeSpec, shape: Shape) -> int:
    """What one layer's backward pass needs for itself: gradients of the residual stream, and of the inner tensors of
    its feed-forward network or its attention, whichever are more."""
    residual = (2 * FLOAT32 + shape.element) * shape.tokens * model.hidden_size
    return residual + max(_mlp_transient(model.hidden_size, mlp, shape), _attention_transient(model, shape))


def _mlp_transient(hidden: int, mlp: MlpSpec | MoeSpec, shape: Shape) -> int:
    """Gradients of what the activation takes and gives, and what it computes again for them; less the tensor that it
    gave, which is free by then."""
    tensors = {"swiglu": 2, "geglu": 2, "clamped_swiglu": 6, "gelu": 1, "squared_relu": 1}[mlp.activation]
    if not isinstance(mlp, MoeSpec):
        return shape.values(tensors * mlp.intermediate_size)
    # Rows that are sorted, weighted and summed have gradients too, two or three at a time.
    return shape.values(mlp.top_k * max(tensors * mlp.intermediate_size + hidden, 3 * hidden))


def _attention_transient(model: ModelSpec, shape: Shape) -> int:
    """Gradients of queries, keys, values and what was mixed; those of probabilities and scores, where they are."""
    attention, keys = model.attention, shape.sequence_tokens
    query = attention.num_heads * attention.head_dim
    squares = 2
    if isinstance(attention, AttentionSpec):
        extra = (attention.score_temperature_tokens is not None) or attention.sinks
        squares += 2 if attention.score_soft_cap is not None else 1 if extra else 0
    per_query = attention.num_heads * keys
    if shape.short:
        return shape.values(4 * query + squares * per_query)
    if is_fused(attention, shape):
        return shape.values(4 * query)
    # One block's scores are made again, and kept until their gradients are there.
    block = shape.element * shape.num_sequences * min(BLOCK_QUERIES, keys) * per_query
    return shape.values(6 * query) + (squares + 2) * block
