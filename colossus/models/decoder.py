"""The decoder: the file to read first. Single-device code that knows nothing of parallelism.

    tokens ─► embedding + lookups ─► layers × [norm ─► attention ─► +, norm ─► MLP ─► +] ─► norm ─► head

Which parts it is made of is decided once, when it is built from a `ModelSpec`.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colossus.models.attention import Attention, LayerCache, attention_mask
from colossus.models.lookups import ngram_rows, recall_rows
from colossus.models.missing import refuse_missing_parts
from colossus.models.parts import GatedMlp, Linear, Mlp, RmsNorm
from colossus.spec.model import ModelSpec, NgramSpec, RecallSpec


class Embedding(nn.Module):
    """Rows of a table, looked up."""

    def __init__(self, num_rows: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size))

    def forward(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.weight)


class SparseEmbedding(Embedding):
    """A table of which a step looks up few rows: its gradient is sparse, and holds just those."""

    def forward(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.weight, sparse=self.weight.requires_grad)


class NgramEmbedding(SparseEmbedding):
    """Rows for the pair, the triple … of tokens that ends at each position, found by hash, summed.

    It costs no matmul: a lookup gives the first layer what it would otherwise spend attention on.
    """

    def __init__(self, spec: NgramSpec, hidden_size: int) -> None:
        super().__init__(len(spec.orders) * spec.num_rows, hidden_size)
        self.spec = spec

    def forward(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """tokens, documents: (batch, tokens). Returns (batch, tokens, hidden_size)."""
        return super().forward(ngram_rows(tokens, documents, self.spec)).sum(0)


class RecallEmbedding(SparseEmbedding):
    """A row for the token that came next the last time, if there was one."""

    def __init__(self, spec: RecallSpec, vocab_size: int, hidden_size: int) -> None:
        super().__init__(len(spec.orders) * vocab_size + 1, hidden_size)
        self.spec, self.vocab_size = spec, vocab_size

    def forward(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """tokens, documents: (batch, tokens). Returns (batch, tokens, hidden_size)."""
        return super().forward(recall_rows(tokens, documents, self.spec, self.vocab_size))


class Layer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(spec.hidden_size, spec.norm)
        self.attention = Attention(spec.hidden_size, spec.attention, spec.norm, spec.context_tokens)
        self.mlp_norm = RmsNorm(spec.hidden_size, spec.norm)
        self.mlp = (GatedMlp if spec.mlp.gated else Mlp)(spec.hidden_size, spec.mlp)

    def forward(self, x: Tensor, mask: Tensor, first_position: int, cache: LayerCache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask, first_position, cache)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        refuse_missing_parts(spec)
        super().__init__()
        self.spec = spec
        self.embedding = Embedding(spec.vocab_size, spec.hidden_size)
        self.ngram_embedding = NgramEmbedding(spec.ngrams, spec.hidden_size) if spec.ngrams else None
        self.recall_embedding = (
            RecallEmbedding(spec.recall, spec.vocab_size, spec.hidden_size) if spec.recall else None
        )
        self.embedding_norm = RmsNorm(spec.hidden_size, spec.norm) if spec.embedding_norm else None
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.num_layers))
        self.final_norm = RmsNorm(spec.hidden_size, spec.norm)
        self.head = None if spec.tied_embeddings else Linear(spec.hidden_size, spec.vocab_size)

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
        cache: "Cache | None" = None,
    ) -> Tensor:
        """The last hidden state of each token, ready for the head: (batch, tokens, hidden_size) in `dtype`.

        tokens: int64 (batch, tokens). documents: the index of the document that each token belongs to, for
        rows packed from several; None: one document. With a `cache`, `tokens` continue what it has seen.
        """
        if documents is None:
            documents = torch.zeros_like(tokens)
        first_position, num_new = 0, tokens.shape[1]
        if cache is not None:
            first_position = cache.length
            tokens, documents = cache.extend(tokens, documents)
        x = self.embedding(tokens[:, first_position:])
        for lookup in (self.ngram_embedding, self.recall_embedding):
            if lookup is not None:
                x = x + lookup(tokens, documents)[:, first_position:]
        x = x.to(dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        mask = attention_mask(documents[:, -num_new:], documents, first_position)
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, first_position, None if cache is None else cache.layers[i])
        return self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 (batch, tokens, vocab_size) of `forward`'s hidden states; training never holds it whole."""
        return soft_cap(F.linear(hidden, self.head_weight.to(hidden.dtype)).float(), self.spec.logit_soft_cap)


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


@dataclass
class Cache:
    """What generation remembers between tokens: every layer's keys and values, and the tokens themselves."""

    layers: list[LayerCache]
    tokens: Tensor
    documents: Tensor

    @classmethod
    def empty(cls, model: Decoder, batch: int, dtype: torch.dtype = torch.float32) -> "Cache":
        spec, weight = model.spec, model.embedding.weight
        like = torch.empty(0, dtype=dtype, device=weight.device)
        layers = [LayerCache(batch, spec.attention, spec.context_tokens, like) for _ in model.layers]
        nothing = torch.empty(batch, 0, dtype=torch.long, device=weight.device)
        return cls(layers, nothing, nothing)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def extend(self, tokens: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Adds new tokens and returns all so far."""
        self.tokens = torch.cat([self.tokens, tokens], 1)
        self.documents = torch.cat([self.documents, documents.to(self.documents.dtype)], 1)
        return self.tokens, self.documents


def build(spec: ModelSpec, *, seed: int, device: str = "cpu") -> Decoder:
    """A decoder on `device` with its initial weights."""
    with torch.device("meta"):
        model = Decoder(spec)
    model.to_empty(device=device)
    initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Initial weights, functions of (seed, parameter name) alone: no layout or order of building matters."""
    parameters = dict(model.named_parameters())
    for spec in model.spec.parameters():
        parameter = parameters[spec.name]
        if spec.std == 0:
            parameter.fill_(spec.start)
            continue
        digest = hashlib.blake2b(f"{seed}:{spec.name}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))
        values = torch.empty(spec.shape).normal_(0, spec.std, generator=generator)
        parameter.copy_(values)
    reset_buffers(model)


def reset_buffers(model: nn.Module) -> None:
    """Fills the tables that are computed and not learned."""
    for module in model.modules():
        if module is not model and hasattr(module, "reset_buffers"):
            module.reset_buffers()
