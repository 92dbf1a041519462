"""Single-device models in PyTorch. Start with decoder.py."""

from colossus.models.build import build, initial_values, initialise, reset_buffers
from colossus.models.cache import Cache
from colossus.models.decoder import Decoder
from colossus.models.loss import chunked_cross_entropy
from colossus.models.moe import RouterLosses

__all__ = [
    "Cache",
    "Decoder",
    "RouterLosses",
    "build",
    "chunked_cross_entropy",
    "initial_values",
    "initialise",
    "reset_buffers",
]
