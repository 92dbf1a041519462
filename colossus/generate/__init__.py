"""Text out of a trained model."""

from colossus.generate.engine import Engine
from colossus.generate.generate import Completion, generate, generate_batch, generate_tokens
from colossus.generate.load import Borders, LoadedModel, load_model, load_run
from colossus.generate.sampling import Sampling, next_token

__all__ = [
    "Borders",
    "Completion",
    "Engine",
    "LoadedModel",
    "Sampling",
    "generate",
    "generate_batch",
    "generate_tokens",
    "load_model",
    "load_run",
    "next_token",
]
