"""Time of what one chip does by itself: matmuls, attention, elementwise passes over memory."""

import numpy as np

from colossus.planner.estimate.columns import Array, soft_max
from colossus.planner.estimate.constants import Constants
from colossus.planner.estimate.execution import Hardware

TILE_ROWS, TILE_COLUMNS = 128, 256
"""Output tile of one streaming multiprocessor in the large kernels of cuBLAS and CUTLASS."""

MISALIGNED = 8.0
"""How much longer 16-bit products take whose inner size is no multiple of 8: without tensor cores (A100 data
sheet: 39 of 312 TFLOP/s)."""


def matmul_s(
    rows: Array,
    columns: Array,
    inner: Array,
    hardware: Hardware,
    constants: Constants,
    *,
    groups: Array | float = 1.0,
    wide: bool = False,
    output_bytes: Array | float | None = None,
) -> Array:
    """Seconds of `groups` products (rows × inner)·(inner × columns).

    FLOPs over the reachable rate, beside bytes over the memory's: the longer of the two, softly. Two things
    keep cores from their rate. The last wave of output tiles leaves some idle, as far as the library finds no
    better tiling (the power `wave_quantisation`). And a tile's result is written, or added to what is there,
    after its last product: the share `output_exposed` of that traffic is not hidden behind other tiles'
    products, which is why shallow products (weight gradients of few tokens) are slow.
    """
    peak = hardware.wide_flops if wide else hardware.peak_flops
    efficiency = constants.wide_matmul if wide else constants.matmul
    efficiency = efficiency * np.where(np.asarray(groups) > 1.0, constants.grouped_matmul, 1.0)
    clock = hardware.power_share**constants.power_exponent
    rate = peak * np.minimum(efficiency * clock, 1.0)
    tiles = groups * np.ceil(rows / TILE_ROWS) * np.ceil(columns / TILE_COLUMNS)
    waves = np.maximum(tiles, 1e-9) / hardware.num_cores
    rounding = (np.ceil(waves) / waves) ** constants.wave_quantisation
    padded = (np.ceil(rows / 16) * 16) * (np.ceil(columns / 16) * 16)
    flops_s = 2.0 * groups * padded * inner * rounding / rate
    element = hardware.activation_bytes - (0.0 if wide else hardware.narrow)
    output_bytes = hardware.activation_bytes if output_bytes is None else output_bytes
    written_s = memory_s(groups * output_bytes * rows * columns, hardware, constants)
    read_s = memory_s(groups * element * inner * (rows + columns), hardware, constants)
    return (
        soft_max(flops_s + constants.output_exposed * written_s, read_s + written_s)
        + constants.kernel_s * groups
    )


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
    gradient_bytes: Array | float | None = None,
) -> tuple[Array, Array]:
    """Seconds of a linear layer, (forward, backward); backward is the gradient of its input and of its weight.

    `gradient_bytes`: memory traffic per element of the weight's gradient, by default as of any other output; where
    micro-batches add to one sum, it is read and written. In 8 bits, each operand is read, its scale found, and
    written narrow, also transposed, ahead of the product.
    """
    if hardware.measured is not None:
        return hardware.measured.linear_s(tokens, outputs, inputs, groups, hardware.dtype)
    forward = matmul_s(tokens, outputs, inputs, hardware, constants, groups=groups, wide=wide)
    backward = matmul_s(tokens, inputs, outputs, hardware, constants, groups=groups, wide=wide)
    backward = backward + matmul_s(
        outputs, inputs, tokens, hardware, constants, groups=groups, wide=wide, output_bytes=gradient_bytes
    )
    if wide:
        return forward, backward
    cast = hardware.narrow * constants.cast_passes * groups
    scale_s = hardware.narrow * constants.scale_s * groups
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
    mask) and pass over it in memory: about 5 times forward and 6 backward, and `score_traffic` times that
    where the softmax is not fused either.
    """
    if hardware.measured is not None:
        return hardware.measured.attention_s(tokens, sequence, heads, query / heads, hardware.dtype)
    clock = hardware.power_share**constants.power_exponent
    rate = hardware.wide_flops * np.minimum(constants.attention * clock, 1.0)
    rate = rate * sequence / (sequence + constants.half_sequence)
    products = 2.0 * tokens * keys * (query + attended)
    head = query / heads
    narrow_head = (head / (head + constants.half_head)) / (128.0 / (128.0 + constants.half_head))
    fused_s = products / (rate * narrow_head)
    square = 2.0 * keys
    scores = hardware.activation_bytes * heads * tokens * square
    unfused_rate = hardware.wide_flops * np.minimum(constants.wide_matmul * clock, 1.0)
    unfused_s = 2.0 * products / unfused_rate * np.where(head % 8.0 == 0.0, 1.0, MISALIGNED)
    passes = memory_s(scores * constants.score_passes * score_traffic, hardware, constants)
    forward = flash * fused_s + (1.0 - flash) * (unfused_s + 5.0 * passes)
    backward = flash * constants.attention_backward * fused_s + (1.0 - flash) * (
        2.0 * unfused_s + 6.0 * passes
    )
    return np.asarray(forward), np.asarray(backward)
