"""GPT-2, GPT-3 and the larger models of that shape: LayerNorm, biases, learned positions, GELU, tied embeddings.

GPT-3's layers alternate dense and banded sparse attention; here, as in all public reproductions, all are dense.
"""

from dataclasses import dataclass
from functools import partial

from colossus.spec.model import AttentionSpec, LayerNormSpec, MlpSpec, ModelSpec
from colossus.zoo.entry import Entry


@dataclass(frozen=True, slots=True)
class _Size:
    num_layers: int
    hidden_size: int
    num_heads: int
    context_tokens: int
    source: str
    vocab_size: int = 50_257


_NANOGPT = "karpathy/nanoGPT model.py"
_GPT3 = "arXiv:2005.14165 table 2.1; recall"
_MEGATRON = "arXiv:2205.05198 table 3, vocabulary padded to 51,200; recall"
_NEMO = "NVIDIA NeMo GPTConfig175B; vocabulary: recall, padded to 51,200 in MLPerf"

SIZES = {
    "gpt2": _Size(12, 768, 12, 1024, _NANOGPT),
    "gpt2-medium": _Size(24, 1024, 16, 1024, _NANOGPT),
    "gpt2-large": _Size(36, 1280, 20, 1024, _NANOGPT),
    "gpt2-xl": _Size(48, 1600, 25, 1024, _NANOGPT),
    "gpt3-6.7b": _Size(32, 4096, 32, 2048, _GPT3),
    "gpt3-13b": _Size(
        40, 5120, 40, 2048, _GPT3 + " (5140 there; no multiple of 40 heads, all others take 5120)"
    ),
    "gpt3-22b": _Size(48, 6144, 64, 2048, _MEGATRON, 51_200),
    "gpt3-175b": _Size(96, 12_288, 96, 2048, _NEMO),
    "gpt3-530b": _Size(105, 20_480, 128, 2048, _MEGATRON + "; Megatron-Turing NLG", 51_200),
    "gpt3-1t": _Size(128, 25_600, 160, 2048, _MEGATRON, 51_200),
}


def gpt(name: str) -> ModelSpec:
    """A model of GPT's shape, by one of the names in `SIZES`."""
    size = SIZES[name]
    return ModelSpec(
        name=name,
        vocab_size=size.vocab_size,
        context_tokens=size.context_tokens,
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        attention=AttentionSpec(
            num_heads=size.num_heads,
            num_kv_heads=size.num_heads,
            head_dim=size.hidden_size // size.num_heads,
            rope=None,
            bias="all",
        ),
        mlp=MlpSpec(intermediate_size=4 * size.hidden_size, activation="gelu", bias=True),
        norm=LayerNormSpec(),
        learned_positions=True,
        tied_embeddings=True,
        zero_init_outputs=False,
    )


ENTRIES = {name: Entry("GPT", size.source, partial(gpt, name)) for name, size in SIZES.items()}
