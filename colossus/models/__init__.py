"""Single-device models in PyTorch. Start with decoder.py."""

from colossus.models.decoder import Cache, Decoder, build, initialise
from colossus.models.loss import chunked_cross_entropy

__all__ = ["Cache", "Decoder", "build", "chunked_cross_entropy", "initialise"]
