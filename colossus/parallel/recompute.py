"""What a layer's backward pass computes again, as the plan says; and the compiler's part in it.

What is made again as a whole goes around what is compiled: passes that torch makes again are not compiled as they come,
so what they call must have been compiled before. Where single operators' outputs are kept, the compiler must see which.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from colossus.models.attention import Sight
from colossus.models.decoder import Layer
from colossus.spec.plan import Recompute

# What sharding names its gathers by, of which the second time has more: torch would take that for another computation.
SAC_IGNORED_OPS.update(
    {
        torch.ops.profiler._record_function_enter_new.default,
        torch.ops.profiler._record_function_exit._RecordFunction,
    }
)


def prepare_layer(
    layer: Layer, recompute: Recompute, *, compiled: bool = False, is_one_graph: bool = True
) -> None:
    """Makes a layer keep only what `recompute` lets it, and compiles it where it is to be.

    `is_one_graph`: its exchanges are such that the compiler sees all of it at once. Where it does not, it cannot keep
    single operators' outputs, and layers that are to do so are not compiled.
    """
    match recompute:
        case "none":
            if compiled:
                layer.forward = _compiled(layer.forward)
        case "full":
            layer.forward = _made_again(_compiled(layer.forward) if compiled else layer.forward)
        case "alternate":
            again = _made_again(layer.forward, _every_other_matmul)
            layer.forward = _compiled(again) if compiled and is_one_graph else again
        case "selective":
            layer.forward = partial(_attend_again, _compiled(layer.forward) if compiled else layer.forward)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _made_again(
    function: Callable[..., Any], contexts: Callable[[], Any] = noop_context_fn
) -> Callable[..., Any]:
    """`function`, of which the backward pass keeps only what it is given, and what `contexts` (for its first and its
    second time) choose to keep."""

    def call(*arguments: Any, **named: Any) -> Any:
        return checkpoint(
            function,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is drawn at random
            context_fn=contexts,
            **named,
        )

    return call


def _attend_again(forward: Any, x: Tensor, sight: Sight, *more: Any) -> Tensor:
    return forward(x, replace(sight, attend=_attention_again(sight.attend)), *more)


@lru_cache(
    maxsize=8
)  # one for all layers and steps: the compiler would take each new one for another function
def _attention_again(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Between the compiled parts before and after it."""
    return torch.compiler.disable(_made_again(attend))


def _every_other_matmul() -> Any:
    """Half of the matmuls' outputs are kept, and attention's, which costs most and is small."""
    matmuls = {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_mm.default,
        torch.ops.aten._grouped_mm.default,
        torch.ops.aten._scaled_grouped_mm.default,
        torch.ops.colossus.multiply_groups.default,
    }
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.higher_order.flex_attention,
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
