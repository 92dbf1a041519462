"""OLMo 2: norms on what attention and MLP write, and of all heads' queries and keys together."""

from dataclasses import dataclass
from functools import partial

from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec, RopeSpec
from colossus.zoo.entry import Entry


@dataclass(frozen=True, slots=True)
class _Size:
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    source: str = "Lightning-AI/litgpt config.py"


SIZES = {
    "olmo2-7b": _Size(32, 4096, 32, 32, 11_008),
    "olmo2-13b": _Size(40, 5120, 40, 40, 13_824),
    "olmo2-32b": _Size(64, 5120, 40, 8, 27_648, "allenai/OLMo-core transformer/config.py olmo2_32B"),
}


def olmo2(name: str) -> ModelSpec:
    """An OLMo 2, by one of the names in `SIZES`."""
    size = SIZES[name]
    return ModelSpec(
        name=name,
        vocab_size=100_352,
        context_tokens=4096,
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        attention=AttentionSpec(
            num_heads=size.num_heads,
            num_kv_heads=size.num_kv_heads,
            head_dim=128,
            rope=RopeSpec(base=500_000.0),
            qk_norm=True,
            qk_norm_weights="all_heads",
        ),
        mlp=MlpSpec(intermediate_size=size.intermediate_size),
        norm_placement="post",
        zero_init_outputs=False,
    )


ENTRIES = {name: Entry("OLMo", size.source, partial(olmo2, name)) for name, size in SIZES.items()}
