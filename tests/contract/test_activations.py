"""The planner's count of what the forward pass keeps, and what autograd keeps."""

import pytest
import torch
from torch import Tensor

from colossus.models import Decoder, attend, build
from colossus.planner.one_rank.memory import EXPLICIT_ATTENTION_MAX_TOKENS, activation_bytes
from colossus.spec.model import Dtype, ModelSpec
from colossus.trainer.precision import DTYPES
from tests.helpers import VARIETIES, random_tokens


def kept_bytes(model: Decoder, tokens: Tensor, dtype: torch.dtype) -> int:
    """Bytes of all storages that autograd saves, each once, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}  # holding them, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if tensor.numel() and address not in own:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(tokens, torch.zeros_like(tokens), dtype=dtype)
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


def test_attention_changes_its_way_where_the_planner_says() -> None:
    assert attend.EXPLICIT_ATTENTION_MAX_TOKENS == EXPLICIT_ATTENTION_MAX_TOKENS
