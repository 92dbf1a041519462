"""One step's time, as a sum of parts a person can read, for any number of candidates at once."""

from dataclasses import dataclass, fields

import numpy as np

from colossus.planner import network
from colossus.planner.columns import Array, Columns, soft_max
from colossus.planner.compute import attention_s, linear_s, memory_s
from colossus.planner.constants import Constants
from colossus.planner.execution import Execution, Hardware
from colossus.planner.shape import ModelShape

ALTERNATE_MATMULS = 0.5
"""Share of the matmuls that recompute "alternate" runs again."""


@dataclass(frozen=True, slots=True)
class StepParts(Columns):
    """Seconds of one step on the rank that sets the pace; the parts add up to the step."""

    matmul_s: Array
    attention_s: Array
    experts_s: Array
    """Grouped matmuls, routing, permutation."""
    elementwise_s: Array
    head_s: Array
    """Logits, loss and their gradients, as far as they lengthen the slowest stage."""
    recompute_s: Array
    launch_s: Array
    """Waiting for the host."""
    tensor_s: Array
    """Exposed communication, by axis."""
    context_s: Array
    expert_s: Array
    shard_s: Array
    data_s: Array
    pipeline_s: Array
    bubble_s: Array
    optimizer_s: Array
    straggler_s: Array
    fixed_s: Array

    @property
    def total_s(self) -> Array:
        return np.asarray(sum(getattr(self, field.name) for field in fields(self)))


def attended_keys(shape: ModelShape, sequence: Array) -> Array:
    """Keys that a query sees on average, over windowed and full layers: half of the sequence, or the window."""
    full = (sequence + 1.0) / 2.0
    window = np.minimum(shape.window, sequence)
    windowed = window - window * (window - 1.0) / (2.0 * sequence)
    share = shape.windowed_layers / shape.layers
    return np.asarray(share * windowed + (1.0 - share) * full)


def step_parts(
    shape: ModelShape, execution: Execution, hardware: Hardware, constants: Constants
) -> StepParts:
    """The parts of one step's time. All arguments broadcast against each other."""
    x, c = execution, constants
    tokens = x.micro_batch * x.sequence / x.cp
    local = tokens / np.where(x.sequence_parallel > 0, x.tp, 1.0)
    dense_share = shape.dense_layers / shape.layers
    expert_share = 1.0 - dense_share

    # --- matmuls of one layer ---
    def linear(outputs: Array, inputs: Array, rows: Array = tokens) -> tuple[Array, Array]:
        forward, backward = linear_s(rows, outputs, inputs, hardware, c)
        used = (outputs > 0) & (inputs > 0)
        return np.where(used, forward, 0.0), np.where(used, backward, 0.0)

    latent = shape.key_value_rank > 0
    projections = [
        linear(np.where(latent, 0.0, (shape.query + shape.key + shape.value) / x.tp), shape.hidden),
        linear(np.where(latent, shape.query_rank + shape.key_value_rank, 0.0), shape.hidden),
        linear(np.where(latent, shape.query / x.tp, 0.0), np.maximum(shape.query_rank, 1.0)),
        linear(np.where(latent, (shape.key + shape.value) / x.tp, 0.0), np.maximum(shape.key_value_rank, 1.0)),
        linear(shape.hidden + 0.0 * tokens, shape.attended / x.tp),
    ]

    def mlp(size: Array, rows: Array = tokens, split: Array = x.tp) -> tuple[Array, Array]:
        up = linear((shape.mlp_matrices - 1.0) * size / split, shape.hidden + 0.0 * tokens, rows)
        down = linear(np.where(size > 0, shape.hidden, 0.0) + 0.0 * tokens, np.maximum(size / split, 1.0), rows)
        return up[0] + down[0], up[1] + down[1]

    dense, shared = mlp(shape.mlp), mlp(shape.shared)
    matmul = [
        sum(p[i] for p in projections) + dense_share * dense[i] + expert_share * shared[i] for i in (0, 1)
    ]

    # --- experts: each rank's tokens are spread over all; its own experts get as many back ---
    has_experts = shape.experts > 0
    routed = tokens / x.tp * x.expert_tp * shape.top_k
    own = np.maximum(shape.experts / x.ep, 1.0)
    rows = np.where(has_experts, routed / own, 1.0)
    size = np.where(has_experts, shape.expert / x.expert_tp, 1.0)
    up = linear_s(rows, (shape.mlp_matrices - 1.0) * size, shape.hidden + 0.0 * rows, hardware, c, groups=own)
    down = linear_s(rows, shape.hidden + 0.0 * rows, size, hardware, c, groups=own)
    moved = memory_s(2.0 * routed * shape.hidden * c.expert_passes, hardware, c)
    router = linear_s(local, np.maximum(shape.experts, 1.0), shape.hidden, hardware, c, wide=True)
    gates = memory_s(
        2.0 * routed * shape.expert / x.expert_tp * shape.mlp_matrices * np.where(x.fused > 0, 1.0, c.unfused),
        hardware,
        c,
    )
    experts = [
        np.where(
            has_experts,
            expert_share * (up[i] + down[i] + router[i] + (1.0 + i) * (moved + gates) + c.expert_sync_s),
            0.0,
        )
        for i in (0, 1)
    ]

    # --- attention and elementwise passes ---
    attention = attention_s(
        tokens,
        x.sequence,
        attended_keys(shape, x.sequence),
        shape.query / x.tp,
        shape.attended / x.tp,
        shape.heads / x.tp,
        x.flash,
        x.score_traffic,
        hardware,
        c,
    )
    fusion = np.where(x.fused > 0, 1.0, c.unfused)
    passes = 2.0 * (
        local * shape.hidden * (c.hidden_passes + 2.0 * (shape.norms - 2.0)) * np.where(x.fused > 0, 1.0, c.unfused_norm)
        + fusion * tokens * (shape.query + shape.key) * 2.0 / x.tp
        + fusion * tokens * (dense_share * shape.mlp + expert_share * shape.shared) * shape.mlp_matrices / x.tp
    )
    elementwise = [(1.0 + i) * memory_s(passes, hardware, c) for i in (0, 1)]

    # --- communication of one layer ---
    activation = 2.0 * tokens * shape.hidden
    blocks = 1.0 + dense_share + expert_share * np.where(x.expert_tp > 1, 1.0, (shape.shared > 0) * 1.0)
    # Gather before and scatter after each block; with whole tensors, a sum, which is both.
    tensor = 2.0 * blocks * network.ring_s(activation, x.tp, np.ones_like(x.tp), hardware, c)
    tensor = tensor * (1.0 - c.tensor_hidden * x.overlap_tensor)
    keys_values = 2.0 * tokens * (shape.key + shape.value) / x.tp
    context = (x.cp - 1.0) * network.send_s(keys_values, x.tp, hardware, c)
    context = np.where(x.cp > 1, np.maximum(context * (1.0 - c.context_hidden), context - attention[0]), 0.0)
    dispatch = 2.0 * network.all_to_all_s(
        2.0 * tokens / x.tp * shape.top_k * shape.hidden,
        x.ep,
        x.expert_tp,
        hardware,
        c,
        copies=shape.top_k,
        one_copy=x.one_copy_per_node,
    )
    expert = np.where(has_experts, expert_share * dispatch * (1.0 - c.expert_hidden * x.overlap_experts), 0.0)

    # --- a layer, forward and backward, with what is computed again ---
    again = {
        "matmul": _choose(x.recompute, 0.0, 0.0, ALTERNATE_MATMULS, 1.0),
        "attention": _choose(x.recompute, 0.0, np.where(x.flash > 0, 0.0, 1.0), 0.0, 1.0),
        "elementwise": _choose(x.recompute, 0.0, 0.0, 1.0, 1.0),
        "network": _choose(x.recompute, 0.0, 0.0, ALTERNATE_MATMULS, 1.0),
    }
    stack = c.stack
    kernels = {
        "matmul": (matmul[0] + matmul[1]) * stack,
        "attention": (attention[0] + attention[1]) * stack,
        "experts": (experts[0] + experts[1]) * stack,
        "elementwise": (elementwise[0] + elementwise[1]) * stack,
    }
    repeated = stack * (
        again["matmul"] * (matmul[0] + experts[0])
        + again["attention"] * attention[0]
        + again["elementwise"] * elementwise[0]
    )
    busy = sum(kernels.values()) + repeated
    repeats = _choose(x.recompute, 0.0, 0.05, 0.2, 1.0 / 3.0)
    fewer = np.where(x.few_launches > 0, c.launch_fused, 1.0)
    host = c.launch_s * fewer * (1.0 + repeats) * (1.0 + c.launch_tensor * (x.tp > 1))
    launch = soft_max(busy, host + 0.0 * busy, 8.0) - busy
    tensor = tensor * (2.0 + again["network"])
    context = context * (3.0 + again["attention"])
    expert = expert * (2.0 + again["network"])

    # --- sharded weights: gathered for each micro-batch, forward and backward, ahead of use ---
    layer_weights = (
        shape.attention_weights
        + dense_share * shape.mlp_weights
        + expert_share * (shape.shared_weights + shape.expert_weights * shape.experts / x.ep * x.tp / x.expert_tp)
    ) / x.tp
    stride = x.tp * x.cp
    gather = network.ring_s(2.0 * layer_weights, x.shard, stride, hardware, c)
    scatter = network.ring_s(x.gradient_bytes * layer_weights, x.shard, stride, hardware, c)
    forward_busy = busy / 3.0
    sharded = x.sharding == 3
    gradients_too = x.sharding >= 2
    shard_forward = _exposed(gather, forward_busy, c)
    shard_backward = _exposed(gather + scatter, busy - forward_busy, c)
    shard_zero2 = _exposed(scatter, busy - forward_busy, c)
    shard = np.where(sharded, shard_forward + shard_backward, np.where(gradients_too, shard_zero2, 0.0))
    # In a pipeline, weights are gathered once a step and kept until its last micro-batch (PipelineStage with FSDP2).
    kept = (x.pp > 1) & (x.sharding >= 2)
    shard = np.where(kept, 0.0, shard)

    # --- stages ---
    most, first, last = stage_layers(shape.layers, x.pp, x.chunks)
    layer = busy + launch + tensor + context + expert + shard
    head = head_s(shape, x, hardware, c) * stack
    embedding = memory_s(2.0 * local * shape.hidden * 6.0, hardware, c)
    stage_last = last * layer + head + np.where(x.pp > 1, 0.0, embedding)
    stage_first = first * layer + embedding
    stage_most = most * layer
    slowest = np.maximum(np.maximum(stage_last, np.where(x.pp > 1, stage_first, 0.0)), np.where(x.pp > 2, stage_most, 0.0))
    others = np.where(
        x.pp > 1, stage_first + stage_last + (x.pp - 2.0) * stage_most - slowest, 0.0
    )
    bubble = others / x.chunks
    paced = np.where(slowest == stage_last, last, np.where((slowest == stage_first) & (x.pp > 1), first, most))
    passes_of_layer = x.micro_batches * paced
    hop = network.send_s(
        2.0 * tokens * shape.hidden / np.where(x.sequence_parallel > 0, x.tp, 1.0),
        x.tp * x.cp * x.data,
        hardware,
        c,
    )
    pipeline = np.where(
        x.pp > 1,
        2.0 * hop * (x.micro_batches * x.chunks * (1.0 - c.pipeline_hidden) + (x.pp - 1.0)),
        0.0,
    )

    # --- once per step: gradients, optimizer ---
    held_dense, held_expert = stage_weights(shape, x)
    ranks = x.data * x.cp
    replicas = x.data / x.shard
    sum_dense = np.where(
        x.sharding >= 2,
        # what is sharded was scattered above; replicas still sum their shards
        2.0 * network.ring_s(x.gradient_bytes * held_dense / x.shard, replicas, stride * x.shard, hardware, c),
        network.ring_s(x.gradient_bytes * held_dense, ranks, x.tp, hardware, c)
        + network.ring_s(
            np.where(x.sharding == 1, 2.0, x.gradient_bytes) * held_dense, ranks, x.tp, hardware, c
        ),
    )
    expert_ranks = np.maximum(ranks * x.tp / (x.ep * x.expert_tp), 1.0)
    sum_expert = np.where(
        x.sharding >= 2,
        0.0,
        network.ring_s(
            (x.gradient_bytes + np.where(x.sharding == 1, 2.0, x.gradient_bytes)) * held_expert,
            expert_ranks,
            x.ep * x.expert_tp,
            hardware,
            c,
        ),
    )
    gathered_once = np.where(
        kept,
        network.ring_s((2.0 + x.gradient_bytes) * (held_dense + held_expert), x.shard, stride, hardware, c),
        0.0,
    )
    summed = sum_dense + sum_expert + gathered_once
    one_pass = paced * layer / x.chunks
    hidden = np.minimum(summed * c.data_hidden, one_pass) * x.overlap_data
    data = summed - hidden
    owners = np.where(x.sharding >= 1, np.where(x.sharding == 1, ranks, x.shard), 1.0)
    expert_owners = np.where(x.sharding >= 1, np.minimum(expert_ranks, owners), 1.0)
    optimizer = memory_s(c.optimizer_bytes * (held_dense / owners + held_expert / expert_owners), hardware, c)

    nodes = np.maximum(x.tp * x.cp * x.data * x.pp / 8.0, 1.0)
    parts = StepParts(
        matmul_s=passes_of_layer * kernels["matmul"],
        attention_s=passes_of_layer * kernels["attention"],
        experts_s=passes_of_layer * kernels["experts"],
        elementwise_s=passes_of_layer * kernels["elementwise"],
        head_s=x.micro_batches * (slowest - paced * layer),
        recompute_s=passes_of_layer * repeated,
        launch_s=passes_of_layer * launch,
        tensor_s=passes_of_layer * tensor,
        context_s=passes_of_layer * context,
        expert_s=passes_of_layer * expert,
        shard_s=passes_of_layer * shard,
        data_s=data,
        pipeline_s=pipeline,
        bubble_s=bubble,
        optimizer_s=optimizer,
        straggler_s=np.zeros_like(data),
        fixed_s=c.step_s + 0.0 * data,
    )
    lag = c.straggler * np.log2(nodes) * parts.total_s
    return StepParts(**{f.name: getattr(parts, f.name) for f in fields(parts) if f.name != "straggler_s"}, straggler_s=lag)


def _choose(index: Array, *values: Array | float) -> Array:
    return np.asarray(np.select([index == i for i in range(len(values))], values))


def _exposed(network_s: Array, busy_s: Array, constants: Constants) -> Array:
    """What a transfer beside `busy_s` of compute adds: what does not fit, and what it slows."""
    return np.asarray(
        soft_max(busy_s, network_s, 8.0) - busy_s + constants.shard_contention * np.minimum(network_s, busy_s)
    )


def stage_layers(layers: Array, pp: Array, chunks: Array) -> tuple[Array, Array, Array]:
    """Layers of the fullest, the first and the last stage.

    What is missing to full stages is left out at the last stage and at the first one, which have the head and
    the embedding to carry: 126 layers over 16 stages are 7, 8, … 8, 7.
    """
    most = np.ceil(layers / (pp * chunks) - 1e-9) * chunks
    missing = np.where(pp > 1, most * pp - layers, 0.0)
    last = np.maximum(most - np.ceil(missing / 2.0), 0.0)
    first = np.maximum(most - np.floor(missing / 2.0), 0.0)
    single = pp <= 1
    return (
        np.where(single, layers, most),
        np.where(single, layers, first),
        np.where(single, layers, last),
    )


def head_s(shape: ModelShape, x: Execution, hardware: Hardware, c: Constants) -> Array:
    """Seconds of logits, loss and their gradients for one micro-batch, split over tensor-parallel ranks."""
    tokens = x.micro_batch * x.sequence / x.cp
    forward, backward = linear_s(tokens, shape.vocab / x.tp, shape.hidden, hardware, c, wide=True)
    return forward + backward + memory_s(4.0 * tokens * shape.vocab / x.tp * c.loss_passes, hardware, c)


def stage_weights(shape: ModelShape, x: Execution) -> tuple[Array, Array]:
    """Weights that the fullest rank holds before any sharding: (dense part, its experts)."""
    most, first, last = stage_layers(shape.layers, x.pp, x.chunks)
    expert_share = shape.expert_layers / shape.layers
    per_layer = (
        shape.attention_weights + (1.0 - expert_share) * shape.mlp_weights + expert_share * shape.shared_weights
    )
    table = shape.embedding_weights
    tables = np.where(x.pp > 1, 1.0, 2.0 - shape.tied)
    ends = np.maximum(first, last) * per_layer + tables * table
    dense = np.maximum(ends, np.where(x.pp > 2, most * per_layer, 0.0)) / x.tp
    experts = most * expert_share * shape.expert_weights * shape.experts / (x.ep * x.expert_tp)
    return dense, experts
