"""Parts that a ModelSpec can name and the decoder cannot build yet."""

from collections.abc import Iterator

from colossus.errors import ConfigError
from colossus.models.parts import ACTIVATIONS
from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec, NormSpec


def refuse_missing_parts(spec: ModelSpec) -> None:
    """Raises ConfigError, naming the parts, if the decoder cannot build this model."""
    missing = list(_missing(spec))
    if missing:
        raise ConfigError(
            f"the decoder cannot build {spec.name} yet: it has no {', no '.join(missing)}. "
            f"Counting and planning such a model works; training it does not."
        )


def _missing(spec: ModelSpec) -> Iterator[str]:
    if isinstance(spec.attention, AttentionSpec):
        yield from _missing_in_attention(spec.attention)
    else:
        yield f"latent attention (attention.kind = {spec.attention.kind!r})"
    mlps = [spec.mlp] if spec.first_layers is None else [spec.mlp, spec.first_layers.mlp]
    if not all(isinstance(mlp, MlpSpec) for mlp in mlps):
        yield "mixture of experts (mlp.kind = 'moe')"
    if spec.first_layers is not None:
        yield "layers with different MLPs (first_layers)"
    if any(mlp.bias for mlp in mlps):
        yield "biases in the MLP (mlp.bias)"
    if any(mlp.activation not in ACTIVATIONS for mlp in mlps):
        yield f"such activation (mlp.activation = {spec.mlp.activation!r})"
    if not isinstance(spec.norm, NormSpec):
        yield f"LayerNorm (norm.kind = {spec.norm.kind!r})"
    if spec.norm_placement != "pre":
        yield f"norms so placed (norm_placement = {spec.norm_placement!r})"
    if spec.learned_positions:
        yield "learned positions (learned_positions)"
    if spec.embedding_multiplier != 1:
        yield "multiplier of embeddings (embedding_multiplier)"
    if spec.logit_multiplier != 1:
        yield "multiplier of logits (logit_multiplier)"


def _missing_in_attention(attention: AttentionSpec) -> Iterator[str]:
    if attention.rope is not None and attention.rope.scaling is not None:
        yield f"scaling of rotary positions (attention.rope.scaling.kind = {attention.rope.scaling.kind!r})"
    if attention.rope is not None and attention.rope.rotated_fraction != 1:
        yield "rotation of a part of each head (attention.rope.rotated_fraction)"
    if attention.qk_norm_weights is not None:
        yield "weights of q/k-norm (attention.qk_norm_weights)"
    if attention.score_soft_cap is not None:
        yield "soft cap of scores (attention.score_soft_cap)"
    if attention.score_temperature_tokens is not None:
        yield "temperature of scores by position (attention.score_temperature_tokens)"
    if attention.window is not None:
        yield "sliding window (attention.window)"
    if attention.sinks:
        yield "attention sinks (attention.sinks)"
    if attention.bias is not None:
        yield "biases in attention (attention.bias)"
