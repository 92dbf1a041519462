"""torch's counter of FLOPs, with the one matmul that it has no formula for."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def grouped_mm_flops(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Two per product, of torch's `_grouped_mm` in the forms that a mixture of experts has.

    Forward, and backward to the inputs: rows of all experts (rows, inputs) by (experts, inputs, outputs), each row by
    one expert's. Backward to the weights: (outputs, rows) by (rows, inputs), each row into one expert's.
    """
    assert len(a) == 2
    rows_by_inner, outputs = a[0] * a[1], b[-1]
    assert b[-2] == a[1]
    return 2 * rows_by_inner * outputs


def count_flops() -> FlopCounterMode:
    """To be entered with `with`; then `.get_total_flops()`."""
    mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    return FlopCounterMode(display=False, custom_mapping=mapping)
