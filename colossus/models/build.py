"""Initial weights."""

import hashlib
import math

import torch
from torch import Tensor, nn

from colossus.models.decoder import Decoder
from colossus.spec.model import ModelSpec, ParameterSpec
from colossus.spec.sharding import Box


def build(spec: ModelSpec, *, seed: int, device: str = "cpu") -> Decoder:
    """A decoder on `device` with its initial weights."""
    with torch.device("meta"):
        model = Decoder(spec)
    model.to_empty(device=device)
    initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Initial weights, functions of (seed, parameter name) alone: no layout or order of building matters."""
    parameters = dict(model.named_parameters())
    for spec in model.spec.parameters():
        parameters[spec.name].copy_(initial_values(spec, seed))
    reset_buffers(model)


BLOCK_ELEMENTS = 2**22
"""Initial values are drawn in blocks of so many, so that who needs a part of a large tensor draws little more."""


def initial_values(parameter: ParameterSpec, seed: int, box: Box | None = None) -> Tensor:
    """One parameter's initial values, float32 on the CPU; with a `box`, those of that part of it."""
    box = box or Box((0,) * len(parameter.shape), parameter.shape)
    if parameter.std == 0:
        return torch.full(box.shape, parameter.start, dtype=torch.float32, device="cpu")
    per_row = math.prod(parameter.shape[1:])
    rows = _drawn(parameter, seed, box.offsets[0] * per_row, box.shape[0] * per_row)
    values = rows.view(box.shape[0], *parameter.shape[1:])
    for dim, (start, size) in enumerate(zip(box.offsets[1:], box.shape[1:], strict=True), start=1):
        values = values.narrow(dim, start, size)
    return values


def _drawn(parameter: ParameterSpec, seed: int, start: int, count: int) -> Tensor:
    """`count` of the parameter's values from `start` on, in row-major order."""
    values = torch.empty(count, dtype=torch.float32, device="cpu")
    for block in range(start // BLOCK_ELEMENTS, -(-(start + count) // BLOCK_ELEMENTS)):
        first = block * BLOCK_ELEMENTS
        size = min(BLOCK_ELEMENTS, parameter.num_elements - first)
        # The first block's seed names no block: tensors that have no other are what they were before there were blocks.
        name = f"{seed}:{parameter.name}" + (f":{block}" if block else "")
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))
        drawn = torch.empty(size, dtype=torch.float32, device="cpu").normal_(
            0, parameter.std, generator=generator
        )
        here = slice(max(start, first), min(start + count, first + size))
        values[here.start - start : here.stop - start] = drawn[here.start - first : here.stop - first]
    return values


def reset_buffers(model: nn.Module) -> None:
    """Fills the tables that are computed and not learned."""
    for module in model.modules():
        if module is not model and hasattr(module, "reset_buffers"):
            module.reset_buffers()
