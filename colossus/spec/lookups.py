"""Tables of embeddings that cost no matmul, as numbers: of the last few tokens, and of what came next last time."""

from typing import Annotated

from pydantic import AfterValidator, Field

from colossus.spec.base import Frozen, Positive


def _rising(orders: tuple[int, ...]) -> tuple[int, ...]:
    if list(orders) != sorted(set(orders)):
        raise ValueError(f"{list(orders)} must rise, each order named once: each has rows of its own")
    return orders


class NgramSpec(Frozen):
    """Embeddings of the last n tokens together, looked up by hash in a table of `num_rows` rows per order n
    (over-tokenised inputs, arXiv:2501.16975): capacity that costs no matmul."""

    orders: Annotated[
        tuple[Annotated[int, Field(ge=2, le=5)], ...],
        Field(strict=False, min_length=1),
        AfterValidator(_rising),
    ] = (2, 3)
    num_rows: Positive = 65_536


class RecallSpec(Frozen):
    """An embedding of what came next the last time: of the token that followed the latest earlier occurrence,
    in the same document, of the n tokens that end here, for the longest n of `orders` that has occurred.

    What an induction head (arXiv:2209.11895) has to learn, two layers deep, is here from the first step.
    """

    orders: Annotated[
        tuple[Annotated[int, Field(ge=1, le=5)], ...],
        Field(strict=False, min_length=1),
        AfterValidator(_rising),
    ] = (1, 2, 3, 4)
