"""What a layer's backward pass computes again, as the plan says."""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)

from colossus.models.attention import Sight
from colossus.models.decoder import Layer
from colossus.models.recompute import recomputed
from colossus.spec.plan import Recompute

# What sharding names its gathers by, of which the second time has more: torch would take that for another computation.
SAC_IGNORED_OPS.update(
    {
        torch.ops.profiler._record_function_enter_new.default,
        torch.ops.profiler._record_function_exit._RecordFunction,
    }
)


def recompute_layer(layer: Layer, recompute: Recompute) -> None:
    """Makes a layer keep only what `recompute` lets it."""
    match recompute:
        case "full":
            layer.forward = recomputed(layer.forward)
        case "alternate":
            layer.forward = recomputed(layer.forward, _every_other_matmul)
        case "selective":
            layer.attention.forward = partial(_attend_again, layer.attention.forward)


def _attend_again(forward: Any, x: Tensor, sight: Sight, *more: Any) -> Tensor:
    return forward(x, replace(sight, attend=recomputed(sight.attend)), *more)


def _every_other_matmul() -> Any:
    """Half of the matmuls' outputs are kept, and attention's, which costs most and is small."""
    matmuls = {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.colossus.multiply_groups.default,
    }
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
    seen: Counter[bool] = Counter()

    def choose(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        if operator in attention:
            return CheckpointPolicy.MUST_SAVE
        if operator in matmuls:
            seen[context.is_recompute] += 1
            if seen[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(choose)
