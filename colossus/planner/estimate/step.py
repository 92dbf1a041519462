"""One step's time, as a sum of parts a person can read, for any number of candidates at once."""

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from colossus.planner.estimate import network
from colossus.planner.estimate.columns import Array, Columns, soft_max
from colossus.planner.estimate.compute import memory_s
from colossus.planner.estimate.constants import Constants
from colossus.planner.estimate.execution import Execution, Hardware
from colossus.planner.estimate.layers import (
    LayerTimes,
    accumulated_bytes,
    attended_keys,
    head_s,
    layer_times,
    layer_weights,
)
from colossus.planner.estimate.measured_parts import measured_gradients_s
from colossus.planner.estimate.orthogonal import TRAFFIC, matrix_weights, orthogonal_s
from colossus.planner.estimate.shape import ModelShape

__all__ = [
    "StepParts",
    "attended_keys",
    "head_s",
    "stage_layers",
    "stage_weights",
    "step_parts",
    "step_parts_of",
]


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


def step_parts(
    shape: ModelShape, execution: Execution, hardware: Hardware, constants: Constants
) -> StepParts:
    """The parts of one step's time. All arguments broadcast against each other."""
    layers = layer_times(shape, execution, hardware, constants)
    return step_parts_of(layers, shape, execution, hardware, constants)


def step_parts_of(
    layers: LayerTimes, shape: ModelShape, execution: Execution, hardware: Hardware, constants: Constants
) -> StepParts:
    """The same from the times of the candidates' layers, where many candidates share them (`unique_layers`)."""
    x, c = execution, constants
    weights = layer_weights(shape, x)
    accumulate = memory_s(accumulated_bytes(x, hardware) * weights, hardware, c) * c.stack
    if hardware.measured is not None:
        accumulate = measured_gradients_s(x, weights, hardware.measured, hardware.dtype)
    busy = layers.busy_s + accumulate
    # While attention waits for keys and values, or the chip for its next kernel, gathers go on behind that too.
    shard = _sharded_s(x, weights, busy + layers.launch_s + layers.context_s, hardware, c)
    exposed = layers.launch_s + layers.tensor_s + layers.context_s + layers.expert_s + shard
    layer = busy + exposed

    # --- stages ---
    most, first, last = stage_layers(shape.layers, x.pp, x.chunks)
    several = x.pp > 1
    stage_last = last * layer + layers.head_s + np.where(several, 0.0, layers.embedding_s)
    stage_first = np.where(several, first * layer + layers.embedding_s, 0.0)
    stage_most = np.where(x.pp > 2, most * layer, 0.0)
    slowest = np.maximum(np.maximum(stage_last, stage_first), stage_most)
    others = np.where(several, stage_first + stage_last + (x.pp - 2.0) * stage_most - slowest, 0.0)
    paced = np.where(slowest == stage_last, last, np.where(slowest == stage_first, first, most))
    times = x.micro_batches * paced

    held_dense, held_expert = stage_weights(shape, x)
    summed, gathered = _summed_s(x, held_dense, held_expert, hardware, c)
    data = np.where(x.overlap_data > 0, _exposed(summed, slowest / x.chunks, c), summed) + gathered
    parts = StepParts(
        matmul_s=times * layers.matmul_s,
        attention_s=times * layers.attention_s,
        experts_s=times * layers.experts_s,
        elementwise_s=times * (layers.elementwise_s + accumulate),
        head_s=x.micro_batches * (slowest - paced * layer),
        recompute_s=times * layers.recompute_s,
        launch_s=times * layers.launch_s,
        tensor_s=times * layers.tensor_s,
        context_s=times * layers.context_s,
        expert_s=times * layers.expert_s,
        shard_s=times * shard,
        data_s=data,
        pipeline_s=_pipeline_s(shape, x, hardware, c),
        bubble_s=others / x.chunks,
        optimizer_s=_optimizer_s(shape, x, held_dense, held_expert, hardware, c),
        straggler_s=np.zeros_like(data),
        fixed_s=c.step_s + 0.0 * data,
    )
    nodes = np.maximum(x.tp * x.cp * x.data * x.pp / 8.0, 1.0)
    parts = replace(parts, straggler_s=c.straggler * np.log2(nodes) * parts.total_s)
    length = parts.total_s.shape  # a part that no candidate has is one zero so far
    return StepParts(**{f.name: np.broadcast_to(getattr(parts, f.name), length) for f in fields(parts)})


def _exposed(network_s: Array, busy_s: Array, constants: Constants) -> Array:
    """What a transfer beside `busy_s` of compute adds: what does not fit, and what it slows."""
    return np.asarray(
        soft_max(busy_s, network_s, 8.0) - busy_s + constants.contention * np.minimum(network_s, busy_s)
    )


def _kept(x: Execution) -> npt.NDArray[np.bool_]:
    """In a pipeline, sharded weights are gathered once a step and kept until its last micro-batch."""
    return np.asarray((x.pp > 1) & (x.sharding >= 2))


def _weight_bytes(hardware: Hardware) -> Array:
    """Bytes of a gathered weight: what matmuls take."""
    return hardware.activation_bytes - hardware.narrow


def _sharded_s(x: Execution, weights: Array, busy: Array, hardware: Hardware, c: Constants) -> Array:
    """Seconds per layer and micro-batch of gathering weights ahead of use and scattering gradients."""
    if not np.any((x.sharding >= 2) & (x.pp <= 1)):
        return np.zeros(())
    stride = x.tp * x.cp
    gather = network.ring_s(_weight_bytes(hardware) * weights, x.shard, stride, hardware, c)
    scatter = network.ring_s(x.gradient_bytes * weights, x.shard, stride, hardware, c)
    forward_busy = busy / 3.0
    backward_busy = busy - forward_busy
    whole = _exposed(gather, forward_busy, c) + _exposed(gather + scatter, backward_busy, c)
    shard = np.where(x.sharding == 3, whole, _exposed(scatter, backward_busy, c))
    return np.where((x.sharding >= 2) & ~_kept(x), shard, 0.0)


def _pipeline_s(shape: ModelShape, x: Execution, hardware: Hardware, c: Constants) -> Array:
    """Exposed seconds of messages between stages, two for each micro-batch and chunk.

    Between nodes the host waits for both sides of a message. Where chunks interleave, it does so beside compute.
    """
    if not np.any(x.pp > 1):
        return np.zeros(())
    message = hardware.activation_bytes * x.micro_batch * x.sequence / x.cp * shape.hidden
    message = message / np.where(x.sequence_parallel > 0, x.tp, 1.0)
    stride = x.tp * x.cp * np.where(x.whole_groups > 0, x.shard, x.data)
    host = c.hop_s * np.where(x.few_launches > 0, c.launch_fused, 1.0)
    hop = network.send_s(message, x.pp, stride, hardware, c)
    hop = hop + np.where(x.pp * stride > hardware.scale_up_chips, host, 0.0)
    exposed = np.where(x.chunks > 1, 1.0 - c.pipeline_hidden, 1.0)
    return np.where(x.pp > 1, 2.0 * hop * (x.micro_batches * x.chunks * exposed + x.pp - 1.0), 0.0)


def _summed_s(
    x: Execution, dense: Array, experts: Array, hardware: Hardware, c: Constants
) -> tuple[Array, Array]:
    """Seconds of what happens to gradients and weights once a step: (what can run beside the backward pass, what
    cannot).

    Whole gradients are summed. Those of a sharded optimizer are scattered within the ranks that share one copy,
    summed over its replicas, and the new weights gathered again: beside the next forward pass where software
    captures its launches ahead, else while all wait.
    """
    stride, ranks = x.tp * x.cp, x.data * x.cp
    owners = _owners(x)
    between = np.where(x.whole_groups > 0, x.pp, 1.0)  # a replica's stages stand between it and the next one
    gathered_bytes = np.where(x.sharding == 1, _weight_bytes(hardware), x.gradient_bytes)
    # What is sharded further was scattered with each micro-batch; replicas still sum their shards.
    shards = x.gradient_bytes * dense / x.shard
    replicas_s = network.all_reduce_s(shards, x.data / x.shard, stride * x.shard * between, hardware, c)
    scatter_s = network.ring_s(x.gradient_bytes * dense, owners, x.tp, hardware, c) + network.all_reduce_s(
        x.gradient_bytes * dense / owners, ranks / owners, x.tp * owners * between, hardware, c
    )
    gather_s = network.ring_s(gathered_bytes * dense, owners, x.tp, hardware, c)
    waits = (x.sharding == 1) & (x.few_launches == 0)
    expert_ranks = np.maximum(ranks * x.tp / (x.ep * x.expert_tp), 1.0)
    expert_bytes = np.where(x.sharding >= 2, 0.0, (x.gradient_bytes + gathered_bytes) * experts)
    experts_s = network.ring_s(expert_bytes, expert_ranks, x.ep * x.expert_tp, hardware, c)
    experts_s = np.where((x.sharding >= 2) | (experts <= 0), 0.0, experts_s)
    once = (_weight_bytes(hardware) + x.gradient_bytes) * (dense + experts)
    once_s = np.where(_kept(x), network.ring_s(once, x.shard, stride, hardware, c), 0.0)
    dense_s = np.where(x.sharding >= 2, replicas_s, scatter_s + np.where(waits, 0.0, gather_s))
    return (
        dense_s + experts_s + once_s,
        np.where(waits, gather_s + _handed_on_s(x, dense, hardware, c), 0.0),
    )


def _owners(x: Execution) -> Array:
    """Data-parallel ranks that share one optimizer of a dense weight, where that is all that is sharded; else
    all that sum its gradient, and stand side by side."""
    apart = (x.sharding == 1) | ((x.whole_groups > 0) & (x.pp > 1))
    return np.where(apart, x.shard, x.data) * x.cp


def _handed_on_s(x: Execution, dense: Array, hardware: Hardware, c: Constants) -> Array:
    """Seconds that a sharded optimizer's gradients and weights are on their way from node to node, beyond what
    their bytes take.

    Each bucket passes all nodes of a ring one after the other, which grows with weights × nodes, and each of these
    steps waits for the slowest of the nodes: a square root more, as measured on 8 to 64 nodes (13 to 30 billion
    weights, arXiv:2311.05610). Software that sums and gathers beside compute sizes its buckets by the number of
    ranks for this reason. `bucket_s` is of 16 nodes.
    """
    owners = _owners(x)
    nodes = owners / network.members_inside(owners, x.tp, hardware)
    return np.asarray(c.bucket_s * dense / 1e9 * (nodes - 1.0) * np.sqrt(nodes / 16.0))


def _optimizer_s(
    shape: ModelShape, x: Execution, dense: Array, experts: Array, hardware: Hardware, c: Constants
) -> Array:
    """Seconds of the optimizer's passes over its part of the weights; of Muon also its products and exchanges, for
    which all wait."""
    ranks = x.data * x.cp
    expert_ranks = np.maximum(ranks * x.tp / (x.ep * x.expert_tp), 1.0)
    owners = np.where(x.sharding >= 1, np.where(x.sharding == 1, _owners(x), x.shard), 1.0)
    expert_owners = np.where(x.sharding >= 1, np.minimum(expert_ranks, owners), 1.0)
    weights = dense / owners + experts / expert_owners
    orthogonal: Array = np.zeros(())
    if np.any(x.muon > 0):
        most, _, _ = stage_layers(shape.layers, x.pp, x.chunks)
        in_dense, in_experts = matrix_weights(shape, x)
        matrices = most * (in_dense / owners + in_experts / expert_owners)
        weights = weights + np.where(x.muon > 0, (TRAFFIC - 1.0) * matrices, 0.0)
        products, exchanges = orthogonal_s(shape, x, most, hardware, c)
        orthogonal = np.where(x.muon > 0, products + exchanges, 0.0)
    if hardware.measured is not None:
        return hardware.measured.operation_s("optimizer", weights, hardware.dtype) + orthogonal
    return memory_s(c.optimizer_bytes * weights, hardware, c) + orthogonal


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


def stage_weights(shape: ModelShape, x: Execution) -> tuple[Array, Array]:
    """Weights that the fullest rank holds before any sharding: (dense part, its experts)."""
    most, first, last = stage_layers(shape.layers, x.pp, x.chunks)
    expert_share = shape.expert_layers / shape.layers
    per_layer = (
        shape.attention_weights
        + (1.0 - expert_share) * shape.mlp_weights
        + expert_share * shape.shared_weights
    )
    table = shape.embedding_weights
    tables = np.where(x.pp > 1, 1.0, 2.0 - shape.tied)
    ends = np.maximum(first, last) * per_layer + tables * table
    dense = np.maximum(ends, np.where(x.pp > 2, most * per_layer, 0.0)) / x.tp
    experts = most * expert_share * shape.expert_weights * shape.experts / (x.ep * x.expert_tp)
    return dense, experts
