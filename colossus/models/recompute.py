"""Activations computed again in the backward pass, in place of being kept; and code that must know that it is."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch.utils.checkpoint import checkpoint

_recomputing = False

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def is_recomputing() -> bool:
    """Whether the forward pass at hand is one that was made before: what counts passes counts it no more."""
    return _recomputing


@contextlib.contextmanager
def _recompute(inner: AbstractContextManager[Any]) -> Iterator[None]:
    global _recomputing
    _recomputing = True
    try:
        with inner:
            yield
    finally:
        _recomputing = False


def _plain() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return contextlib.nullcontext(), contextlib.nullcontext()


def recomputed(function: Callable[..., Any], contexts: Contexts = _plain) -> Callable[..., Any]:
    """`function`, of which the backward pass keeps only what it is given, and what `contexts` (for its first and its
    second time) choose to keep."""

    def both() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first, second = contexts()
        return first, _recompute(second)

    def call(*arguments: Any, **named: Any) -> Any:
        return checkpoint(
            function,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is drawn at random
            context_fn=both,
            **named,
        )

    return call
