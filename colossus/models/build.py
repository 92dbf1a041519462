"""Initial weights."""

import hashlib

import torch
from torch import Tensor, nn

from colossus.models.decoder import Decoder
from colossus.spec.model import ModelSpec, ParameterSpec


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


def initial_values(parameter: ParameterSpec, seed: int) -> Tensor:
    """One parameter's initial values, float32 on the CPU."""
    if parameter.std == 0:
        return torch.full(parameter.shape, parameter.start, dtype=torch.float32, device="cpu")
    digest = hashlib.blake2b(f"{seed}:{parameter.name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))
    values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    return values.normal_(0, parameter.std, generator=generator)


def reset_buffers(model: nn.Module) -> None:
    """Fills the tables that are computed and not learned."""
    for module in model.modules():
        if module is not model and hasattr(module, "reset_buffers"):
            module.reset_buffers()
