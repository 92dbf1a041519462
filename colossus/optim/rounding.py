"""Rounding float32 to bfloat16 so that small changes are not lost."""

import torch
from torch import Tensor


def round_stochastically(values: Tensor, step: Tensor) -> Tensor:
    """`values` in bfloat16: up or down with the probabilities that make the mean right over many steps.

    An average that moves by 0.1% a step never moves in bfloat16 when rounded to the nearest: neighbours are 0.4 to 0.8%
    apart. How far up what is cut off must reach to round up is a hash of `step` (integer, no dim) and of what stays;
    no generator is asked: ranks that hold copies round alike, and so does every layout.
    """
    bits = values.view(torch.int32)
    noise = (bits >> 16) * 0x2C1B3C6D + step.to(torch.int32) * 0x297A2D39
    noise = (noise ^ (noise >> 15)) * 0x5BD1E995
    noise = (noise ^ (noise >> 13)) * 0x27D4EB2F
    return ((bits + ((noise >> 12) & 0xFFFF)) & -0x10000).view(torch.float32).to(torch.bfloat16)
