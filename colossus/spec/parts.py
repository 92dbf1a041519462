"""The parts that a layer is made of, as numbers. Where it may have one of several, a union of types says so.

A part of a union has a `kind`; `ModelSpec` takes the first of each union where it is left out.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from colossus.spec.base import Frozen, Positive, PositiveFloat
from colossus.spec.positions import RopeSpec

Activation = Literal["swiglu", "geglu", "gelu", "squared_relu", "clamped_swiglu"]


def _kind_or(default: str) -> Discriminator:
    """The part's kind; `default` where none is named, as in configurations written before there were several."""

    def kind(value: Any) -> Any:
        if isinstance(value, dict):
            return value.get("kind", default)
        return getattr(value, "kind", default)

    return Discriminator(kind)


# --- norms ---


class NormSpec(Frozen):
    """Root-mean-square normalisation (arXiv:1910.07467); `weighted`: with a learned weight per channel."""

    kind: Literal["rms"] = "rms"
    epsilon: PositiveFloat = 1e-6
    weighted: bool = True


class LayerNormSpec(Frozen):
    """Normalisation to mean 0 and variance 1 (arXiv:1607.06450), with a weight per channel; `bias`: and a bias."""

    kind: Literal["layer"] = "layer"
    epsilon: PositiveFloat = 1e-5
    bias: bool = True

    @property
    def weighted(self) -> bool:
        return True


AnyNorm = Annotated[Annotated[NormSpec, Tag("rms")] | Annotated[LayerNormSpec, Tag("layer")], _kind_or("rms")]
NormPlacement = Literal["pre", "post", "sandwich"]


# --- attention ---


class WindowSpec(Frozen):
    """Sliding-window attention: a query sees the last `tokens` tokens, itself among them, and not all before."""

    tokens: Positive
    full_every: Annotated[int, Field(ge=2)] | None = None
    """Every so many-th layer has no window and sees all; None: all layers have the window."""

    def num_window_layers(self, num_layers: int) -> int:
        return num_layers - (num_layers // self.full_every if self.full_every else 0)

    def in_layer(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has the window."""
        return self.full_every is None or (layer + 1) % self.full_every != 0


class AttentionSpec(Frozen):
    """Causal grouped-query attention (arXiv:2305.13245): several heads of queries share keys and values."""

    kind: Literal["grouped"] = "grouped"
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    rope: RopeSpec | None = RopeSpec()
    qk_norm: bool = False
    """RMS-normalise queries and keys per head, before the rotation."""
    qk_norm_weights: Literal["head", "all_heads"] | None = None
    """Learned weights of q/k-norm. `head`: one per channel of a head, the same for all heads; `all_heads`: one for
    each channel of each head, and the mean square is taken over all heads together. None: no weights."""
    score_scale: PositiveFloat | None = None
    """What q·k is multiplied by before the softmax; None: 1/√head_dim."""
    score_soft_cap: PositiveFloat | None = None
    """Scores become `cap · tanh(scores / cap)` before the softmax."""
    score_temperature_tokens: Annotated[int, Field(ge=2)] | None = None
    """Scores of a query at position p of its document beyond it are multiplied, after the cap, by ln(p) /
    ln(`score_temperature_tokens`)."""
    window: WindowSpec | None = None
    sinks: bool = False
    """A learned score per head that takes part in the softmax and adds nothing: a head may attend to nothing."""
    bias: Literal["qkv", "all"] | None = None
    """Biases of the projections: of queries, keys and values, or of the output too."""

    @property
    def value_head_dim(self) -> int:
        return self.head_dim

    @property
    def cached_channels(self) -> int:
        """Numbers that generation keeps for a token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                f"every key-value head serves the same number of query heads"
            )
        if self.rope is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs of channels")
        if self.rope is not None and self.rope.rotated_fraction * self.head_dim % 2:
            raise ValueError(
                f"rope.rotated_fraction {self.rope.rotated_fraction:g} of head_dim {self.head_dim} is not an even "
                f"number of channels; rotary positions turn pairs of them"
            )
        if self.qk_norm_weights is not None and not self.qk_norm:
            raise ValueError(f"qk_norm_weights is {self.qk_norm_weights!r}, but qk_norm is false")
        return self


class LatentAttentionSpec(Frozen):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads are made from one
    short vector per token, which is all that generation keeps, with `rope_head_dim` channels of position that all
    heads share."""

    kind: Literal["latent"] = "latent"
    num_heads: Positive
    q_lora_rank: Positive | None = None
    """Width of the vector that queries are made from; None: they are made from the hidden state itself."""
    kv_lora_rank: Positive
    nope_head_dim: Positive
    """Channels of a head's query and key without position."""
    rope_head_dim: Positive
    """Channels of a head's query and key that are rotated."""
    value_head_dim: Positive
    rope: RopeSpec = RopeSpec()
    score_scale: PositiveFloat | None = None
    """What q·k is multiplied by before the softmax; None: 1/√head_dim."""

    @property
    def head_dim(self) -> int:
        """Channels of a head's query, and of its key."""
        return self.nope_head_dim + self.rope_head_dim

    @property
    def num_kv_heads(self) -> int:
        """Training expands the short vector to keys and values for every head."""
        return self.num_heads

    @property
    def qk_norm(self) -> bool:
        """The short vectors are normalised, and not the heads made from them."""
        return False

    @property
    def window(self) -> None:
        """Every layer sees all."""
        return None

    @property
    def cached_channels(self) -> int:
        """Numbers that generation keeps for a token in one layer."""
        return self.kv_lora_rank + self.rope_head_dim

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rope_head_dim % 2:
            raise ValueError(
                f"rope_head_dim {self.rope_head_dim} is odd; rotary positions turn pairs of channels"
            )
        return self


AnyAttention = Annotated[
    Annotated[AttentionSpec, Tag("grouped")] | Annotated[LatentAttentionSpec, Tag("latent")],
    _kind_or("grouped"),
]


# --- feed-forward ---


GATED: frozenset[Activation] = frozenset({"swiglu", "geglu", "clamped_swiglu"})


class MlpSpec(Frozen):
    """The feed-forward part: two matrices, or three where the activation is gated (`swiglu`, `geglu`, and
    `clamped_swiglu`: gate · sigmoid(1.702 · gate) · (up + 1), gate clamped to at most 7 and up to ±7)."""

    kind: Literal["dense"] = "dense"
    intermediate_size: Positive
    activation: Activation = "swiglu"
    bias: bool = False

    @property
    def gated(self) -> bool:
        return self.activation in GATED


class RouterGroups(Frozen):
    """Experts are chosen within the `top_groups` best of `num_groups` groups, so that a token goes to few nodes
    (DeepSeek-V3, arXiv:2412.19437)."""

    num_groups: Positive
    top_groups: Positive

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups {self.top_groups} is more than num_groups {self.num_groups}")
        return self


class RouterSpec(Frozen):
    """How each token's experts are chosen and weighted: scores of all experts, the highest `top_k` of them."""

    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """From logits to scores: softmax over all experts, or each expert's sigmoid by itself."""
    renormalized: bool = True
    """The chosen experts' scores are divided by their sum; with softmax, that is softmax over the chosen ones."""
    weight_multiplier: PositiveFloat = 1.0
    """What the chosen experts' weights are multiplied by at the end."""
    soft_cap: PositiveFloat | None = None
    """Logits become `cap · tanh(logits / cap)`."""
    bias: bool = False
    balancing_bias: bool = False
    """A number per expert that is added to its score for the choice alone, and moved by its load, not by a gradient."""
    groups: RouterGroups | None = None


class SharedMlpSpec(Frozen):
    """What every token passes beside its experts: shared experts, or a residual dense MLP, as one MLP with the
    experts' activation."""

    intermediate_size: Positive
    """Of all shared experts together."""
    sum_multiplier: PositiveFloat = 1.0
    """What the sum of experts and shared MLP is multiplied by; Grok-2: 1/√2."""


class MoeSpec(Frozen):
    """A mixture of experts: each token goes through `top_k` of `num_experts` MLPs, chosen by a router."""

    kind: Literal["moe"] = "moe"
    num_experts: Positive
    top_k: Positive
    intermediate_size: Positive
    """Of one expert."""
    activation: Activation = "swiglu"
    bias: bool = False
    """Biases in the experts and in the shared MLP."""
    shared: SharedMlpSpec | None = None
    router: RouterSpec = RouterSpec()

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than num_experts {self.num_experts}")
        groups = self.router.groups
        if groups is not None and self.num_experts % groups.num_groups:
            raise ValueError(
                f"num_experts {self.num_experts} is not a multiple of num_groups {groups.num_groups}"
            )
        return self


AnyMlp = Annotated[Annotated[MlpSpec, Tag("dense")] | Annotated[MoeSpec, Tag("moe")], _kind_or("dense")]


class FirstLayers(Frozen):
    """The first layers' own feed-forward part: in DeepSeek's models they are dense and all others are not."""

    num_layers: Positive
    mlp: MlpSpec
