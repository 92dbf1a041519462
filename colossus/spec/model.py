"""A model, as numbers: what it is made of, and what it costs. No torch.

`ModelSpec.parameters()` is the one table that everything else reads: the built model has exactly these
parameters (a test compares them), the optimizer groups by their role, the initialiser takes their spread,
the checkpoint checks their shapes, and the counts of parameters, FLOPs and bytes are sums over it.
The parts are in `parts.py`, `positions.py` and `lookups.py`, the table in `parameters.py`.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from colossus.spec import parameters as table
from colossus.spec.base import Frozen, Positive, PositiveFloat
from colossus.spec.lookups import NgramSpec, RecallSpec
from colossus.spec.parameters import LayerGroup, ParameterSpec, Role
from colossus.spec.parts import (
    Activation,
    AnyAttention,
    AnyMlp,
    AnyNorm,
    AttentionSpec,
    FirstLayers,
    LatentAttentionSpec,
    LayerNormSpec,
    MlpSpec,
    MoeSpec,
    NormPlacement,
    NormSpec,
    RouterGroups,
    RouterSpec,
    SharedMlpSpec,
    WindowSpec,
)
from colossus.spec.positions import Llama3Scaling, RopeSpec, YarnScaling

__all__ = [
    "BYTES_PER_ELEMENT",
    "Activation",
    "AttentionSpec",
    "Dtype",
    "FirstLayers",
    "LatentAttentionSpec",
    "LayerGroup",
    "LayerNormSpec",
    "Llama3Scaling",
    "MlpSpec",
    "ModelSpec",
    "MoeSpec",
    "NgramSpec",
    "NormPlacement",
    "NormSpec",
    "ParameterSpec",
    "Positive",
    "RecallSpec",
    "Role",
    "RopeSpec",
    "RouterGroups",
    "RouterSpec",
    "SharedMlpSpec",
    "WindowSpec",
    "YarnScaling",
]

Dtype = Literal["float32", "bfloat16"]

BYTES_PER_ELEMENT: dict[str, int] = {"float32": 4, "bfloat16": 2}


class ModelSpec(Frozen):
    """A decoder-only language model."""

    name: str
    vocab_size: Positive
    context_tokens: Positive
    num_layers: Positive
    hidden_size: Positive
    attention: AnyAttention
    mlp: AnyMlp
    first_layers: FirstLayers | None = None
    """The first layers have this feed-forward part in place of `mlp`."""
    norm: AnyNorm = NormSpec()
    norm_placement: NormPlacement = "pre"
    """Where attention and MLP are normalised. `pre`: x + f(norm(x)); `post`: x + norm(f(x)), as in OLMo 2;
    `sandwich`: x + norm(f(norm(x)))."""
    embedding_norm: bool = False
    """Normalise the embeddings before the first layer."""
    embedding_multiplier: PositiveFloat = 1.0
    """What a token's embedding is multiplied by."""
    learned_positions: bool = False
    """A learned embedding for each of `context_tokens` positions is added to the token's."""
    ngrams: NgramSpec | None = None
    recall: RecallSpec | None = None
    tied_embeddings: bool = False
    """The head uses the embedding's weights."""
    logit_multiplier: PositiveFloat = 1.0
    """What logits are multiplied by, before the soft cap."""
    logit_soft_cap: Annotated[float, Field(gt=0)] | None = None
    """Logits become `cap · tanh(logits / cap)`."""
    zero_init_outputs: bool = True
    """Attention and MLP output projections start at zero, so that every block starts as the identity."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        first = self.first_layers
        if first is not None and first.num_layers >= self.num_layers:
            raise ValueError(
                f"first_layers.num_layers is {first.num_layers}, but num_layers is {self.num_layers}; "
                f"at least one layer must have mlp"
            )
        return self

    # --- the table of parameters ---

    def parameters(self) -> tuple[ParameterSpec, ...]:
        """Every parameter, in the built model's order. Linear weights are (outputs, inputs), those of experts
        (num_experts, outputs, inputs)."""
        return table.all_parameters(self)

    def input_parameters(self) -> tuple[ParameterSpec, ...]:
        """Those that stand before the layers: embeddings and their norm."""
        return table.input_parameters(self)

    def output_parameters(self) -> tuple[ParameterSpec, ...]:
        """Those that stand after the layers: the final norm and, where it is not tied, the head."""
        return table.output_parameters(self)

    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The layers, those that are alike together; a group's parameters are one layer's, named within it."""
        return table.layer_groups(self)

    def mlp_of(self, layer: int) -> MlpSpec | MoeSpec:
        """The feed-forward part of a layer, counted from 0."""
        first = self.first_layers
        return first.mlp if first is not None and layer < first.num_layers else self.mlp

    # --- what it costs ---

    def num_params(self) -> int:
        """All weights, those of all experts; a tied matrix counts once."""
        return _counts(self).params

    def num_active_params(self) -> int:
        """Weights that one token uses: all but the experts that it does not go through. Whole embedding tables
        count, as in most published figures."""
        return _counts(self).active

    def num_matmul_params(self) -> int:
        """Weights that each token is multiplied with: matrices and the head, of experts those that it goes
        through; no looked-up rows."""
        return _counts(self).matmul

    def attention_pairs(self, sequence_tokens: int) -> int:
        """Pairs of a query and a key that it sees, in one sequence, summed over layers: each query sees itself
        and what is before it, at most a window of it where the layer has one."""
        causal = sequence_tokens * (sequence_tokens + 1) // 2
        window = self.attention.window
        if window is None or sequence_tokens <= window.tokens:
            return self.num_layers * causal
        clipped = causal - (sequence_tokens - window.tokens) * (sequence_tokens - window.tokens + 1) // 2
        with_window = window.num_window_layers(self.num_layers)
        return with_window * clipped + (self.num_layers - with_window) * causal

    def flops_per_attention_pair(self) -> int:
        """FLOPs of one query and one key in all heads of a layer: their product, and the value's share."""
        attention = self.attention
        return 2 * attention.num_heads * (attention.head_dim + attention.value_head_dim)

    def forward_flops(self, num_sequences: int, sequence_tokens: int) -> int:
        """FLOPs of one forward pass's matmuls, attention over the full square, as torch's counter does."""
        tokens = num_sequences * sequence_tokens
        square = self.num_layers * self.flops_per_attention_pair() * sequence_tokens
        return tokens * (2 * self.num_matmul_params() + square)

    def flops_per_token(self, sequence_tokens: int) -> float:
        """Model FLOPs of one trained token, the numerator of MFU: 6 per matmul weight (2 forward, 4 backward;
        arXiv:2204.02311 appendix B), and attention over the pairs that a query sees. Recompute never counts."""
        pairs = self.attention_pairs(sequence_tokens) / sequence_tokens
        return 6 * self.num_matmul_params() + 3 * self.flops_per_attention_pair() * pairs

    def weight_bytes(self, dtype: Dtype = "float32") -> int:
        """Bytes of the weights when all are held in `dtype`."""
        return self.num_params() * BYTES_PER_ELEMENT[dtype]

    def kv_cache_bytes_per_token(self, dtype: Dtype = "float32") -> int:
        """Bytes that generation keeps for one more token of one sequence: keys and values, or the short vector
        of latent attention, in every layer. Where a window is full, less: see `kv_cache_bytes`."""
        return self.num_layers * self.attention.cached_channels * BYTES_PER_ELEMENT[dtype]

    def kv_cache_bytes(self, sequence_tokens: int, dtype: Dtype = "float32") -> int:
        """Bytes that generation keeps for one sequence so long; layers with a window keep no more than it."""
        window = self.attention.window
        token_layers = self.num_layers * sequence_tokens
        if window is not None and sequence_tokens > window.tokens:
            with_window = window.num_window_layers(self.num_layers)
            token_layers -= with_window * (sequence_tokens - window.tokens)
        return token_layers * self.attention.cached_channels * BYTES_PER_ELEMENT[dtype]


class _Counts:
    """Sums over the table, without spelling out layers that are alike."""

    __slots__ = ("active", "matmul", "params")

    def __init__(self, spec: ModelSpec) -> None:
        self.params = self.active = self.matmul = 0
        for parameter, times, mlp in _with_multiplicity(spec):
            elements = times * parameter.num_elements
            used = elements
            if parameter.expert and isinstance(mlp, MoeSpec):
                used = elements // mlp.num_experts * mlp.top_k
            self.params += elements
            self.active += used
            self.matmul += used if parameter.role in ("matrix", "head") else 0
        if spec.tied_embeddings:
            self.matmul += spec.vocab_size * spec.hidden_size


def _with_multiplicity(spec: ModelSpec) -> Iterator[tuple[ParameterSpec, int, MlpSpec | MoeSpec | None]]:
    for parameter in (*spec.input_parameters(), *spec.output_parameters()):
        yield parameter, 1, None
    for group in spec.layer_groups():
        for parameter in group.parameters:
            yield parameter, group.num_layers, group.mlp


@lru_cache(maxsize=256)
def _counts(spec: ModelSpec) -> _Counts:
    return _Counts(spec)
