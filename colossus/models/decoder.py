"""The decoder: the file to read first. Single-device code that knows nothing of parallelism.

    tokens ─► embedding + lookups ─► layers × [norm ─► attention ─► norm ─► +, norm ─► MLP ─► norm ─► +] ─► norm ─► head

Which parts it is made of, and which of the norms there are, is decided once, when it is built from a `ModelSpec`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colossus.models.attend import attention_bias, who_sees
from colossus.models.attention import Attention, Portion, Sight
from colossus.models.cache import Cache, LayerCache
from colossus.models.latent_attention import LatentAttention
from colossus.models.lookups import NgramEmbedding, RecallEmbedding
from colossus.models.moe import MixtureOfExperts, RouterLosses
from colossus.models.parts import Embedding, Linear, build_mlp, build_norm
from colossus.models.positions import Rope, positions_in_document, score_temperatures
from colossus.spec.model import AttentionSpec, ModelSpec, MoeSpec


class Layer(nn.Module):
    def __init__(self, spec: ModelSpec, number: int) -> None:
        super().__init__()
        before, after = spec.norm_placement != "post", spec.norm_placement != "pre"
        self.attention_norm = _norm(spec, before)
        self.attention = _attention(spec, number)
        self.attention_output_norm = _norm(spec, after)
        self.mlp_norm = _norm(spec, before)
        self.mlp = _mlp(spec, number)
        self.mlp_output_norm = _norm(spec, after)
        self.is_mixture = isinstance(self.mlp, MixtureOfExperts)

    def forward(
        self,
        x: Tensor,
        sight: Sight,
        cache: LayerCache | None = None,
        router_losses: RouterLosses | None = None,
    ) -> Tensor:
        x = x + self.attention_output_norm(self.attention(self.attention_norm(x), sight, cache))
        inner = self.mlp_norm(x)
        made = self.mlp(inner, router_losses) if self.is_mixture else self.mlp(inner)
        return x + self.mlp_output_norm(made)


def _norm(spec: ModelSpec, there: bool) -> nn.Module:
    return build_norm(spec.hidden_size, spec.norm) if there else nn.Identity()


def _attention(spec: ModelSpec, number: int) -> nn.Module:
    attention = spec.attention
    if not isinstance(attention, AttentionSpec):
        return LatentAttention(spec.hidden_size, attention, spec.norm)
    windowed = attention.window is not None and attention.window.in_layer(number)
    return Attention(spec.hidden_size, attention, spec.norm.epsilon, windowed=windowed)


def _mlp(spec: ModelSpec, number: int) -> nn.Module:
    mlp = spec.mlp_of(number)
    if isinstance(mlp, MoeSpec):
        return MixtureOfExperts(spec.hidden_size, mlp)
    return build_mlp(spec.hidden_size, mlp.intermediate_size, mlp.activation, bias=mlp.bias)


class Decoder(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        size, attention = spec.hidden_size, spec.attention
        self.embedding = Embedding(spec.vocab_size, size)
        self.position_embedding = Embedding(spec.context_tokens, size) if spec.learned_positions else None
        self.ngram_embedding = NgramEmbedding(spec.ngrams, size) if spec.ngrams else None
        self.recall_embedding = RecallEmbedding(spec.recall, spec.vocab_size, size) if spec.recall else None
        self.embedding_norm = _norm(spec, spec.embedding_norm)
        self.rope = None
        if attention.rope is not None:
            grouped = isinstance(attention, AttentionSpec)
            self.rope = Rope(attention.rope, attention.head_dim if grouped else attention.rope_head_dim)
        self.layers = nn.ModuleList(Layer(spec, number) for number in range(spec.num_layers))
        self.final_norm = build_norm(size, spec.norm)
        self.head = None if spec.tied_embeddings else Linear(size, spec.vocab_size)

    @property
    def head_weight(self) -> nn.Parameter:
        """(vocab_size, hidden_size)"""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        cache: Cache | None = None,
        router_losses: RouterLosses | None = None,
        portion: Portion | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """The last hidden state of each token, ready for the head: (rows, tokens, hidden_size) in `dtype`.

        tokens: int64 (rows, tokens). documents: the index of the document that each token belongs to, for
        rows packed from several; None: one document. With a `cache`, `tokens` continue what it has seen. With a
        `portion`, only that of the tokens is computed. With `hidden`, the layers go on from there.
        """
        if cache is None:
            documents = torch.zeros_like(tokens) if documents is None else documents
            all_tokens, all_documents = tokens, documents
            index = torch.arange(tokens.shape[1], device=tokens.device)[None]
        else:
            all_tokens, all_documents = cache.extend(tokens, documents)
            index = cache.place.index
        if portion is None:
            # Passes without gradients come in many lengths, for each of which there would be a kernel to compile.
            portion = Portion(
                index, index, index, who_sees=who_sees if torch.is_grad_enabled() else attention_bias
            )
        if hidden is None:
            hidden = self._embedded(tokens, all_tokens, all_documents, portion, dtype)
        sight = self._sight(all_documents, portion, dtype, cache)
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, sight, None if cache is None else cache.layers[number], router_losses)
        return self.final_norm(hidden)

    def _embedded(
        self,
        tokens: Tensor,
        all_tokens: Tensor,
        all_documents: Tensor,
        portion: Portion,
        dtype: torch.dtype,
    ) -> Tensor:
        """What the first layer sees of the tokens that are held."""
        index = portion.held
        all_of_them = portion.attended.shape[1] == tokens.shape[1]
        x = self.embedding(tokens if all_of_them else tokens[:, portion.attended[0]])
        if self.spec.embedding_multiplier != 1:
            x = x * self.spec.embedding_multiplier
        if self.position_embedding is not None:
            x = x + self.position_embedding(self._positions_in_document(all_documents, index))
        for lookup in (self.ngram_embedding, self.recall_embedding):
            if lookup is not None:
                x = x + lookup(all_tokens, all_documents, index)
        return self.embedding_norm(x.to(dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 (rows, tokens, vocab_size) of `forward`'s hidden states; training never holds it whole."""
        logits = F.linear(hidden, self.head_weight.to(hidden.dtype)).float() * self.spec.logit_multiplier
        cap = self.spec.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def new_cache(self, num_rows: int = 1) -> Cache:
        """An empty one, to continue `num_rows` sequences with."""
        return Cache(self.spec.num_layers, num_rows, self.embedding.weight.device)

    def _positions_in_document(self, documents: Tensor, index: Tensor) -> Tensor:
        """Of the tokens at `index`. Rotations ask for no such thing: only differences count."""
        return positions_in_document(documents).gather(1, index.expand(documents.shape[0], -1))

    @property
    def _temperature_tokens(self) -> int | None:
        attention = self.spec.attention
        return attention.score_temperature_tokens if isinstance(attention, AttentionSpec) else None

    def _sight(self, documents: Tensor, portion: Portion, dtype: torch.dtype, cache: Cache | None) -> Sight:
        window, temperature_tokens = self.spec.attention.window, self._temperature_tokens
        index = portion.queries
        # One more token for rows that are equally long sees all that there is.
        sees_all = cache is not None and cache.place.is_next_of_all and not cache.has_documents
        queries = documents.gather(1, index.expand(documents.shape[0], -1))
        see = portion.who_sees if cache is None else attention_bias
        full = None if sees_all else see(queries, documents, index, dtype)
        windowed = full
        if window is not None and not (sees_all and documents.shape[1] <= window.tokens):
            windowed = see(queries, documents, index, dtype, window.tokens)
        temperatures = None
        if temperature_tokens is not None:
            positions = self._positions_in_document(documents, index)
            temperatures = score_temperatures(positions, temperature_tokens).to(dtype)
        return Sight(
            full=full,
            windowed=windowed,
            rotation=None if self.rope is None else self.rope(portion.attended, dtype),
            temperatures=temperatures,
            attend=portion.attend,
        )
