"""Where a stored tensor's values come from: one place, several ranks' files, or quantised numbers with scales."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from colossus.checkpoint.hugging_face.header import Span

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the sixteen codes of a four-bit float mean (Open Compute Project, Microscaling Formats v1.0, table 5)."""

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Source(Protocol):
    """A tensor that can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def spans(self) -> Sequence[Span]:
        """The places in files that it is made of."""

    def read(self) -> Tensor:
        """Its values, floating point, in memory of its own."""


@dataclass(frozen=True, slots=True)
class Plain:
    """As the file has it."""

    span: Span

    @property
    def shape(self) -> tuple[int, ...]:
        return self.span.shape

    @property
    def spans(self) -> Sequence[Span]:
        return (self.span,)

    def read(self) -> Tensor:
        return self.span.read()


@dataclass(frozen=True, slots=True)
class Joined:
    """Parts that tensor-parallel ranks held, in the order of ranks, one behind the other along `dim`."""

    parts: tuple[Span, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (*first[: self.dim], first[self.dim] * len(self.parts), *first[self.dim + 1 :])

    @property
    def spans(self) -> Sequence[Span]:
        return self.parts

    def read(self) -> Tensor:
        whole = torch.empty(self.shape, dtype=self.parts[0].dtype)
        size = self.parts[0].shape[self.dim]
        for rank, part in enumerate(self.parts):
            whole.narrow(self.dim, rank * size, size).copy_(part.read())
        return whole


@dataclass(frozen=True, slots=True)
class BlockFp8:
    """Eight-bit floats and a factor for each block of `block` rows and columns: DeepSeek-V3's `weight_scale_inv`.

    The product of both in float32, as in DeepSeek-V3's own `weight_dequant` (arXiv:2412.19437, section 3.3.2).
    """

    weight: Span
    scale: Span
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def spans(self) -> Sequence[Span]:
        return (self.weight, self.scale)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """What the scales' shape must be: the blocks at the edges may be smaller."""
        return tuple(-(-size // step) for size, step in zip(self.shape, self.block, strict=True))

    def read(self) -> Tensor:
        scale = self.scale.read().float()
        values = self.weight.read().float()
        rows, columns = self.block
        for i, factors in enumerate(scale):
            values[i * rows : (i + 1) * rows] *= factors.repeat_interleave(columns)[: values.shape[1]]
        return values


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Four-bit floats in blocks of 32 with a power of two for each: gpt-oss's `_blocks` and `_scales`.

    Blocks are (experts, outputs, blocks, 16) bytes, two numbers each, the one in the low four bits first; a scale
    s stands for 2^(s − 127), and 255 for no number. Every product is a bfloat16 exactly. The tensor is (experts,
    inputs, outputs), the shape in which gpt-oss's unquantised weights are stored.
    """

    blocks: Span
    scales: Span

    @property
    def shape(self) -> tuple[int, ...]:
        if len(self.blocks.shape) != 4:
            return self.blocks.shape
        experts, outputs, num_blocks, num_bytes = self.blocks.shape
        return (experts, num_blocks * num_bytes * 2, outputs)

    @property
    def spans(self) -> Sequence[Span]:
        return (self.blocks, self.scales)

    def read(self) -> Tensor:
        # What a byte's two codes mean; a bfloat16 has the range, so multiplying by the power of two is exact.
        pairs = torch.tensor(
            [[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)], dtype=torch.bfloat16
        )
        codes = self.blocks.read()
        # In float32, as torch has no exact power in bfloat16; 2^-127 is subnormal there and exact.
        factors = torch.ldexp(torch.ones(256), torch.arange(256, dtype=torch.int32) - 127)
        factors[255] = torch.nan
        scales = self.scales.read()
        values = torch.empty(*codes.shape, 2, dtype=torch.bfloat16)
        for expert in range(
            codes.shape[0]
        ):  # indices take four times the codes' memory: one expert at a time
            factor = factors[scales[expert].int()][..., None, None]
            values[expert] = (pairs[codes[expert].int()].float() * factor).to(torch.bfloat16)
        experts, outputs, num_blocks, num_bytes, _ = values.shape
        return values.view(experts, outputs, num_blocks * num_bytes * 2).transpose(1, 2)
