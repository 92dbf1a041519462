"""The parts of a layer and of a step that pass over elements, counted as the trainer runs them, for measured chips."""

import numpy as np

from colossus.planner.estimate import network
from colossus.planner.estimate.columns import Array
from colossus.planner.estimate.constants import Constants
from colossus.planner.estimate.execution import Execution, Hardware
from colossus.planner.estimate.measured import LEAST_CHUNK_TOKENS, LOSS_CACHE_BYTES, MeasuredRates
from colossus.planner.estimate.shape import ModelShape

RESIDUAL_SUMS = 2.0
"""Of a layer, forward; and as many backward, where the gradients of the branch and of what passes it by meet."""
PROJECTION_SUMS = 2.0
"""Backward: the gradients that queries', keys' and values' projections give their common input."""


def measured_elementwise_s(
    shape: ModelShape, x: Execution, tokens: Array, local: Array, rates: MeasuredRates, dtype: Array
) -> tuple[Array, Array]:
    """Seconds of a layer's norms, rotations, activations and sums, (forward, backward)."""
    hidden = local * shape.hidden
    norms = np.where(
        shape.layer_norms > 0,
        rates.operation_s("layer_norm", hidden, dtype),
        rates.operation_s("norm", hidden, dtype),
    )
    turned = sum(
        rates.operation_s("rotation", tokens * width / x.tp, dtype) * shape.rotary
        + rates.operation_s("norm", tokens * width / x.tp, dtype) * shape.head_norms
        for width in (shape.query, shape.key)
    )
    dense = shape.dense_layers / shape.layers
    activation = sum(
        share * rates.activation_s(shape.activation, tokens * width / x.tp, dtype)
        for width, share in ((shape.mlp, dense), (shape.shared, 1.0 - dense))
    )
    add = rates.operation_s("add", hidden, dtype)
    gated = shape.mlp_matrices - 2.0
    both = shape.norms * norms + turned + activation
    return (
        np.asarray(both / 3.0 + RESIDUAL_SUMS * add),
        np.asarray(both * (2.0 / 3.0) + (RESIDUAL_SUMS + PROJECTION_SUMS + gated) * add),
    )


def measured_entry_s(
    shape: ModelShape, x: Execution, tokens: Array, local: Array, hardware: Hardware, c: Constants
) -> Array:
    """Seconds of embedding a micro-batch, of its gradient (a whole table), and of who sees whom."""
    rates, dtype = _rates(hardware), hardware.dtype
    table = shape.embedding_weights / x.tp
    return np.asarray(
        rates.operation_s("embedding", local * shape.hidden, dtype)
        + rates.operation_s("accumulate", table, dtype)
        + rates.operation_s("visibility", tokens * x.sequence, dtype)
        + rates.operation_s("norm", local * shape.hidden, dtype)  # the last one, ahead of the head
        + _team_s(shape, x, tokens, hardware, c)
    )


def measured_loss_s(
    shape: ModelShape, x: Execution, tokens: Array, hardware: Hardware, c: Constants
) -> Array:
    """Seconds of the loss of a micro-batch, chunk by chunk: logits, loss, both gradients, each chunk's added.

    Tensor-parallel ranks exchange hidden states once, and of each chunk's tokens the greatest logit and two sums.
    """
    rates, dtype = _rates(hardware), hardware.dtype
    vocabulary = shape.vocab / x.tp
    chunk = np.minimum(np.maximum(LOSS_CACHE_BYTES / (4.0 * vocabulary), LEAST_CHUNK_TOKENS), tokens)
    chunks = tokens / chunk
    weights = vocabulary * shape.hidden
    forward, backward = rates.linear_s(chunk, vocabulary, shape.hidden, 1.0, dtype)
    added = rates.operation_s("head_gradient", weights, dtype)
    one = np.ones(())
    agreed = sum(network.all_reduce_s(size * chunk, x.tp, one, hardware, c) for size in (4.0, 8.0))
    return np.asarray(
        chunks * (forward + backward + added + agreed)
        + _team_s(shape, x, tokens, hardware, c)
        + rates.operation_s("loss", tokens * vocabulary, dtype)
        + rates.operation_s("cast", weights, dtype)
        + rates.operation_s("accumulate", weights, dtype)  # scaled, once all chunks are there
    )


def measured_gradients_s(x: Execution, weights: Array, rates: MeasuredRates, dtype: Array) -> Array:
    """Seconds per layer and micro-batch: its weights cast, its gradients cast back and, from the second
    micro-batch on, added to those before."""
    later = (x.micro_batches - 1.0) / np.maximum(x.micro_batches, 1.0)
    return np.asarray(
        rates.operation_s("cast", weights, dtype) + later * rates.operation_s("accumulate", weights, dtype)
    )


def _team_s(shape: ModelShape, x: Execution, tokens: Array, hardware: Hardware, c: Constants) -> Array:
    """Seconds in which tensor-parallel ranks gather hidden states one way and scatter them the other way.

    At embedding and head, once a micro-batch. Of chips that are not measured, the fitted constants have it in them.
    """
    return 2.0 * network.ring_s(
        hardware.activation_bytes * tokens * shape.hidden, x.tp, np.ones(()), hardware, c
    )


def _rates(hardware: Hardware) -> MeasuredRates:
    assert hardware.measured is not None
    return hardware.measured
