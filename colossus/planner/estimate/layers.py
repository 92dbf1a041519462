"""Time of one layer, of the head and of the embedding on one rank, for one micro-batch, forward and backward.

It depends on few columns of a candidate (LAYER_COLUMNS), so that a search computes it once for each distinct
set of them and puts steps together from it (step.py).
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from colossus.planner.estimate import network
from colossus.planner.estimate.columns import Array, Columns, soft_max
from colossus.planner.estimate.compute import attention_s, linear_s, memory_s
from colossus.planner.estimate.constants import Constants
from colossus.planner.estimate.execution import Execution, Hardware
from colossus.planner.estimate.measured_parts import (
    measured_elementwise_s,
    measured_entry_s,
    measured_loss_s,
)
from colossus.planner.estimate.shape import ModelShape

ALTERNATE_MATMULS = 0.5
"""Share of the matmuls that recompute "alternate" runs again."""
MERGED_FORWARD_BYTES, MERGED_BACKWARD_BYTES = 16.0, 8.0
"""Around a ring of context-parallel ranks, each further part's result is added to the sum so far: read and written
in 4 bytes, with its share of the softmax; backward, gradients of queries, keys and values are, in 4 bytes."""
LAYER_COLUMNS: Final = (
    "sequence", "micro_batch", "tp", "cp", "ep", "expert_tp", "recompute", "sequence_parallel", "flash", "fused",
    "few_launches", "score_traffic", "overlap_tensor", "overlap_experts", "one_copy_per_node", "gradient_bytes",
    "exchange",
)  # fmt: skip
"""Columns of Execution that LayerTimes depends on, besides shape, hardware and constants."""


@dataclass(frozen=True, slots=True)
class LayerTimes(Columns):
    """Seconds on one rank for one micro-batch, forward and backward, averaged over a model's layers."""

    matmul_s: Array
    attention_s: Array
    experts_s: Array
    elementwise_s: Array
    recompute_s: Array
    launch_s: Array
    tensor_s: Array
    context_s: Array
    expert_s: Array
    head_s: Array
    """Logits, loss and their gradients, once a micro-batch."""
    embedding_s: Array

    @property
    def busy_s(self) -> Array:
        """The chip's own work on a layer."""
        return np.asarray(
            self.matmul_s + self.attention_s + self.experts_s + self.elementwise_s + self.recompute_s
        )


def unique_layers(execution: Execution) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Rows with distinct LAYER_COLUMNS, and for each row its place among them.

    `layer_times` of `execution.take(rows)`, then `.take(places)`, is that of all rows, where shape, hardware and
    constants are shared by all (else their columns must be told apart too).
    """
    length = int(np.broadcast(*(getattr(execution, name) for name in LAYER_COLUMNS)).size)
    code, size = np.zeros(length, dtype=np.int64), 1
    for name in LAYER_COLUMNS:
        column = getattr(execution, name)
        if np.ndim(column) == 0:
            continue
        values, place = np.unique(column, return_inverse=True)
        if len(values) == 1:
            continue
        if size > 2**62 // len(values):
            distinct, code = np.unique(code, return_inverse=True)
            code, size = code.reshape(-1), len(distinct)
        code, size = code * len(values) + place.reshape(-1), size * len(values)
    _, rows, places = np.unique(code, return_index=True, return_inverse=True)
    return rows, places.reshape(-1)


def layer_times(
    shape: ModelShape, execution: Execution, hardware: Hardware, constants: Constants
) -> LayerTimes:
    """All arguments broadcast against each other."""
    x, c = execution, constants
    tokens = x.micro_batch * x.sequence / x.cp
    matmul = _matmuls(shape, x, tokens, hardware, c)
    experts = _experts(shape, x, tokens, hardware, c)
    attention = _attention(shape, x, tokens, hardware, c)
    elementwise = _elementwise(shape, x, tokens, hardware, c)
    again_matmul = choose(x.recompute, 0.0, 0.0, ALTERNATE_MATMULS, 1.0)
    again_attention = choose(x.recompute, 0.0, np.where(x.flash > 0, 0.0, 1.0), 0.0, 1.0)
    again_elementwise = choose(x.recompute, 0.0, 0.0, 1.0, 1.0)
    repeated = (
        again_matmul * (matmul[0] + experts[0])
        + again_attention * attention[0]
        + again_elementwise * elementwise[0]
    )
    beside = (attention[0] * c.stack, attention[1] * c.stack)
    context = _context(shape, x, tokens, beside, again_attention, hardware, c)
    local = tokens / np.where(x.sequence_parallel > 0, x.tp, 1.0)
    times = LayerTimes(
        matmul_s=np.asarray((matmul[0] + matmul[1]) * c.stack),
        attention_s=np.asarray((attention[0] + attention[1]) * c.stack),
        experts_s=np.asarray((experts[0] + experts[1]) * c.stack),
        elementwise_s=np.asarray((elementwise[0] + elementwise[1]) * c.stack),
        recompute_s=np.asarray(repeated * c.stack),
        launch_s=np.zeros(()),
        tensor_s=_tensor(shape, x, tokens, hardware, c) * (2.0 + again_matmul),
        context_s=context,
        expert_s=_dispatch(shape, x, tokens, hardware, c) * (2.0 + again_matmul),
        head_s=head_s(shape, x, hardware, c) * c.stack,
        embedding_s=_embedding_s(shape, x, tokens, local, hardware, c),
    )
    queued = times.busy_s + times.tensor_s + times.context_s + times.expert_s
    return replace(times, launch_s=_launch(x, queued, c))


def choose(index: Array, *values: Array | float) -> Array:
    """By each row's index, its entry of `values`."""
    return np.asarray(np.select([index == i for i in range(len(values))], values))


def gradient_traffic(x: Execution, hardware: Hardware) -> Array:
    """Bytes per weight by which its gradient's matmul passes memory.

    Where one kernel adds it to the micro-batches' sum, that is read and written; else it is written once
    (and added by a pass of its own, `accumulated_bytes`).
    """
    return np.where(x.few_launches > 0, 2.0 * x.gradient_bytes, hardware.activation_bytes)


def _embedding_s(
    shape: ModelShape, x: Execution, tokens: Array, local: Array, hardware: Hardware, c: Constants
) -> Array:
    """Seconds of what comes before the first layer, for one micro-batch, forward and backward."""
    if hardware.measured is not None:
        return measured_entry_s(shape, x, tokens, local, hardware, c)
    return memory_s(hardware.activation_bytes * local * shape.hidden * 6.0, hardware, c)


def accumulated_bytes(x: Execution, hardware: Hardware) -> Array:
    """Bytes per weight of a pass that adds a gradient to its sum; shards of sums are too small to count."""
    moved = hardware.activation_bytes + 2.0 * x.gradient_bytes
    return np.where((x.few_launches == 0) & (x.sharding < 3), moved, 0.0)


def layer_weights(shape: ModelShape, x: Execution) -> Array:
    """Weights of a layer on one rank before sharding, averaged over dense and expert layers."""
    expert_share = shape.expert_layers / shape.layers
    every = shape.attention_weights + (1.0 - expert_share) * shape.mlp_weights
    every = every + expert_share * shape.shared_weights
    experts = expert_share * shape.expert_weights * shape.experts / (x.ep * x.expert_tp)
    return np.asarray(every / x.tp + experts)


def attended_keys(shape: ModelShape, sequence: Array) -> Array:
    """Keys that a query sees on average, over windowed and full layers: half of the sequence, or the window."""
    full = (sequence + 1.0) / 2.0
    window = np.minimum(shape.window, sequence)
    windowed = window - window * (window - 1.0) / (2.0 * sequence)
    share = shape.windowed_layers / shape.layers
    return np.asarray(share * windowed + (1.0 - share) * full)


def head_s(shape: ModelShape, x: Execution, hardware: Hardware, c: Constants) -> Array:
    """Seconds of logits, loss and their gradients for one micro-batch, split over tensor-parallel ranks."""
    tokens = x.micro_batch * x.sequence / x.cp
    if hardware.measured is not None:
        return measured_loss_s(shape, x, tokens, hardware, c)
    traffic = gradient_traffic(x, hardware)
    forward, backward = linear_s(
        tokens, shape.vocab / x.tp, shape.hidden, hardware, c, wide=True, gradient_bytes=traffic
    )
    return forward + backward + memory_s(4.0 * tokens * shape.vocab / x.tp * c.loss_passes, hardware, c)


Passes = tuple[Array, Array]
"""Seconds forward and backward."""


def _matmuls(shape: ModelShape, x: Execution, tokens: Array, hardware: Hardware, c: Constants) -> Passes:
    """Projections of attention and MLPs; a size of 0 takes no time."""
    traffic = gradient_traffic(x, hardware)
    one = np.ones_like(tokens * x.tp)
    forward, backward = np.zeros(()), np.zeros(())

    def add(outputs: Array, inputs: Array, share: Array | float = 1.0) -> None:
        nonlocal forward, backward
        used = (outputs > 0) & (inputs > 0)
        if not np.any(used):
            return
        sizes = (np.where(used, outputs, 1.0) * one, np.where(used, inputs, 1.0) * one)
        there, back = linear_s(tokens * one, *sizes, hardware, c, gradient_bytes=traffic)
        forward = forward + np.where(used, there, 0.0) * share
        backward = backward + np.where(used, back, 0.0) * share

    latent = shape.key_value_rank > 0
    add(np.where(latent, 0.0, (shape.query + shape.key + shape.value) / x.tp), shape.hidden)
    add(np.where(latent, shape.query_rank + shape.key_value_rank, 0.0), shape.hidden)
    add(np.where(latent, shape.query / x.tp, 0.0), shape.query_rank)
    add(np.where(latent, (shape.key + shape.value) / x.tp, 0.0), shape.key_value_rank)
    add(shape.hidden, shape.attended / x.tp)
    dense = shape.dense_layers / shape.layers
    for size, share in ((shape.mlp, dense), (shape.shared, 1.0 - dense)):
        add((shape.mlp_matrices - 1.0) * size / x.tp, shape.hidden, share)
        add(np.where(size > 0, shape.hidden, 0.0), size / x.tp, share)
    return forward, backward


def _experts(shape: ModelShape, x: Execution, tokens: Array, hardware: Hardware, c: Constants) -> Passes:
    """Each rank's tokens are spread over all; its own experts get as many back, evenly."""
    has = shape.experts > 0
    if not np.any(has):
        return np.zeros(()), np.zeros(())
    traffic = gradient_traffic(x, hardware)
    local = tokens / np.where(x.sequence_parallel > 0, x.tp, 1.0)
    routed = tokens / x.tp * x.expert_tp * shape.top_k
    own = np.maximum(shape.experts / x.ep, 1.0)
    rows = np.where(has, routed / own, 1.0)
    size = np.where(has, shape.expert / x.expert_tp, 1.0)
    hidden = shape.hidden + 0.0 * rows
    outputs = (shape.mlp_matrices - 1.0) * size
    up = linear_s(rows, outputs, hidden, hardware, c, groups=own, gradient_bytes=traffic)
    down = linear_s(rows, hidden, size, hardware, c, groups=own, gradient_bytes=traffic)
    router = linear_s(local, np.maximum(shape.experts, 1.0), shape.hidden, hardware, c, wide=True)
    moved = memory_s(hardware.activation_bytes * routed * shape.hidden * c.expert_passes, hardware, c)
    unfused = np.where(x.fused > 0, 1.0, c.unfused)
    gates = memory_s(hardware.activation_bytes * routed * size * shape.mlp_matrices * unfused, hardware, c)
    share = np.where(has, shape.expert_layers / shape.layers, 0.0)
    forward, backward = (
        share * (up[i] + down[i] + router[i] + (1.0 + i) * (moved + gates) + c.expert_sync_s) for i in (0, 1)
    )
    return forward, backward


def _attention(shape: ModelShape, x: Execution, tokens: Array, hardware: Hardware, c: Constants) -> Passes:
    # What one kernel sees at once: a rank's queries with one rank's keys. A measured chip's curves hold whole squares.
    kernel = x.sequence / x.cp if hardware.measured is None else x.sequence
    forward, backward = attention_s(
        tokens,
        kernel,
        attended_keys(shape, x.sequence),
        shape.query / x.tp,
        shape.attended / x.tp,
        shape.heads / x.tp,
        x.flash,
        x.score_traffic,
        hardware,
        c,
    )
    merged = (x.cp - 1.0) * tokens / x.tp
    gradients = merged * (shape.query + shape.key + shape.value)
    return (
        forward + memory_s(merged * MERGED_FORWARD_BYTES * shape.attended, hardware, c),
        backward + memory_s(gradients * MERGED_BACKWARD_BYTES, hardware, c),
    )


def _elementwise(shape: ModelShape, x: Execution, tokens: Array, hardware: Hardware, c: Constants) -> Passes:
    """Norms, residual sums, rotations, activations; backward passes over memory twice as often."""
    local = tokens / np.where(x.sequence_parallel > 0, x.tp, 1.0)
    if hardware.measured is not None:
        return measured_elementwise_s(shape, x, tokens, local, hardware.measured, hardware.dtype)
    dense = shape.dense_layers / shape.layers
    norms = (c.hidden_passes + 2.0 * (shape.norms - 2.0)) * np.where(x.fused > 0, 1.0, c.unfused_norm)
    gates = (dense * shape.mlp + (1.0 - dense) * shape.shared) * shape.mlp_matrices
    split = ((shape.query + shape.key) * 2.0 + gates) / x.tp * np.where(x.fused > 0, 1.0, c.unfused)
    once = memory_s(hardware.activation_bytes * (local * shape.hidden * norms + tokens * split), hardware, c)
    return once, 2.0 * once


def _tensor(shape: ModelShape, x: Execution, tokens: Array, hardware: Hardware, c: Constants) -> Array:
    """Exposed seconds of tensor-parallel collectives in one pass: gather before, scatter after each block.

    With whole tensors it is a sum, which is both. What is gathered is in 8 bits where matmuls take it so; sums
    are not. Experts that are split gather and scatter every copy of a token.
    """
    dense = shape.dense_layers / shape.layers
    blocks = 1.0 + dense + (1.0 - dense) * ((x.expert_tp > 1) * shape.top_k + (shape.shared > 0))
    activation = hardware.activation_bytes * tokens * shape.hidden * (1.0 - hardware.narrow / 4.0)
    both = 2.0 * network.ring_s(activation, x.tp, np.ones(()), hardware, c)
    return blocks * both * (1.0 - c.tensor_hidden * x.overlap_tensor)


def _context(
    shape: ModelShape,
    x: Execution,
    tokens: Array,
    attention: Passes,
    again: Array,
    hardware: Hardware,
    c: Constants,
) -> Array:
    """Exposed seconds of a layer's exchange of keys and values between context-parallel ranks, both passes."""
    if not np.any(x.cp > 1):
        return np.zeros(())
    ways = _exchanges(shape, x, tokens, attention, again, hardware, c)
    fastest = np.minimum(np.minimum(*ways[:2]), ways[2])
    return np.where(x.cp > 1, choose(x.exchange, *ways, fastest), 0.0)


def _exchanges(
    shape: ModelShape,
    x: Execution,
    tokens: Array,
    attention: Passes,
    again: Array,
    hardware: Hardware,
    c: Constants,
) -> tuple[Array, Array, Array]:
    """By EXCHANGES; the backward pass exchanges gradients too. All-to-all needs a head for every rank."""
    keys_values = hardware.activation_bytes * tokens * (shape.key + shape.value) / x.tp
    once = (x.cp - 1.0) * network.send_s(keys_values, x.cp, x.tp, hardware, c)
    left = 1.0 - c.context_hidden
    forward = np.maximum(once * left, once - attention[0])
    backward = np.maximum(2.0 * once * left, 2.0 * once - attention[1])
    gather = network.ring_s(keys_values * x.cp, x.cp, x.tp, hardware, c)
    trade = sum(
        network.all_to_all_s(
            hardware.activation_bytes * tokens * width / x.tp,
            x.cp,
            x.tp,
            hardware,
            c,
            copies=np.ones(()),
            one_copy=np.zeros(()),
        )
        for width in (shape.query + shape.key + shape.value, shape.attended)
    )
    enough_heads = shape.heads % (x.tp * x.cp) == 0
    return (
        np.asarray(forward * (1.0 + again) + backward),
        np.asarray(gather * (3.0 + again)),
        np.where(enough_heads, trade * (2.0 + again), np.inf),
    )


def fastest_exchange(
    shape: ModelShape, execution: Execution, hardware: Hardware, constants: Constants
) -> Array:
    """Index into EXCHANGES of the one that takes least."""
    x = execution
    tokens = x.micro_batch * x.sequence / x.cp
    attention = _attention(shape, x, tokens, hardware, constants)
    again = choose(x.recompute, 0.0, np.where(x.flash > 0, 0.0, 1.0), 0.0, 1.0)
    beside = (attention[0] * constants.stack, attention[1] * constants.stack)
    ways = _exchanges(shape, x, tokens, beside, again, hardware, constants)
    return np.asarray(np.argmin(np.stack(np.broadcast_arrays(*ways)), axis=0), dtype=np.float64)


def _dispatch(shape: ModelShape, x: Execution, tokens: Array, hardware: Hardware, c: Constants) -> Array:
    """Exposed seconds of tokens' way to experts and back in one pass, averaged over layers."""
    if not np.any(shape.experts > 0):
        return np.zeros(())
    there = network.all_to_all_s(
        hardware.activation_bytes * tokens / x.tp * shape.top_k * shape.hidden,
        x.ep,
        x.expert_tp,
        hardware,
        c,
        copies=shape.top_k,
        one_copy=x.one_copy_per_node,
    )
    share = np.where(shape.experts > 0, shape.expert_layers / shape.layers, 0.0)
    return 2.0 * there * share * (1.0 - c.expert_hidden * x.overlap_experts)


def _launch(x: Execution, queued_s: Array, c: Constants) -> Array:
    """Seconds in which the chip waits for the host to start kernels, collectives among them."""
    repeats = choose(x.recompute, 0.0, 0.05, 0.2, 1.0 / 3.0)
    fewer = np.where(x.few_launches > 0, c.launch_fused, 1.0)
    host = c.launch_s * fewer * (1.0 + repeats)
    return np.asarray(
        soft_max(queued_s, np.broadcast_to(host, np.broadcast(host, queued_s).shape), 8.0) - queued_s
    )
