"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

import torch
from torch import Tensor, nn

from colossus.models.attend import attend
from colossus.models.attention import Sight
from colossus.models.cache import LayerCache
from colossus.models.parts import Linear, build_norm
from colossus.models.positions import rotate, score_multiplier
from colossus.spec.model import LatentAttentionSpec, LayerNormSpec, NormSpec


class LatentAttention(nn.Module):
    """Keys and values of all heads are made from one short vector per token, the latent, and one rotated key that
    the heads share. Training makes them; generation keeps latents alone and never makes keys and values at all."""

    def __init__(self, hidden_size: int, spec: LatentAttentionSpec, norm: NormSpec | LayerNormSpec) -> None:
        super().__init__()
        self.spec = spec
        self.scale = (spec.score_scale or spec.head_dim**-0.5) * score_multiplier(spec.rope)
        query_size = spec.num_heads * spec.head_dim
        if spec.q_lora_rank is None:
            self.query = Linear(hidden_size, query_size)
        else:
            self.query_down = Linear(hidden_size, spec.q_lora_rank)
            self.query_norm = build_norm(spec.q_lora_rank, norm)
            self.query_up = Linear(spec.q_lora_rank, query_size)
        self.key_value_down = Linear(hidden_size, spec.kv_lora_rank + spec.rope_head_dim)
        self.key_value_norm = build_norm(spec.kv_lora_rank, norm)
        self.key_value_up = Linear(
            spec.kv_lora_rank, spec.num_heads * (spec.nope_head_dim + spec.value_head_dim)
        )
        self.output = Linear(spec.num_heads * spec.value_head_dim, hidden_size)

    def forward(self, x: Tensor, sight: Sight, cache: LayerCache | None = None) -> Tensor:
        """x: (rows, tokens, hidden_size)."""
        spec, rotation = self.spec, sight.rotation
        query = (
            self.query(x) if spec.q_lora_rank is None else self.query_up(self.query_norm(self.query_down(x)))
        )
        query = query.unflatten(-1, (-1, spec.head_dim))
        plain_query, turned_query = query.split([spec.nope_head_dim, spec.rope_head_dim], -1)
        turned_query = rotate(turned_query, rotation)
        latent, shared_key = self.key_value_down(x).split([spec.kv_lora_rank, spec.rope_head_dim], -1)
        latent = self.key_value_norm(latent)
        shared_key = rotate(shared_key.unsqueeze(2), rotation)
        mix = self._mix_expanded if cache is None else self._mix_latents
        mixed = mix(plain_query, turned_query, latent, shared_key, sight, cache)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _mix_expanded(
        self, plain: Tensor, turned: Tensor, latent: Tensor, shared_key: Tensor, sight: Sight, _: None
    ) -> Tensor:
        spec = self.spec
        made = self.key_value_up(latent).unflatten(-1, (-1, spec.nope_head_dim + spec.value_head_dim))
        plain_key, value = made.split([spec.nope_head_dim, spec.value_head_dim], -1)
        key = torch.cat([plain_key, shared_key.expand(-1, -1, plain_key.shape[2], -1)], -1)
        query = torch.cat([plain, turned], -1)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        # A copy: kept for the backward pass as it is, the value would keep the plain keys beside it in memory.
        return sight.attend(query, key, value.contiguous(), sight.full, scale=self.scale)

    def _mix_latents(
        self,
        plain: Tensor,
        turned: Tensor,
        latent: Tensor,
        shared_key: Tensor,
        sight: Sight,
        cache: LayerCache,
    ) -> Tensor:
        """The matrix that would make keys is applied to the query, the one that would make values to the result:
        what is in between is attention with a single key-value head as wide as the latent."""
        spec = self.spec
        up = self.key_value_up.weight.to(latent.dtype).view(spec.num_heads, -1, spec.kv_lora_rank)
        to_key, to_value = up.split([spec.nope_head_dim, spec.value_head_dim], 1)
        query = torch.cat([torch.einsum("bthc,hcr->bthr", plain, to_key), turned], -1)
        (key,) = cache.extend(torch.cat([latent.unsqueeze(2), shared_key], -1).transpose(1, 2))
        mixed = attend(
            query.transpose(1, 2), key, key[..., : spec.kv_lora_rank], sight.full, scale=self.scale
        )
        return torch.einsum("bhtr,hvr->bhtv", mixed, to_value)
