"""A stored tensor from our parameters, and our parameters from stored tensors, part by part; every bit stays."""

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from colossus.errors import CheckpointError
from colossus.zoo.hugging_face.tensors import Part, StoredTensor


def stored(
    tensor: StoredTensor,
    parameter: Callable[[str], Tensor],
    *,
    dtype: torch.dtype | None = None,
    one_of: Callable[[str, int], Tensor] | None = None,
) -> Tensor:
    """The tensor as the file holds it, `tensor.shape`, on the host. None: in the dtype of its first part.

    `one_of` gives one expert's values of a parameter, where taking them from `parameter(name)` would make all experts'.

    Shares memory with the parameter where that is all there is to it; so it is for reading.
    """
    dtype = dtype or parameter(tensor.parts[0].parameter).dtype
    if len(tensor.parts) == 1 and not tensor.parts[0].box:
        whole = _placed(tensor.parts[0], parameter, one_of).to(dtype)
        if tuple(whole.shape) != tensor.shape:
            raise _other_shape(tensor.name, whole, tensor.shape)
        return whole
    whole = torch.empty(tensor.shape, dtype=dtype)
    num_elements = 0
    for part in tensor.parts:
        piece = _placed(part, parameter, one_of)
        box = whole[part.box] if part.box else whole
        if box.shape != piece.shape:
            raise _other_shape(f"the part {part.parameter} of {tensor.name}", piece, tuple(box.shape))
        box.copy_(piece)
        num_elements += piece.numel()
    if num_elements != whole.numel():
        raise CheckpointError(f"{tensor.name} has {whole.numel():,} elements, its parts {num_elements:,}")
    return whole


def fill(tensor: StoredTensor, data: Tensor, parameters: Mapping[str, Tensor]) -> int:
    """Put the parts of `data`, `tensor.shape`, into those of our parameters that are given, in place; the number
    of elements put."""
    num_elements = 0
    for part in tensor.parts:
        if part.parameter not in parameters:
            continue
        piece = data[part.box] if part.box else data
        if part.transposed:
            piece = piece.transpose(-1, -2)
        target = parameters[part.parameter].detach()
        if part.expert is not None:
            target = target[part.expert]
        if part.rows is not None:
            target.index_copy_(max(target.dim() - 2, 0), _index(part.rows), piece.to(target.dtype))
        elif target.shape != piece.shape:
            raise _other_shape(f"the part of {tensor.name} for {part.parameter}", piece, tuple(target.shape))
        else:
            target.copy_(piece)
        num_elements += piece.numel()
    return num_elements


def _placed(
    part: Part, parameter: Callable[[str], Tensor], one_of: Callable[[str, int], Tensor] | None
) -> Tensor:
    """The part in the stored order; a view where rows stay where they are."""
    if part.expert is None:
        piece = parameter(part.parameter).detach()
    elif one_of is None:
        piece = parameter(part.parameter).detach()[part.expert]
    else:
        piece = one_of(part.parameter, part.expert).detach()
    if part.rows is not None:
        piece = piece.index_select(max(piece.dim() - 2, 0), _index(part.rows))
    return piece.transpose(-1, -2) if part.transposed else piece


@lru_cache(maxsize=8)
def _index(rows: tuple[int, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def _other_shape(what: str, tensor: Tensor, expected: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(f"{what} is {list(tensor.shape)}, and its place is {list(expected)}")
