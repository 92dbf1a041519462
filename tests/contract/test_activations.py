"""The planner's count of what the forward pass keeps, and what autograd keeps."""

import pytest
import torch
from torch import Tensor

from colossus.models import Decoder, RouterLosses, attend, build
from colossus.planner.one_rank.activations import EXPLICIT_ATTENTION_MAX_TOKENS, activation_bytes
from colossus.spec.model import Dtype, ModelSpec, MoeSpec
from colossus.trainer.precision import DTYPES
from tests.helpers import VARIETIES, random_tokens, scrambled, tiny


def kept_bytes(
    model: Decoder, tokens: Tensor, dtype: torch.dtype, router_losses: RouterLosses | None = None
) -> int:
    """Bytes of all storages that autograd saves, each once, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}  # holding them, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if tensor.numel() and address not in own:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(tokens, torch.zeros_like(tokens), dtype=dtype, router_losses=router_losses)
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [16, EXPLICIT_ATTENTION_MAX_TOKENS + 8], ids=["short", "long"])
@pytest.mark.parametrize("spec", VARIETIES.values(), ids=VARIETIES)
def test_activations_to_the_byte(spec: ModelSpec, num_tokens: int, dtype: Dtype) -> None:
    spec = spec.model_copy(update={"context_tokens": num_tokens})
    tokens = random_tokens(spec, 3, num_tokens)
    kept = kept_bytes(build(spec, seed=0), tokens, DTYPES[dtype])
    assert activation_bytes(spec, 3, num_tokens, dtype) == kept


MIXTURES = {name: spec for name, spec in VARIETIES.items() if isinstance(spec.mlp, MoeSpec)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", MIXTURES.values(), ids=MIXTURES)
def test_with_the_routers_losses(spec: ModelSpec, dtype: Dtype) -> None:
    losses = RouterLosses(torch.tensor(0.01), torch.tensor(0.001))
    kept = kept_bytes(build(spec, seed=0), random_tokens(spec, 3, 16), DTYPES[dtype], losses)
    assert activation_bytes(spec, 3, 16, dtype, router_losses=True) == kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_grouped_matmuls_and_any_choice_of_experts(dtype: Dtype, seed: int) -> None:
    """Sizes that a grouped matmul takes in both dtypes, and weights that send tokens to other experts each time."""
    moe = MoeSpec(num_experts=8, top_k=3, intermediate_size=24, bias=True)
    spec = tiny(hidden_size=16, mlp=moe)
    kept = kept_bytes(scrambled(spec, seed), random_tokens(spec, 3, 16, seed=seed), DTYPES[dtype])
    assert activation_bytes(spec, 3, 16, dtype) == kept


def test_attention_changes_its_way_where_the_planner_says() -> None:
    assert attend.EXPLICIT_ATTENTION_MAX_TOKENS == EXPLICIT_ATTENTION_MAX_TOKENS
