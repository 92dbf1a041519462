"""Llama 2, 3, 3.1 and 3.2, and SmolLM2, which has their parts: RMSNorm, RoPE, grouped queries, SwiGLU."""

from dataclasses import dataclass
from functools import partial

from colossus.spec.model import AttentionSpec, Llama3Scaling, MlpSpec, ModelSpec, NormSpec, RopeSpec
from colossus.zoo.entry import Entry


@dataclass(frozen=True, slots=True)
class _Size:
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int


@dataclass(frozen=True, slots=True)
class _Release:
    """What the sizes of a release share."""

    family: str
    vocab_size: int
    context_tokens: int
    rope: RopeSpec
    source: str = "Lightning-AI/litgpt config.py"
    tied_embeddings: bool = False


def _stretched(factor: float) -> RopeSpec:
    return RopeSpec(base=500_000.0, scaling=Llama3Scaling(factor=factor, original_context_tokens=8192))


_LLAMA_2 = _Release("Llama", 32_000, 4096, RopeSpec())
_LLAMA_3 = _Release("Llama", 128_256, 8192, RopeSpec(base=500_000.0))
_LLAMA_3_1 = _Release("Llama", 128_256, 131_072, _stretched(8.0))
_LLAMA_3_2 = _Release("Llama", 128_256, 131_072, _stretched(32.0), tied_embeddings=True)
_RECALLED = "Lightning-AI/litgpt config.py; RoPE base: recall"
_SMOLLM_2 = _Release("SmolLM", 49_152, 8192, RopeSpec(base=100_000.0), _RECALLED, tied_embeddings=True)
_SMOLLM_2_LARGE = _Release("SmolLM", 49_152, 8192, RopeSpec(base=130_000.0), _RECALLED, tied_embeddings=True)

_8B = _Size(32, 4096, 32, 8, 14_336)
_70B = _Size(80, 8192, 64, 8, 28_672)

MODELS = {
    "llama2-7b": (_LLAMA_2, _Size(32, 4096, 32, 32, 11_008)),
    "llama2-13b": (_LLAMA_2, _Size(40, 5120, 40, 40, 13_824)),
    "llama2-70b": (_LLAMA_2, _70B),
    "llama3-8b": (_LLAMA_3, _8B),
    "llama3-70b": (_LLAMA_3, _70B),
    "llama3.1-8b": (_LLAMA_3_1, _8B),
    "llama3.1-70b": (_LLAMA_3_1, _70B),
    "llama3.1-405b": (_LLAMA_3_1, _Size(126, 16_384, 128, 8, 53_248)),
    "llama3.2-1b": (_LLAMA_3_2, _Size(16, 2048, 32, 8, 8192)),
    "llama3.2-3b": (_LLAMA_3_2, _Size(28, 3072, 24, 8, 8192)),
    "smollm2-135m": (_SMOLLM_2, _Size(30, 576, 9, 3, 1536)),
    "smollm2-360m": (_SMOLLM_2, _Size(32, 960, 15, 5, 2560)),
    "smollm2-1.7b": (_SMOLLM_2_LARGE, _Size(24, 2048, 32, 32, 8192)),
}


def llama(name: str) -> ModelSpec:
    """A model of Llama's shape, by one of the names in `MODELS`."""
    release, size = MODELS[name]
    return ModelSpec(
        name=name,
        vocab_size=release.vocab_size,
        context_tokens=release.context_tokens,
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        attention=AttentionSpec(
            num_heads=size.num_heads,
            num_kv_heads=size.num_kv_heads,
            head_dim=size.hidden_size // size.num_heads,
            rope=release.rope,
        ),
        mlp=MlpSpec(intermediate_size=size.intermediate_size),
        norm=NormSpec(epsilon=1e-5),
        tied_embeddings=release.tied_embeddings,
        zero_init_outputs=False,
    )


ENTRIES = {
    name: Entry(release.family, release.source, partial(llama, name)) for name, (release, _) in MODELS.items()
}
