"""Nemotron-4: squared ReLU, LayerNorm, rotations of half of each head."""

from dataclasses import dataclass
from functools import partial

from colossus.spec.model import AttentionSpec, LayerNormSpec, MlpSpec, ModelSpec, RopeSpec
from colossus.zoo.entry import Entry


@dataclass(frozen=True, slots=True)
class _Size:
    num_layers: int
    hidden_size: int
    num_heads: int


SIZES = {"nemotron4-15b": _Size(32, 6144, 48), "nemotron4-340b": _Size(96, 18_432, 96)}


def nemotron4(name: str) -> ModelSpec:
    """A Nemotron-4, by one of the names in `SIZES`. Its norms store their weights less 1."""
    size = SIZES[name]
    return ModelSpec(
        name=name,
        vocab_size=256_000,
        context_tokens=4096,
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        attention=AttentionSpec(
            num_heads=size.num_heads,
            num_kv_heads=8,
            head_dim=size.hidden_size // size.num_heads,
            rope=RopeSpec(rotated_fraction=0.5),
        ),
        mlp=MlpSpec(intermediate_size=4 * size.hidden_size, activation="squared_relu"),
        norm=LayerNormSpec(),
        zero_init_outputs=False,
    )


_SOURCE = "NVIDIA NeMo nemotron.py; vocabulary: recall"
ENTRIES = {name: Entry("Nemotron", _SOURCE, partial(nemotron4, name)) for name in SIZES}
