"""What ranks of a pipeline send each other, put between the operations that they run.

A message is sent as soon as it is made. The one who receives it begins to when the sender has sent it, in a run of all
ranks in step: so any two ranks send and receive in the same order, and neither waits for the other in a circle.
"""

from typing import NamedTuple

from colossus.errors import ConfigError
from colossus.planner.schedule.order import Op, Schedule
from colossus.spec.stages import V_SHAPED


class Send(NamedTuple):
    """A stage's output for the next stage, or with `backward` the gradient of its input for the one before."""

    stage: int
    micro_batch: int
    backward: bool
    to_rank: int


class Receive(NamedTuple):
    """What `stage` needs, of the stage before it, or with `backward` of the one after it."""

    stage: int
    micro_batch: int
    backward: bool
    from_rank: int


Action = Op | Send | Receive


def stage_of(schedule: Schedule, num_ranks: int, rank: int, chunk: int) -> int:
    """The virtual stage that is a rank's chunk."""
    if schedule in V_SHAPED and chunk == 1:
        return 2 * num_ranks - 1 - rank
    return rank + chunk * num_ranks


def rank_of(schedule: Schedule, num_ranks: int, stage: int) -> int:
    """The rank that a virtual stage stands on."""
    if schedule in V_SHAPED and stage >= num_ranks:
        return 2 * num_ranks - 1 - stage
    return stage % num_ranks


def with_messages(
    schedule: Schedule, num_chunks: int, orders: tuple[tuple[Op, ...], ...]
) -> tuple[tuple[Action, ...], ...]:
    """Every rank's operations, with its messages in between. Raises ConfigError for orders that wait in a circle."""
    num_ranks, num_stages = len(orders), len(orders) * num_chunks
    actions: list[list[Action]] = [[] for _ in orders]
    arrived: set[tuple[int, int, bool]] = set()
    """(stage, micro-batch, backward): inputs that are there, or on their way."""
    places = [0] * num_ranks

    def is_ready(rank: int, op: Op) -> bool:
        return all(
            (stage == (num_stages - 1 if backward else 0)) or (stage, micro_batch, backward) in arrived
            for stage, micro_batch, backward in _inputs(rank, op)
        )

    def _inputs(rank: int, op: Op) -> list[tuple[int, int, bool]]:
        stage = stage_of(schedule, num_ranks, rank, op.chunk)
        match op.kind:
            case "forward":
                return [(stage, op.micro_batch, False)]
            case "backward" | "backward_input":
                return [(stage, op.micro_batch, True)]
            case "backward_weight":
                return []
            case _:
                return [(stage, op.micro_batch, False), (_other(rank, op), _second(op), True)]

    def _other(rank: int, op: Op) -> int:
        return stage_of(schedule, num_ranks, rank, 1 - op.chunk)

    def hand_on(rank: int, stage: int, micro_batch: int, backward: bool) -> None:
        next_stage = stage + (-1 if backward else 1)
        if not 0 <= next_stage < num_stages:
            return
        arrived.add((next_stage, micro_batch, backward))
        there = rank_of(schedule, num_ranks, next_stage)
        if there != rank:
            actions[rank].append(Send(stage, micro_batch, backward, there))
            actions[there].append(Receive(next_stage, micro_batch, backward, rank))

    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        ready = [
            rank
            for rank, order in enumerate(orders)
            if places[rank] < len(order) and is_ready(rank, order[places[rank]])
        ]
        if not ready:
            raise ConfigError(f"the operations of schedule {schedule} wait for each other in a circle")
        for rank in ready:
            op = orders[rank][places[rank]]
            places[rank] += 1
            actions[rank].append(op)
            stage = stage_of(schedule, num_ranks, rank, op.chunk)
            if op.kind in ("forward", "forward_backward"):
                hand_on(rank, stage, op.micro_batch, False)
            if op.kind in ("backward", "backward_input"):
                hand_on(rank, stage, op.micro_batch, True)
            if op.kind == "forward_backward":
                hand_on(rank, _other(rank, op), _second(op), True)
    return tuple(tuple(rank) for rank in actions)


def _second(op: Op) -> int:
    assert op.backward_micro_batch is not None
    return op.backward_micro_batch
