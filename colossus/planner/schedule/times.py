"""The times of one rank's operations, checked."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from colossus.errors import ConfigError

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class StageTimes:
    """What one micro-batch takes on every rank and chunk, as arrays (p, v).

    A send runs beside the ranks' work: it delays whoever waits for it and nobody else. Where a send holds its rank up,
    add it to that rank's times instead.
    """

    forward_s: Floats
    backward_input_s: Floats
    backward_weight_s: Floats
    send_s: float = 0.0
    """An activation, or the gradient of one, from a rank to its neighbour."""
    overlapped_s: Floats | None = None
    """For dualpipev: a forward of this chunk run together with the whole backward of the rank's other chunk. By
    default one after the other; less where they hide each other's communication."""

    def __post_init__(self) -> None:
        if np.ndim(self.forward_s) != 2:
            raise ConfigError(
                f"The stage times of a pipeline are arrays (ranks, chunks); forward_s has shape "
                f"{np.shape(self.forward_s)}."
            )
        check_times(
            self.forward_s, self.backward_input_s, self.backward_weight_s, self.send_s, self.overlapped_s
        )

    def arrays(self) -> tuple[Floats, Floats, Floats, Floats | None]:
        """Forward, input-gradient, weight-gradient and overlapped times."""
        return self.forward_s, self.backward_input_s, self.backward_weight_s, self.overlapped_s


@dataclass(frozen=True, eq=False)
class TimeSets:
    """n sets of stage times: arrays (n, p, v), and `send_s` (n,)."""

    forward_s: Floats
    backward_input_s: Floats
    backward_weight_s: Floats
    send_s: Floats
    overlapped_s: Floats

    @property
    def backward_s(self) -> Floats:
        """Both gradients as one operation."""
        return self.backward_input_s + self.backward_weight_s


def check_times(
    forward_s: ArrayLike,
    backward_input_s: ArrayLike,
    backward_weight_s: ArrayLike,
    send_s: ArrayLike,
    overlapped_s: ArrayLike | None,
) -> TimeSets:
    """All times as arrays of one shape. Raises ConfigError when shapes differ or a time is negative or not finite."""
    forward, inputs, weights = (
        _sets(name, times)
        for name, times in (
            ("forward_s", forward_s),
            ("backward_input_s", backward_input_s),
            ("backward_weight_s", backward_weight_s),
        )
    )
    other = (inputs + weights)[:, :, ::-1] if inputs.shape == weights.shape else inputs
    apart = forward + other if forward.shape == other.shape else forward
    together = apart if overlapped_s is None else _sets("overlapped_s", overlapped_s)
    shapes = {
        "forward_s": forward.shape,
        "backward_input_s": inputs.shape,
        "backward_weight_s": weights.shape,
    }
    shapes["overlapped_s"] = together.shape
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ConfigError(
            f"The stage times of a pipeline must have one shape (sets, ranks, chunks), got {told}."
        )
    if (together < np.maximum(forward, other)).any():
        raise ConfigError(
            "overlapped_s is less than the forward or the backward that it holds, on their own; "
            "it can be no less than the longer of the two."
        )
    send = _not_negative("send_s", send_s)
    if send.shape not in ((), (1,), (len(forward),)):
        raise ConfigError(
            f"send_s has shape {send.shape}; for {len(forward)} sets of times, give {len(forward)} or one."
        )
    return TimeSets(forward, inputs, weights, np.broadcast_to(send, len(forward)), together)


def _sets(name: str, times: ArrayLike) -> Floats:
    array = _not_negative(name, times)
    if array.ndim not in (2, 3) or not array.size:
        raise ConfigError(
            f"{name} must be an array (ranks, chunks) or (sets, ranks, chunks), got shape {array.shape}."
        )
    return array if array.ndim == 3 else array[None]


def _not_negative(name: str, times: ArrayLike) -> Floats:
    array = np.asarray(times, np.float64)
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ConfigError(f"{name} must be finite and not negative, got {array.min()} to {array.max()}.")
    return array
