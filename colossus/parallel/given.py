"""Functions that are given some of their arguments, as torch's compiler takes them."""

from collections.abc import Callable
from typing import Any


def given(function: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """`functools.partial`, for what is called in compiled layers.

    The compiler holds every partial for a function of its own: each layer that has one is compiled anew, up to the
    eighth, and all others are not at all. Two of these are alike where their code is.
    """

    def call(*more: Any, **named: Any) -> Any:
        return function(*first, *more, **named)

    return call
