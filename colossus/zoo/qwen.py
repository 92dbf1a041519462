"""Qwen2.5: Llama's parts, and biases of queries, keys and values. Qwen3, dense and mixtures of experts: weighted norms
of each head's queries and keys instead."""

from dataclasses import dataclass
from functools import partial

from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec, MoeSpec, RopeSpec
from colossus.zoo.entry import Entry

_SOURCE = "Lightning-AI/litgpt config.py"
_SOURCE_2_5 = "Lightning-AI/litgpt config.py; tied embeddings: recall"


@dataclass(frozen=True, slots=True)
class _Size:
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    mlp: MlpSpec | MoeSpec
    tied_embeddings: bool = False


def _dense(intermediate_size: int) -> MlpSpec:
    return MlpSpec(intermediate_size=intermediate_size)


def _experts(intermediate_size: int) -> MoeSpec:
    return MoeSpec(num_experts=128, top_k=8, intermediate_size=intermediate_size)


SIZES = {
    "qwen3-0.6b": _Size(28, 1024, 16, 8, _dense(3072), tied_embeddings=True),
    "qwen3-1.7b": _Size(28, 2048, 16, 8, _dense(6144), tied_embeddings=True),
    "qwen3-4b": _Size(36, 2560, 32, 8, _dense(9728), tied_embeddings=True),
    "qwen3-8b": _Size(36, 4096, 32, 8, _dense(12_288)),
    "qwen3-14b": _Size(40, 5120, 40, 8, _dense(17_408)),
    "qwen3-32b": _Size(64, 5120, 64, 8, _dense(25_600)),
    "qwen3-30b-a3b": _Size(48, 2048, 32, 4, _experts(768)),
    "qwen3-235b-a22b": _Size(94, 4096, 64, 4, _experts(1536)),
}


def qwen3(name: str) -> ModelSpec:
    """A Qwen3, by one of the names in `SIZES`."""
    size = SIZES[name]
    return ModelSpec(
        name=name,
        vocab_size=151_936,
        context_tokens=40_960,
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        attention=AttentionSpec(
            num_heads=size.num_heads,
            num_kv_heads=size.num_kv_heads,
            head_dim=128,
            rope=RopeSpec(base=1_000_000.0),
            qk_norm=True,
            qk_norm_weights="head",
        ),
        mlp=size.mlp,
        tied_embeddings=size.tied_embeddings,
        zero_init_outputs=False,
    )


def qwen2_5_0_5b() -> ModelSpec:
    return _qwen2_5(
        "qwen2.5-0.5b", 151_936, 32_768, _Size(24, 896, 14, 2, _dense(4864), tied_embeddings=True)
    )


def qwen2_5_7b() -> ModelSpec:
    return _qwen2_5("qwen2.5-7b", 152_064, 131_072, _Size(28, 3584, 28, 4, _dense(18_944)))


def _qwen2_5(name: str, vocab_size: int, context_tokens: int, size: _Size) -> ModelSpec:
    return ModelSpec(
        name=name,
        vocab_size=vocab_size,
        context_tokens=context_tokens,
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        attention=AttentionSpec(
            num_heads=size.num_heads,
            num_kv_heads=size.num_kv_heads,
            head_dim=size.hidden_size // size.num_heads,
            rope=RopeSpec(base=1_000_000.0),
            bias="qkv",
        ),
        mlp=size.mlp,
        tied_embeddings=size.tied_embeddings,
        zero_init_outputs=False,
    )


ENTRIES = {
    "qwen2.5-0.5b": Entry("Qwen", _SOURCE_2_5, qwen2_5_0_5b),
    "qwen2.5-7b": Entry("Qwen", _SOURCE_2_5, qwen2_5_7b),
    **{name: Entry("Qwen", _SOURCE, partial(qwen3, name)) for name in SIZES},
}
