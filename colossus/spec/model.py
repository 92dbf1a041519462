"""A model, as numbers: what it is made of, and what it costs. No torch.

`ModelSpec.parameters()` is the one table that everything else reads: the built model has exactly these
parameters (a test compares them), the optimizer groups by their role, the initialiser takes their spread,
the checkpoint checks their shapes, and the counts of parameters, FLOPs and bytes are sums over it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from colossus.spec.base import Frozen

Positive = Annotated[int, Field(gt=0)]
Role = Literal["embedding", "sparse_embedding", "head", "matrix", "vector"]
Activation = Literal["swiglu", "geglu", "gelu", "squared_relu"]
Dtype = Literal["float32", "bfloat16"]

BYTES_PER_ELEMENT: dict[str, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter tensor.

    `role` says how it is used, and so how it is optimised: `embedding` (rows looked up), `sparse_embedding`
    (rows looked up, of which a step touches few), `head` (projection to the vocabulary), `matrix` (any other
    matmul), `vector` (norm weights and other elementwise ones: no decay). `std` is the spread of its
    normal initial values; 0 means that it starts as the constant `start`.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    std: float = 0.0
    start: float = 0.0

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class RopeSpec(Frozen):
    """Rotary positions (arXiv:2104.09864), rotating the two halves of each head."""

    base: Annotated[float, Field(gt=1)] = 10_000.0


class NormSpec(Frozen):
    """Root-mean-square normalisation; `weighted`: with a learned weight per channel."""

    epsilon: Annotated[float, Field(gt=0)] = 1e-6
    weighted: bool = True


def _rising(orders: tuple[int, ...]) -> tuple[int, ...]:
    if list(orders) != sorted(set(orders)):
        raise ValueError(f"{list(orders)} must rise, each order named once: each has rows of its own")
    return orders


class NgramSpec(Frozen):
    """Embeddings of the last n tokens together, looked up by hash in a table of `num_rows` rows per order n
    (over-tokenised inputs, arXiv:2501.16975): capacity that costs no matmul."""

    orders: Annotated[
        tuple[Annotated[int, Field(ge=2, le=5)], ...],
        Field(strict=False, min_length=1),
        AfterValidator(_rising),
    ] = (2, 3)
    num_rows: Positive = 65_536


class RecallSpec(Frozen):
    """An embedding of what came next the last time: of the token that followed the latest earlier occurrence,
    in the same document, of the n tokens that end here, for the longest n of `orders` that has occurred.

    What an induction head (arXiv:2209.11895) has to learn, two layers deep, is here from the first step.
    """

    orders: Annotated[
        tuple[Annotated[int, Field(ge=1, le=5)], ...],
        Field(strict=False, min_length=1),
        AfterValidator(_rising),
    ] = (1, 2, 3, 4)


class AttentionSpec(Frozen):
    """Causal grouped-query attention (arXiv:2305.13245): several heads of queries share keys and values."""

    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    rope: RopeSpec | None = RopeSpec()
    qk_norm: bool = False
    """RMS-normalise queries and keys per head, without weights, before the rotation."""
    score_scale: Annotated[float, Field(gt=0)] | None = None
    """What q·k is multiplied by before the softmax; None: 1/√head_dim."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                f"every key-value head serves the same number of query heads"
            )
        if self.rope is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs of channels")
        return self


class MlpSpec(Frozen):
    """The feed-forward part: two matrices, or three where the activation is gated (`swiglu`, `geglu`)."""

    intermediate_size: Positive
    activation: Activation = "swiglu"

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu")


class ModelSpec(Frozen):
    """A decoder-only language model."""

    name: str
    vocab_size: Positive
    context_tokens: Positive
    num_layers: Positive
    hidden_size: Positive
    attention: AttentionSpec
    mlp: MlpSpec
    norm: NormSpec = NormSpec()
    embedding_norm: bool = False
    """Normalise the embeddings before the first layer."""
    ngrams: NgramSpec | None = None
    recall: RecallSpec | None = None
    tied_embeddings: bool = False
    """The head uses the embedding's weights."""
    logit_soft_cap: Annotated[float, Field(gt=0)] | None = None
    """Logits become `cap · tanh(logits / cap)`."""
    zero_init_outputs: bool = True
    """Attention and MLP output projections start at zero, so that every block starts as the identity."""

    # --- the table of parameters ---

    def parameters(self) -> tuple[ParameterSpec, ...]:
        """Every parameter, in the built model's order. Linear weights are (outputs, inputs)."""
        return tuple(self._parameters())

    def _parameters(self) -> Iterator[ParameterSpec]:
        hidden, attention, mlp = self.hidden_size, self.attention, self.mlp
        query_size = attention.num_heads * attention.head_dim
        kv_size = attention.num_kv_heads * attention.head_dim

        def matrix(name: str, outputs: int, inputs: int, *, writes_residual: bool = False) -> ParameterSpec:
            std = 0.0 if writes_residual and self.zero_init_outputs else inputs**-0.5
            if writes_residual and not self.zero_init_outputs:
                std /= math.sqrt(2 * self.num_layers)  # GPT-2's scaling: the residual sum keeps its spread
            return ParameterSpec(name, (outputs, inputs), "matrix", std)

        def norm(name: str) -> Iterator[ParameterSpec]:
            if self.norm.weighted:
                yield ParameterSpec(f"{name}.weight", (hidden,), "vector", start=1.0)

        # A tied embedding is also the head, whose logits must start small.
        embedding_std = hidden**-0.5 if self.tied_embeddings else 1.0
        yield ParameterSpec("embedding.weight", (self.vocab_size, hidden), "embedding", embedding_std)
        if self.ngrams is not None:
            rows = len(self.ngrams.orders) * self.ngrams.num_rows
            yield ParameterSpec("ngram_embedding.weight", (rows, hidden), "sparse_embedding")
        if self.recall is not None:
            rows = len(self.recall.orders) * self.vocab_size + 1
            yield ParameterSpec("recall_embedding.weight", (rows, hidden), "sparse_embedding")
        if self.embedding_norm:
            yield from norm("embedding_norm")
        for i in range(self.num_layers):
            layer = f"layers.{i}"
            yield from norm(f"{layer}.attention_norm")
            yield matrix(f"{layer}.attention.query.weight", query_size, hidden)
            yield matrix(f"{layer}.attention.key.weight", kv_size, hidden)
            yield matrix(f"{layer}.attention.value.weight", kv_size, hidden)
            yield matrix(f"{layer}.attention.output.weight", hidden, query_size, writes_residual=True)
            yield from norm(f"{layer}.mlp_norm")
            if mlp.gated:
                yield matrix(f"{layer}.mlp.gate.weight", mlp.intermediate_size, hidden)
            yield matrix(f"{layer}.mlp.up.weight", mlp.intermediate_size, hidden)
            yield matrix(f"{layer}.mlp.down.weight", hidden, mlp.intermediate_size, writes_residual=True)
        yield from norm("final_norm")
        if not self.tied_embeddings:
            head_std = 0.0 if self.zero_init_outputs else hidden**-0.5
            yield ParameterSpec("head.weight", (self.vocab_size, hidden), "head", head_std)

    # --- what it costs ---

    def num_params(self) -> int:
        """All weights; a tied matrix counts once."""
        return sum(parameter.num_elements for parameter in self.parameters())

    def num_matmul_params(self) -> int:
        """Weights that each token is multiplied with: matrices and the head, no looked-up rows."""
        matrices = sum(p.num_elements for p in self.parameters() if p.role in ("matrix", "head"))
        return matrices + (self.vocab_size * self.hidden_size if self.tied_embeddings else 0)

    def forward_flops(self, num_sequences: int, sequence_tokens: int) -> int:
        """FLOPs of one forward pass's matmuls, attention over the full square, as torch's counter does."""
        tokens = num_sequences * sequence_tokens
        square = 4 * self.attention.num_heads * self.attention.head_dim * sequence_tokens
        return tokens * (2 * self.num_matmul_params() + self.num_layers * square)

    def flops_per_token(self, sequence_tokens: int) -> float:
        """Model FLOPs of one trained token, the numerator of MFU: 6 per matmul weight (2 forward, 4 backward;
        arXiv:2204.02311 appendix B), and attention over the square's causal half. Recompute never counts."""
        causal = 4 * self.attention.num_heads * self.attention.head_dim * (sequence_tokens + 1) / 2
        return 6 * self.num_matmul_params() + 3 * self.num_layers * causal

    def weight_bytes(self, dtype: Dtype = "float32") -> int:
        """Bytes of the weights when all are held in `dtype`."""
        return self.num_params() * BYTES_PER_ELEMENT[dtype]

    def kv_cache_bytes_per_token(self, dtype: Dtype = "float32") -> int:
        """Bytes of keys and values that generation keeps for one token of one sequence."""
        per_layer = 2 * self.attention.num_kv_heads * self.attention.head_dim
        return self.num_layers * per_layer * BYTES_PER_ELEMENT[dtype]
