"""Text out of a trained model."""

from colossus.generate.generate import generate, generate_tokens
from colossus.generate.load import load_run
from colossus.generate.sampling import Sampling, next_token

__all__ = ["Sampling", "generate", "generate_tokens", "load_run", "next_token"]
