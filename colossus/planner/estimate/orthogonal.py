"""Time and memory of Muon: making updates orthogonal, and bringing matrices together for it, as spec/matrices.py deals
them out.

Beside what any optimizer passes over, each matrix takes five steps of Newton-Schulz, three products each, on one of the
ranks that hold it: about 20·m²·n + 10·m³ FLOPs for a matrix of m × n, m the smaller side.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from colossus.planner.estimate import network
from colossus.planner.estimate.columns import Array
from colossus.planner.estimate.compute import matmul_s
from colossus.planner.estimate.constants import Constants
from colossus.planner.estimate.execution import Execution, Hardware
from colossus.planner.estimate.shape import ModelShape
from colossus.spec.layout import Group, Mates
from colossus.spec.matrices import Dealt, deal_out
from colossus.spec.sharding import Placement

NEWTON_SCHULZ_STEPS = 5
TRAFFIC = 44.0 / 28.0
"""Memory traffic of a matrix over that of AdamW's moments: eleven passes (momentum, Nesterov's step, decay and update,
each by itself) in place of seven (fused)."""


class _Matrix(NamedTuple):
    rows: Array
    columns: Array
    per_layer: Array
    """How many there are in a mean layer, on all ranks; 0: the model has none."""
    is_expert: bool


def orthogonal_s(
    shape: ModelShape, x: Execution, layers: Array, hardware: Hardware, c: Constants
) -> tuple[Array, Array]:
    """Seconds a step on a rank whose stage has `layers` layers: (products, exchanges).

    Ranks share a stage's matrices out evenly, but none is split: where there are more ranks than matrices, the largest
    one sets the pace.
    """
    owners = (x.tp * x.shard * x.cp, x.shard * x.cp * x.tp / x.ep)
    total, largest, weights = [np.zeros(())] * 2, np.zeros(()), [np.zeros(())] * 2
    for matrix in _matrices(shape):
        here = matrix.per_layer * layers / (x.ep if matrix.is_expert else 1.0)
        one = np.where(here > 0, _one_s(matrix, hardware, c), 0.0)
        total[matrix.is_expert] = total[matrix.is_expert] + here * one
        weights[matrix.is_expert] = weights[matrix.is_expert] + here * matrix.rows * matrix.columns
        largest = np.maximum(largest, one)
    products = np.maximum(total[0] / owners[0] + total[1] / owners[1], largest)
    element = hardware.activation_bytes
    dense = _there_and_back_s(element * weights[0], x.tp, x.shard * x.cp, np.ones(()), x, hardware, c)
    shards = np.maximum(owners[1] / x.expert_tp, 1.0)
    experts = _there_and_back_s(element * weights[1], x.expert_tp, shards, x.ep, x, hardware, c)
    # Where each rank keeps whole experts, their matrices stay where they are.
    whole = (x.sharding >= 1) & (x.expert_tp <= 1) & ((shape.experts / x.ep) % shards == 0)
    return products, dense + np.where(whole, 0.0, experts)


def matrix_weights(shape: ModelShape, x: Execution) -> tuple[Array, Array]:
    """Of a mean layer, in matrices: (dense, experts), before any sharding."""
    found = [np.zeros(()), np.zeros(())]
    for matrix in _matrices(shape):
        found[matrix.is_expert] = found[matrix.is_expert] + matrix.per_layer * matrix.rows * matrix.columns
    return found[0] / x.tp, found[1] / (x.ep * x.expert_tp)


def _matrices(shape: ModelShape) -> Iterator[_Matrix]:
    latent = shape.key_value_rank > 0
    dense, one = shape.dense_layers / shape.layers, np.ones(())
    low_rank = shape.query_rank > 0
    plain, narrow = np.where(latent, 0.0, one), np.where(latent, one, 0.0)
    yield _Matrix(shape.query, np.where(low_rank, shape.query_rank, shape.hidden), one, False)
    yield _Matrix(shape.query_rank, shape.hidden, np.where(low_rank, one, 0.0), False)
    yield _Matrix(shape.key, shape.hidden, plain, False)
    yield _Matrix(shape.value, shape.hidden, plain, False)
    yield _Matrix(shape.key_value_rank, shape.hidden, narrow, False)
    yield _Matrix(shape.key + shape.value, shape.key_value_rank, narrow, False)
    yield _Matrix(shape.hidden, shape.attended, one, False)
    for size, count in ((shape.mlp, dense), (shape.shared, (1.0 - dense) * (shape.shared > 0))):
        yield _Matrix(size, shape.hidden, shape.mlp_matrices * count, False)
    experts = 1.0 - dense
    yield _Matrix(shape.experts, shape.hidden, experts, False)
    yield _Matrix(shape.expert, shape.hidden, shape.mlp_matrices * shape.experts * experts, True)


def _one_s(matrix: _Matrix, hardware: Hardware, c: Constants) -> Array:
    small = np.maximum(np.minimum(matrix.rows, matrix.columns), 1.0)
    large = np.maximum(np.maximum(matrix.rows, matrix.columns), 1.0)
    products = ((small, small, large), (small, small, small), (small, large, small))
    if hardware.measured is not None:
        once = sum(hardware.measured.product_s(*sizes, hardware.dtype) for sizes in products)
    else:
        once = sum(matmul_s(*sizes, hardware, c, wide=True) for sizes in products)
    return NEWTON_SCHULZ_STEPS * np.asarray(once)


def _there_and_back_s(
    size_bytes: Array,
    split: Array,
    shards: Array,
    stride: Array,
    x: Execution,
    hardware: Hardware,
    c: Constants,
) -> Array:
    """Seconds of bringing matrices of `size_bytes` together over the ranks that keep their parts and those that compute
    with them, and of sending directions back. Where nothing is sharded, keepers have copies: directions alone go back,
    to all of them."""
    own = size_bytes / (split * shards)
    one = np.ones(())

    def trade(size: Array, apart: Array) -> Array:
        return network.all_to_all_s(own, size, apart, hardware, c, copies=one, one_copy=0.0 * one)

    over_shards = np.where(
        x.sharding >= 1,
        2.0 * trade(shards, stride * split),
        network.ring_s(size_bytes / split, shards, stride * split, hardware, c),
    )
    return over_shards + 2.0 * trade(split, stride)


# --- memory ---


def orthogonal_bytes(
    placements: Sequence[Placement], counts: Sequence[int], mates: Callable[[Group], Mates], element: int
) -> int:
    """The most that a rank holds in one of a step's rounds, beside weights, gradients and momentum. Arguments as of
    `deal_out`; `element`: bytes of a number in the dtype of matmuls."""
    return element * max(map(_round_elements, deal_out(placements, counts, mates)), default=0)


def _round_elements(dealt: Dealt) -> int:
    """While matrices come together: parts, what is received, and what is sent or made of both. Then whole matrices and
    their directions, and of those of one shape, which are orthogonalised together, two stacks and two squares."""
    levels = range(len(dealt.groups))
    parts = received = sent = whole = largest = 0
    by_shape: Counter[tuple[int, int]] = Counter()
    for i, (matrix, _) in enumerate(dealt.owned):
        shape = matrix.splits[-1].shape(dealt.here[-1]) if matrix.splits else matrix.shape
        parts += math.prod(shape)
        if all(dealt.is_owner(i, level) for level in levels):
            whole += math.prod(matrix.shape)
            by_shape[matrix.shape] += 1
    for level in levels:
        for traffic in filter(None, (dealt.gather(level),)):
            own = dealt.here[level]
            sizes = [
                [math.prod(dealt.split(i, level)[0].shape(place)) for i in numbers]
                for place, numbers in enumerate(traffic.incoming)
            ]
            received = max(received, sum(map(sum, sizes)))
            going = [i for numbers in traffic.outgoing for i in numbers]
            sent = max(sent, sum(math.prod(dealt.split(i, level)[0].shape(own)) for i in going))
    for (rows, columns), count in by_shape.items():
        largest = max(largest, 2 * count * (rows * columns + min(rows, columns) ** 2))
    return max(parts + received + max(sent, whole), 2 * whole + largest)
