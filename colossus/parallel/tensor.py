"""Tensor parallelism with sequence parallelism (arXiv:1909.08053, arXiv:2205.05198): how modules compute with parts.

Outside attention and MLPs each rank of the team holds the hidden states of its own part of the tokens. On the way in
these are gathered, each rank computes its heads and inner channels for all of them, and on the way out the ranks' sums
are scattered over the tokens again. Parameters that no rank has a part of (norms, routers) see different tokens on each
rank; so their gradients are summed over the team, once a step (sums.py).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colossus.models import Decoder
from colossus.models.attention import Attention
from colossus.models.decoder import Layer
from colossus.models.latent_attention import LatentAttention
from colossus.models.moe import MixtureOfExperts
from colossus.models.parts import Embedding, GatedMlp, Linear, Mlp, RmsNorm
from colossus.parallel.collectives import Team, all_gather, reduce_scatter, team_total
from colossus.parallel.given import given

_TOKENS = 1
"""The dim of hidden states that is split: (rows, tokens, hidden_size)."""


def split_tensors(model: Decoder, team: Team, *, first_row: int) -> None:
    """Makes modules compute with their parts of the weights. `first_row`: of the embedding's rows that are here."""
    if model.embedding is not None:
        model.embedding.forward = given(_look_up, model.embedding, first_row, team)
    for layer in model.layers:
        _split_layer(layer, team)


def _split_layer(layer: Layer, team: Team) -> None:
    attention = layer.attention
    if isinstance(attention, LatentAttention):
        # The latents are narrower than the hidden states: they are what is gathered.
        _gather_output(attention.key_value_down, team)
        if hasattr(attention, "query_down"):
            _gather_output(attention.query_down, team)
        else:
            _gather_input(attention.query, team)
    else:
        _gather_input(attention, team)
        _norm_over_all_heads(attention, team)
    attention.output.forward = given(_sum_parts, attention.output, attention.output.forward, team)
    mlp = layer.mlp.shared if isinstance(layer.mlp, MixtureOfExperts) else layer.mlp
    if isinstance(mlp, Mlp | GatedMlp):
        _gather_input(mlp, team)
        mlp.down.forward = given(_sum_parts, mlp.down, mlp.down.forward, team)


def _gather_input(module: nn.Module, team: Team) -> None:
    def gather(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return all_gather(inputs[0], _TOKENS, team), *inputs[1:]

    module.register_forward_pre_hook(gather)


def _gather_output(module: nn.Module, team: Team) -> None:
    module.register_forward_hook(lambda module, inputs, output: all_gather(output, _TOKENS, team))


def _sum_parts(linear: Linear, forward: Any, team: Team, x: Tensor) -> Tensor:
    """Every rank has some of the inputs; a bias is added once, to the sum."""
    if linear.bias is None:
        return reduce_scatter(forward(x), _TOKENS, team)
    bias, linear.bias = linear.bias, None
    try:
        made = forward(x)
    finally:
        linear.bias = bias
    return reduce_scatter(made, _TOKENS, team) + bias.to(x.dtype)


def _look_up(embedding: Embedding, first_row: int, team: Team, rows: Tensor) -> Tensor:
    """Every rank has some of the table's rows."""
    here = rows - first_row
    there = (here < 0) | (here >= embedding.weight.shape[0])
    if embedding.weight.shape[0] == 0:  # fewer rows than ranks have room for
        found = (
            embedding.weight.new_zeros(*rows.shape, embedding.weight.shape[1]) + 0 * embedding.weight.sum()
        )
    else:
        found = F.embedding(here.masked_fill(there, 0), embedding.weight).masked_fill(there[..., None], 0)
    return reduce_scatter(found, _TOKENS, team)


def _norm_over_all_heads(attention: Attention, team: Team) -> None:
    for norm, num_heads in (
        (attention.query_norm, attention.spec.num_heads),
        (attention.key_norm, attention.spec.num_kv_heads),
    ):
        if type(norm) is RmsNorm:
            norm.forward = given(_rms_norm, norm, team, num_heads * attention.spec.head_dim)


def _rms_norm(norm: RmsNorm, team: Team, num_channels: int, x: Tensor) -> Tensor:
    """The mean square is over the channels of all ranks. Keys that several ranks hold a copy of count as often."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    copies = x.shape[-1] * team.size // num_channels
    square_sum = team_total(wide.square().sum(-1, keepdim=True), team) / copies
    normed = wide * torch.rsqrt(square_sum / num_channels + norm.epsilon)
    return (normed if norm.weight is None else normed * norm.weight.to(x.dtype)).to(x.dtype)
