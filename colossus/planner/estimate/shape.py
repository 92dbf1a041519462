"""A model as the numbers that its time and memory depend on."""

from dataclasses import dataclass

import numpy as np

from colossus.planner.estimate.columns import Array, Columns
from colossus.planner.estimate.measured import ACTIVATIONS
from colossus.spec.model import AttentionSpec, LatentAttentionSpec, LayerNormSpec, MlpSpec, ModelSpec, MoeSpec


@dataclass(frozen=True, slots=True)
class ModelShape(Columns):
    """Sizes of a decoder's parts; counts are floats so that they may be arrays."""

    layers: Array
    hidden: Array
    heads: Array
    query: Array
    """Width of all queries together: heads × size of a query head."""
    key: Array
    """Width of all keys together: key-value heads × size of a key head."""
    value: Array
    """Width of all values together."""
    attended: Array
    """Width of what attention puts out: heads × size of a value head."""
    query_rank: Array
    """Width of the queries' latent (multi-head latent attention); 0: none."""
    key_value_rank: Array
    """Width of the latent that keys and values come from, its rotary part included; 0: none."""
    window: Array
    """Tokens that a windowed layer looks back; infinity: all."""
    windowed_layers: Array
    mlp: Array
    """Intermediate size of a dense layer's MLP."""
    mlp_matrices: Array
    """3 where the activation is gated, else 2."""
    dense_layers: Array
    """Layers whose MLP is dense; the others have experts."""
    experts: Array
    top_k: Array
    """Experts of a token, times what the busiest rank's experts get over the mean."""
    expert: Array
    """Intermediate size of one expert."""
    shared: Array
    """Intermediate size of all that every token passes in an expert layer: shared experts, residual MLP."""
    norms: Array
    """Normalisations per layer: 2, or 4 with a norm before and after each block."""
    vocab: Array
    tied: Array
    """1 where the head uses the embedding's weights."""
    positions: Array
    """Learned positions: rows of their table; 0: none."""
    activation: Array
    """Index into ACTIVATIONS (measured.py)."""
    layer_norms: Array
    """1 where norms also take the mean off."""
    head_norms: Array
    """1 where queries and keys are normed too."""
    rotary: Array
    """1 where queries and keys are turned by their position."""

    @property
    def expert_layers(self) -> Array:
        return self.layers - self.dense_layers

    @property
    def attention_weights(self) -> Array:
        """Weights of one layer's attention projections."""
        plain = self.hidden * (self.query + self.key + self.value)
        latent = (
            self.hidden * (self.query_rank + self.key_value_rank)
            + self.query_rank * self.query
            + self.key_value_rank * (self.key + self.value)
        )
        is_latent = self.key_value_rank > 0
        return is_latent * latent + (~is_latent) * plain + self.attended * self.hidden

    @property
    def mlp_weights(self) -> Array:
        """Weights of one dense layer's MLP."""
        return self.mlp_matrices * self.hidden * self.mlp

    @property
    def expert_weights(self) -> Array:
        """Weights of one expert."""
        return self.mlp_matrices * self.hidden * self.expert

    @property
    def shared_weights(self) -> Array:
        """Weights of an expert layer that every token is multiplied with: shared part and router."""
        return self.mlp_matrices * self.hidden * self.shared + self.hidden * self.experts

    @property
    def embedding_weights(self) -> Array:
        return self.vocab * self.hidden

    @classmethod
    def of(cls, model: ModelSpec, *, expert_load: float = 1.0) -> "ModelShape":
        """The shape of one model; `expert_load` is the tokens of the rank with the busiest experts over the mean."""
        attention, mlp = model.attention, model.mlp
        latent = attention if isinstance(attention, LatentAttentionSpec) else None
        moe = mlp if isinstance(mlp, MoeSpec) else None
        first = model.first_layers
        dense = mlp if isinstance(mlp, MlpSpec) else first.mlp if first is not None else None
        window = attention.window
        numbers = {
            "layers": model.num_layers,
            "hidden": model.hidden_size,
            "heads": attention.num_heads,
            "query": attention.num_heads * attention.head_dim,
            "key": attention.num_kv_heads * attention.head_dim,
            "value": attention.num_kv_heads * attention.value_head_dim,
            "attended": attention.num_heads * attention.value_head_dim,
            "query_rank": (latent.q_lora_rank or 0) if latent else 0,
            "key_value_rank": latent.kv_lora_rank + latent.rope_head_dim if latent else 0,
            "window": window.tokens if window else np.inf,
            "windowed_layers": window.num_window_layers(model.num_layers) if window else 0,
            "mlp": dense.intermediate_size if dense else 0,
            "mlp_matrices": 3 if mlp.gated else 2,
            "dense_layers": (first.num_layers if first else 0) if moe else model.num_layers,
            "experts": moe.num_experts if moe else 0,
            "top_k": moe.top_k * expert_load if moe else 0,
            "expert": moe.intermediate_size if moe else 0,
            "shared": moe.shared.intermediate_size if moe and moe.shared else 0,
            "norms": 4 if model.norm_placement == "sandwich" else 2,
            "vocab": model.vocab_size,
            "tied": model.tied_embeddings,
            "positions": model.context_tokens if model.learned_positions else 0,
            "activation": ACTIVATIONS.index(mlp.activation),
            "layer_norms": isinstance(model.norm, LayerNormSpec),
            "head_norms": isinstance(attention, AttentionSpec) and attention.qk_norm,
            "rotary": attention.rope is not None,
        }
        return cls(**{name: np.asarray(float(value)) for name, value in numbers.items()})
