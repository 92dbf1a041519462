"""Times of a chip that has been measured (`colossus doctor --calibrate`), in place of fitted constants.

A law or a curve for each thing that takes time: a linear layer's products follow FLOPs, bytes and calls; attention and
passes over elements are looked up between the measured sizes, on logarithmic scales; so are collectives.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Final, get_args

import numpy as np
import numpy.typing as npt

from colossus.planner.estimate.columns import Array
from colossus.spec.fleet import Chip, Precision
from colossus.spec.measured import (
    CollectiveKind,
    Measured,
    MeasuredAttention,
    MeasuredDtype,
    MeasuredMatmul,
    Operation,
    Product,
)
from colossus.spec.parts import Activation

ITEMSIZE: Final[dict[MeasuredDtype, float]] = {"float32": 4.0, "bfloat16": 2.0}
ACTIVATIONS: Final = get_args(Activation)
LOSS_CACHE_BYTES = 2 * 2**20
"""The trainer's chunks of the loss: as many tokens as leave float32 logits in a cache (one_rank/plan.py)."""
LEAST_CHUNK_TOKENS = 32

Law = tuple[float, float, float]
"""Seconds per FLOP, per byte of operands and result, and per call."""


@dataclass(frozen=True)
class MeasuredRates:
    """The curves of one chip, ready for arrays. Every method takes which dtype each candidate's matmuls run in."""

    dtypes: tuple[MeasuredDtype, ...]
    laws: Mapping[tuple[MeasuredDtype, Product], Law]
    attention: Mapping[MeasuredDtype, tuple[MeasuredAttention, ...]]
    operations: Mapping[tuple[MeasuredDtype, Operation], tuple[Array, Array]]
    collectives: Mapping[CollectiveKind, tuple[Array, Array]]
    num_ranks: Mapping[CollectiveKind, int]

    def linear_s(
        self, tokens: Array, outputs: Array, inputs: Array, groups: Array | float, dtype: Array
    ) -> tuple[Array, Array]:
        """Seconds of `groups` linear layers, (forward, backward)."""

        def product(name: Product) -> Array:
            return self._by_dtype(
                dtype,
                lambda own: groups * _law_s(self.laws[own, name], tokens, outputs, inputs, ITEMSIZE[own]),
            )

        return product("forward"), product("input_gradient") + product("weight_gradient")

    def product_s(self, rows: Array, columns: Array, inner: Array, dtype: Array) -> Array:
        """Seconds of one product (rows × inner)·(inner × columns), as a linear layer's forward pass takes."""
        return self._by_dtype(
            dtype, lambda own: _law_s(self.laws[own, "forward"], rows, columns, inner, ITEMSIZE[own])
        )

    def operation_s(self, name: Operation, elements: Array, dtype: Array) -> Array:
        """Seconds forward and backward."""
        return self._by_dtype(dtype, lambda own: _on_curve(elements, *self.operations[own, name]))

    def activation_s(self, index: Array, elements: Array, dtype: Array) -> Array:
        """Of each row's own activation, an index into ACTIVATIONS."""
        times = [self.operation_s(name, elements, dtype) for name in ACTIVATIONS]
        return np.asarray(np.select([index == i for i in range(len(times))], times))

    def attention_s(
        self, queries: Array, keys: Array, heads: Array, head_dim: Array, dtype: Array
    ) -> tuple[Array, Array]:
        """Seconds of (forward, backward), for `queries` tokens with `heads` heads that each meet `keys` keys, seen or
        masked: a mask spares no work on a CPU, and the curves hold what it spares elsewhere."""
        pairs = np.maximum(queries * keys * heads, 1.0)

        def one(own: MeasuredDtype, backward: bool) -> Array:
            return _attention_s(self.attention[own], keys, head_dim, pairs, backward)

        return (
            self._by_dtype(dtype, lambda own: one(own, False)),
            self._by_dtype(dtype, lambda own: one(own, True)),
        )

    def collective_s(self, kind: CollectiveKind, size_bytes: Array, size: Array) -> Array | None:
        """Seconds of a collective of `size` ranks; None where it has not been measured.

        Of the measured ranks n each moves (n - 1)/n of the bytes; other numbers of ranks move their own share.
        """
        if kind not in self.collectives:
            return None
        if kind == "send":
            same = size_bytes
        else:
            measured = self.num_ranks[kind]
            same = size_bytes * ((size - 1.0) / np.maximum(size, 1.0)) * measured / (measured - 1.0)
        return _on_curve(same, *self.collectives[kind])

    def _by_dtype(self, dtype: Array, time: Callable[[MeasuredDtype], Array]) -> Array:
        times = [time(own) for own in self.dtypes]
        return np.asarray(np.select([dtype == i for i in range(len(times))], times, times[0]))


def index_of(chip: Chip, precision: Precision) -> float:
    """The place of a precision among a measured chip's dtypes."""
    names: list[str] = list(rates(chip.measured).dtypes) if chip.measured else []
    own = "bfloat16" if precision == "float16" else precision
    return float(names.index(own)) if own in names else 0.0


@lru_cache(maxsize=16)
def rates(measured: Measured) -> MeasuredRates:
    dtypes = tuple(dict.fromkeys(point.dtype for point in measured.matmuls))
    return MeasuredRates(
        dtypes=dtypes,
        laws={
            (dtype, product): fitted_law(
                [p for p in measured.matmuls if p.dtype == dtype and p.product == product]
            )
            for dtype in dtypes
            for product in get_args(Product)
        },
        attention={dtype: tuple(a for a in measured.attention if a.dtype == dtype) for dtype in dtypes},
        operations={(o.dtype, o.name): _logs(o.sizes, o.seconds) for o in measured.operations},
        collectives={o.kind: _logs(o.sizes, o.seconds) for o in measured.collectives},
        num_ranks={o.kind: o.num_ranks for o in measured.collectives},
    )


MEASURED_CONSTANTS: Final[Mapping[str, float]] = {
    # What is measured is reached, and holds what starting its kernels takes.
    "memory": 1.0, "scale_up": 1.0, "nic": 1.0, "stack": 1.0, "launch_s": 0.0, "kernel_s": 0.0, "step_s": 0.0,
    "straggler": 0.0, "expert_sync_s": 0.0,
}  # fmt: skip
CPU_CONSTANTS: Final[Mapping[str, float]] = {
    # A CPU's own cores carry its messages: what is sent beside compute takes as much from it as it lasts.
    "contention": 1.0, "tensor_hidden": 0.0, "context_hidden": 0.0, "expert_hidden": 0.0, "pipeline_hidden": 0.0,
    "hop_s": 0.0,
}  # fmt: skip


def with_measured(values: Mapping[str, float], chip: Chip) -> Mapping[str, float]:
    """The constants for a chip: the fitted ones, or where it has been measured what then stands in their place."""
    if chip.measured is None:
        return values
    own = {**MEASURED_CONSTANTS, **(CPU_CONSTANTS if chip.generation == "cpu" else {})}
    others = {name: value for name, value in values.items() if name.split(".")[0] not in own}
    return {**others, **own}


# --- laws and curves ---


def fitted_law(points: list[MeasuredMatmul]) -> Law:
    """The law with the least squared relative error, none of its three numbers below 0."""
    terms = np.array(
        [[p.flops, _bytes(p.tokens, p.outputs, p.inputs, ITEMSIZE[p.dtype]), 1.0] for p in points]
    )
    relative = terms / np.array([p.seconds for p in points])[:, None]
    best, least = np.zeros(3), np.inf
    for count in (1, 2, 3):
        for chosen in combinations(range(3), count):
            columns = relative[:, chosen]
            scale = np.abs(columns).max(0)
            found = np.linalg.lstsq(columns / scale, np.ones(len(points)), rcond=None)[0] / scale
            error = float(((columns @ found - 1.0) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(3), error
                best[list(chosen)] = found
    return (float(best[0]), float(best[1]), float(best[2]))


def law_errors(points: list[MeasuredMatmul]) -> npt.NDArray[np.float64]:
    """Relative errors of the law fitted to these points, which are of one dtype."""
    law = fitted_law(points)
    tokens, outputs, inputs = (
        np.array([float(getattr(p, name)) for p in points]) for name in ("tokens", "outputs", "inputs")
    )
    took = np.array([p.seconds for p in points])
    return np.asarray(_law_s(law, tokens, outputs, inputs, ITEMSIZE[points[0].dtype]) / took - 1.0)


def _bytes(tokens: Array | float, outputs: Array | float, inputs: Array | float, itemsize: float) -> Array:
    return np.asarray(itemsize * (tokens * inputs + inputs * outputs + tokens * outputs))


def _law_s(law: Law, tokens: Array, outputs: Array, inputs: Array, itemsize: float) -> Array:
    flops = 2.0 * tokens * outputs * inputs
    return np.asarray(law[0] * flops + law[1] * _bytes(tokens, outputs, inputs, itemsize) + law[2])


def _logs(sizes: tuple[int, ...], seconds: tuple[float, ...]) -> tuple[Array, Array]:
    return np.log(np.asarray(sizes, float)), np.log(np.asarray(seconds, float))


def _on_curve(size: Array, sizes: Array, seconds: Array) -> Array:
    """Between measured points on logarithmic scales; below them what the smallest took, above them in proportion."""
    size = np.asarray(size, float)
    logs = np.log(np.maximum(size, 1e-9))
    found = np.exp(np.interp(logs, sizes, seconds) + np.maximum(logs - sizes[-1], 0.0))
    return np.where(size > 0, found, 0.0)


def _attention_s(
    curves: tuple[MeasuredAttention, ...], keys: Array, head_dim: Array, pairs: Array, backward: bool
) -> Array:
    """Looked up by number of query-key pairs on each curve; between those of sequences and head sizes on logarithmic
    scales."""
    sequences = sorted({curve.sequence_tokens for curve in curves})
    sizes = sorted({curve.head_dim for curve in curves})
    by = {(curve.sequence_tokens, curve.head_dim): curve for curve in curves}

    def seconds(sequence: int, size: int) -> Array:
        curve = by[sequence, size]
        times = curve.backward_seconds if backward else curve.seconds
        wider = np.maximum(head_dim / sizes[-1], 1.0)
        return wider * _on_curve(pairs, *_logs(tuple(n * sequence**2 for n in curve.sizes), times))

    def between(value: Array, places: list[int], at: Callable[[int], Array]) -> Array:
        logs = np.log(np.asarray(places, float))
        place = np.clip(np.interp(np.log(np.maximum(value, 1e-9)), logs, np.arange(len(places))), 0, None)
        low = np.floor(place).astype(int)
        times = [np.log(np.maximum(at(p), 1e-30)) for p in places]
        shape = np.broadcast_shapes(np.shape(place), *(np.shape(t) for t in times))
        stacked = np.stack([np.broadcast_to(t, shape) for t in times])
        low = np.broadcast_to(low, shape)
        high = np.minimum(low + 1, len(places) - 1)
        share = np.broadcast_to(place, shape) - low
        below, above = (np.take_along_axis(stacked, i[None], 0)[0] for i in (low, high))
        return np.asarray(np.exp(below * (1 - share) + above * share))

    return between(keys, sequences, lambda s: between(head_dim, sizes, lambda d: seconds(s, d)))
