"""The pieces that a pipeline cuts a model into: which layers stand where. No torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossus.spec.plan import Schedule

V_SHAPED = frozenset({"zbv", "dualpipev"})
"""Schedules with two stages per rank, the second one running back from the last rank to the first."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One (virtual) stage of a pipeline: consecutive layers on one pipeline rank."""

    number: int
    num_stages: int
    rank: int
    """On the axis `pp`."""
    first_layer: int
    num_layers: int

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.first_layer + self.num_layers)

    @property
    def is_first(self) -> bool:
        """It has the embeddings."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """It has the head."""
        return self.number == self.num_stages - 1


def pipeline_stages(
    stage_layers: tuple[int, ...], schedule: "Schedule", virtual_stages: int
) -> tuple[Stage, ...]:
    """All stages, in the order in which a micro-batch passes them.

    `stage_layers` are the layers of each pipeline rank, which its `virtual_stages` share as evenly as can be; where one
    gets fewer it is the one that also has the embeddings or the head.
    """
    pp, chunks = len(stage_layers), virtual_stages
    counts = [0] * (pp * chunks)
    ranks = [0] * (pp * chunks)
    for rank, layers in enumerate(stage_layers):
        numbers = [_number(rank, chunk, pp, schedule) for chunk in range(chunks)]
        # Those in the middle first, then the last one's, then the first one's: these carry tables too.
        fullest_first = sorted(numbers, key=lambda number: (number == 0, number == pp * chunks - 1, number))
        for place, number in enumerate(fullest_first):
            counts[number] = layers // chunks + (place < layers % chunks)
            ranks[number] = rank
    firsts = [sum(counts[:number]) for number in range(pp * chunks)]
    return tuple(
        Stage(number, pp * chunks, ranks[number], firsts[number], counts[number])
        for number in range(pp * chunks)
    )


def _number(rank: int, chunk: int, pp: int, schedule: "Schedule") -> int:
    if schedule in V_SHAPED and chunk == 1:
        return 2 * pp - 1 - rank
    return rank + chunk * pp
