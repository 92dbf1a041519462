"""What matmuls run in: the dtypes by name, and the library that runs float32 ones on a CPU."""

import torch

from colossus.spec.model import Dtype
from colossus.spec.rank import Float32Library

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_LARGEST_ERROR = 1e-5
"""Of a float32 product of 256 terms of spread 1, relative to its own spread: 40 times what float32 rounding leaves,
and 100 times less than bfloat16 would."""


def use_float32_library(library: Float32Library) -> None:
    """Which library this process's float32 matmuls on a CPU go to from now on.

    Torch gives them to oneDNN only where oneDNN is also allowed to round their inputs to bfloat16. It makes use of
    that on processors with matrix units for bfloat16 and on no others; so measure first: `float32_libraries`.
    """
    if _can_choose():
        torch.backends.mkldnn.matmul.fp32_precision = "bf16" if library == "onednn" else "ieee"


def float32_libraries() -> tuple[Float32Library, ...]:
    """The libraries that really compute float32 matmuls in float32 here; found out by doing one."""
    if not _can_choose():
        return ("default",)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(512, 256, generator=generator), torch.randn(256, 512, generator=generator)
    exact = a.double() @ b.double()
    try:
        use_float32_library("onednn")
        error = ((a @ b).double() - exact).abs().max() / exact.std()
    finally:
        use_float32_library("default")
    return ("default", "onednn") if error < _LARGEST_ERROR else ("default",)


def _can_choose() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.backends.mkldnn, "matmul")
