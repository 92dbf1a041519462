"""How the tensors of a Hugging Face file are made of a model's parameters, as data.

Every element of every parameter has one place, and every stored element comes from one parameter; so the same table
writes a model and reads it back.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """One parameter, or one expert of it, and where it lies in a stored tensor.

    In this order: the expert is taken, rows are put into the stored order, and the last two dims are swapped if the
    file stores (inputs, outputs); the result fills `box`.
    """

    parameter: str
    """The parameter's name in `ModelSpec.parameters()`."""
    expert: int | None = None
    """This one of the parameter's first dim; None: the whole parameter."""
    rows: tuple[int, ...] | None = None
    """Row i of the stored order is the parameter's row `rows[i]` (of its next-to-last dim, or of its only one)."""
    transposed: bool = False
    box: tuple[slice, ...] = ()
    """The stored tensor's slice for each dim, with steps where parts alternate; (): the whole tensor."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a Hugging Face file. Its parts fill it, each element once."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
