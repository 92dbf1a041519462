"""The arithmetic of parts, against indexing written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.checkpoint.hugging_face.convert import fill, stored
from colossus.errors import CheckpointError
from colossus.zoo.hugging_face import Part, StoredTensor

from .states import raw

ALL = slice(None)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_each_thing_that_a_part_can_say() -> None:
    parameters = {"a": numbers(4, 6), "e": numbers(3, 4, 6), "bias": numbers(4)}
    rows = (2, 0, 3, 1)
    a, e, bias = parameters["a"], parameters["e"], parameters["bias"]
    cases = {
        (): (StoredTensor("x", (4, 6), (Part("a"),)), a),
        "expert": (StoredTensor("x", (4, 6), (Part("e", expert=1),)), e[1]),
        "transposed": (StoredTensor("x", (6, 4), (Part("a", transposed=True),)), a.T),
        "rows": (StoredTensor("x", (4, 6), (Part("a", rows=rows),)), torch.stack([a[i] for i in rows])),
        "rows of a bias": (StoredTensor("x", (4,), (Part("bias", rows=rows),)), bias[list(rows)]),
        "rows, then transposed": (
            StoredTensor("x", (6, 4), (Part("e", expert=2, rows=rows, transposed=True),)),
            torch.stack([e[2][i] for i in rows]).T,
        ),
    }
    for what, (tensor, expected) in cases.items():
        made = stored(tensor, parameters.__getitem__)
        assert raw(made) == raw(expected), what
        back = {name: torch.full_like(value, 9.0) for name, value in parameters.items()}
        assert fill(tensor, made, back) == expected.numel()
        name = tensor.parts[0].parameter
        place = back[name] if tensor.parts[0].expert is None else back[name][tensor.parts[0].expert]
        source = a if name == "a" else bias if name == "bias" else e[tensor.parts[0].expert]
        assert raw(place) == raw(source), what


def test_parts_share_a_tensor_and_each_comes_back_alone() -> None:
    parameters = {"gate": numbers(2, 4, 6), "up": numbers(2, 4, 6) + 1}
    boxes = ((ALL, ALL, slice(0, None, 2)), (ALL, ALL, slice(1, None, 2)))
    parts = tuple(Part(n, transposed=True, box=box) for n, box in zip(parameters, boxes, strict=True))
    tensor = StoredTensor("gate_up", (2, 6, 8), parts)
    made = stored(tensor, parameters.__getitem__)
    for output in range(4):
        assert torch.equal(made[:, :, 2 * output], parameters["gate"][:, output])
        assert torch.equal(made[:, :, 2 * output + 1], parameters["up"][:, output])
    for name, value in parameters.items():
        alone = {name: torch.zeros_like(value)}
        assert fill(tensor, made, alone) == value.numel()
        assert raw(alone[name]) == raw(value)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(6)), st.booleans(), st.sampled_from(["float32", "bfloat16"]))
def test_any_order_of_rows_comes_back(order: list[int], transposed: bool, dtype: str) -> None:
    value = numbers(6, 4).to(getattr(torch, dtype))
    shape = (4, 6) if transposed else (6, 4)
    tensor = StoredTensor("x", shape, (Part("a", rows=tuple(order), transposed=transposed),))
    back = {"a": torch.zeros(6, 4)}
    fill(tensor, stored(tensor, {"a": value}.__getitem__), back)
    assert torch.equal(back["a"], value.float())


def test_a_whole_parameter_is_not_copied() -> None:
    value = numbers(4, 6)
    assert (
        stored(StoredTensor("x", (4, 6), (Part("a"),)), {"a": value}.__getitem__).data_ptr()
        == value.data_ptr()
    )


def test_shapes_that_do_not_fit_and_parts_that_leave_a_gap_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"\[4, 6\].*\[6, 4\]"):
        stored(StoredTensor("x", (6, 4), (Part("a"),)), {"a": numbers(4, 6)}.__getitem__)
    gap = StoredTensor("x", (8, 6), (Part("a", box=(slice(0, 4), ALL)),))
    with pytest.raises(CheckpointError, match="48 elements, its parts 24"):
        stored(gap, {"a": numbers(4, 6)}.__getitem__)
    with pytest.raises(CheckpointError, match=r"\[5, 6\].*\[4, 6\]"):
        fill(StoredTensor("x", (5, 6), (Part("a"),)), numbers(5, 6), {"a": numbers(4, 6)})
