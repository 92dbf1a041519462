"""Time of what one chip does by itself: matmuls, attention, elementwise passes over memory."""

import numpy as np

from colossus.planner.columns import Array, soft_max
from colossus.planner.constants import Constants
from colossus.planner.execution import Hardware

TILE_ROWS, TILE_COLUMNS = 128, 256
"""Output tile of one streaming multiprocessor in the large kernels of cuBLAS and CUTLASS."""


def matmul_s(
    rows: Array,
    columns: Array,
    inner: Array,
    hardware: Hardware,
    constants: Constants,
    *,
    groups: Array | float = 1.0,
    wide: bool = False,
) -> Array:
    """Seconds of `groups` products (rows × inner)·(inner × columns).

    FLOPs over the reachable rate, beside bytes over the memory's: the longer of the two, softly. The rate is
    reached by deep products in whole waves: a shallow one spends its time on filling and emptying the
    pipeline (inner/(inner + half_depth)), and the last wave of output tiles leaves cores idle (as far as the
    library finds no better tiling: the power `wave_quantisation`).
    """
    peak = hardware.wide_flops if wide else hardware.peak_flops
    efficiency = constants.wide_matmul if wide else constants.matmul
    if np.ndim(groups) or groups != 1.0:
        efficiency = efficiency * constants.grouped_matmul
    clock = hardware.power_share**constants.power_exponent
    rate = peak * np.minimum(efficiency * clock, 1.0) * inner / (inner + constants.half_depth)
    tiles = groups * np.ceil(rows / TILE_ROWS) * np.ceil(columns / TILE_COLUMNS)
    waves = tiles / hardware.num_cores
    rounding = (np.ceil(waves) / waves) ** constants.wave_quantisation
    ragged = (np.ceil(rows / 16) * 16 / rows) * (np.ceil(columns / 16) * 16 / columns)
    flops_s = 2.0 * groups * rows * columns * inner * rounding * ragged / rate
    element = 2.0 if wide else 2.0 - hardware.narrow
    size = groups * (element * inner * (rows + columns) + 2.0 * rows * columns)
    return soft_max(flops_s, memory_s(size, hardware, constants)) + constants.kernel_s


def memory_s(size_bytes: Array, hardware: Hardware, constants: Constants) -> Array:
    """Seconds to move `size_bytes` between the chip and its memory."""
    return np.asarray(size_bytes / (hardware.memory_bandwidth * constants.memory))


def linear_s(
    tokens: Array,
    outputs: Array,
    inputs: Array,
    hardware: Hardware,
    constants: Constants,
    *,
    groups: Array | float = 1.0,
    wide: bool = False,
) -> tuple[Array, Array]:
    """Seconds of a linear layer, (forward, backward); backward is the gradient of its input and of its weight.

    In 8 bits, each operand is read, its scale found, and written narrow, also transposed, ahead of the product.
    """
    forward = matmul_s(tokens, outputs, inputs, hardware, constants, groups=groups, wide=wide)
    backward = matmul_s(tokens, inputs, outputs, hardware, constants, groups=groups, wide=wide)
    backward = backward + matmul_s(outputs, inputs, tokens, hardware, constants, groups=groups, wide=wide)
    if wide:
        return forward, backward
    cast = hardware.narrow * constants.cast_passes * groups
    scale_s = hardware.narrow * constants.scale_s
    return (
        forward + memory_s(cast * 4.0 * tokens * inputs, hardware, constants) + scale_s,
        backward + memory_s(cast * 4.0 * tokens * outputs, hardware, constants) + 2.0 * scale_s,
    )


def attention_s(
    tokens: Array,
    sequence: Array,
    keys: Array,
    query: Array,
    attended: Array,
    heads: Array,
    flash: Array,
    score_traffic: Array,
    hardware: Hardware,
    constants: Constants,
) -> tuple[Array, Array]:
    """Seconds of softmax(q·k)·v, (forward, backward), for `tokens` queries that see `keys` keys on average.

    Fused kernels skip the masked half and keep scores on the chip; their backward computes the scores again:
    five products for the forward's two. Unfused ones compute the whole square (twice the mean of a causal
    mask) and pass over it in memory: about 5 times forward and 6 backward, in 2 bytes, and `score_traffic`
    times that where the softmax is not fused either.
    """
    clock = hardware.power_share**constants.power_exponent
    rate = hardware.wide_flops * np.minimum(constants.attention * clock, 1.0)
    rate = rate * sequence / (sequence + constants.half_sequence)
    products = 2.0 * tokens * keys * (query + attended)
    head = query / heads
    narrow_head = (head / (head + constants.half_head)) / (128.0 / (128.0 + constants.half_head))
    fused_s = products / (rate * narrow_head)
    square = 2.0 * keys
    scores = 2.0 * heads * tokens * square
    unfused_rate = hardware.wide_flops * constants.wide_matmul * clock * head / (head + constants.half_depth)
    unfused_s = 2.0 * products / unfused_rate
    passes = memory_s(scores * constants.score_passes * score_traffic, hardware, constants)
    forward = flash * fused_s + (1.0 - flash) * (unfused_s + 5.0 * passes)
    backward = flash * constants.attention_backward * fused_s + (1.0 - flash) * (2.0 * unfused_s + 6.0 * passes)
    return np.asarray(forward), np.asarray(backward)
