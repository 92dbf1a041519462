"""Initial weights."""

import hashlib

import torch
from torch import nn

from colossus.models.decoder import Decoder
from colossus.spec.model import ModelSpec


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
        parameter = parameters[spec.name]
        if spec.std == 0:
            parameter.fill_(spec.start)
            continue
        digest = hashlib.blake2b(f"{seed}:{spec.name}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))
        values = torch.empty(spec.shape).normal_(0, spec.std, generator=generator)
        parameter.copy_(values)
    reset_buffers(model)


def reset_buffers(model: nn.Module) -> None:
    """Fills the tables that are computed and not learned."""
    for module in model.modules():
        if module is not model and hasattr(module, "reset_buffers"):
            module.reset_buffers()
