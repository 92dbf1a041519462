"""In which order every rank of a pipeline runs its forwards and backwards.

The model is cut into `num_stages · num_chunks` virtual stages. In most schedules rank r holds the virtual stages
r, r + p, r + 2p … (chunk 0, 1, 2 …); in the V-shaped ones (`zbv`, `dualpipev`) it holds r and 2p − 1 − r, so that the
last virtual stage is back on the first rank. An order is decided before the run and never changes with timing.

    none         one rank
    gpipe        all forwards, then all backwards (Huang et al., arXiv:1811.06965)
    1f1b         p − rank forwards, then one backward, one forward … (Narayanan et al., arXiv:2006.09503)
    interleaved  1F1B over `num_chunks` chunks per rank (Narayanan et al., arXiv:2104.04473; Megatron-LM)
    zb-h1        1F1B whose weight gradients run `rank` micro-batches late (Qi et al., arXiv:2401.10241)
    zbv          the handcrafted V schedule for equal forward, input and weight times (arXiv:2401.10241, section 6;
                 arXiv:2405.15362)
    dualpipev    DualPipe folded into a V: a forward overlaps the backward of the other chunk (arXiv:2412.19437 and
                 DeepSeek's published DualPipeV)
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

from colossus.errors import ConfigError, did_you_mean
from colossus.spec.stages import V_SHAPED

Schedule = Literal["none", "gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

Kind = Literal["forward", "backward", "backward_input", "backward_weight", "forward_backward"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Op(NamedTuple):
    """One operation of a rank.

    `backward` computes the gradients of inputs and weights as one; `backward_input` and `backward_weight` are its two
    halves. `forward_backward` is a forward of `chunk` and `micro_batch` run together with the whole backward of the
    rank's other chunk for `backward_micro_batch`; both results are there when it ends.
    """

    kind: Kind
    chunk: int
    micro_batch: int
    backward_micro_batch: int | None = None


def micro_batch_group(num_stages: int, num_micro_batches: int) -> int:
    """How many micro-batches interleaved 1F1B runs through one chunk before it turns to the next.

    This is p where m is a multiple of p, as in Megatron-LM. Otherwise m is cut into ⌊m / p⌋ equal groups, as in
    torch's `ScheduleInterleaved1F1B`. Raises ConfigError where they would be unequal.
    """
    rounds = max(1, num_micro_batches // num_stages)
    if num_micro_batches % rounds:
        raise ConfigError(
            f"interleaved runs micro-batches in equal groups of at least {num_stages}, one per rank, and "
            f"{num_micro_batches} micro-batches cannot be cut into {rounds} equal groups; "
            f"{num_stages * rounds} or {num_stages * (rounds + 1)} micro-batches would work."
        )
    return num_micro_batches // rounds


def check_shape(schedule: Schedule, num_stages: int, num_chunks: int, num_micro_batches: int) -> None:
    """Raises ConfigError when `schedule` cannot run with so many ranks, chunks per rank and micro-batches."""
    if schedule not in SCHEDULES:
        raise ConfigError(f"There is no pipeline schedule {schedule!r}.{did_you_mean(schedule, SCHEDULES)}")
    if min(num_stages, num_chunks, num_micro_batches) < 1:
        raise ConfigError(
            f"A pipeline needs at least one rank, one chunk per rank and one micro-batch; asked for {num_stages}, "
            f"{num_chunks} and {num_micro_batches}."
        )
    if schedule == "none" and num_stages > 1:
        raise ConfigError(
            f"Schedule 'none' is for one rank, and the pipeline has {num_stages}; '1f1b' would work."
        )
    if schedule in V_SHAPED and num_chunks != 2:
        raise ConfigError(f"{schedule} needs 2 chunks per rank, got {num_chunks}.")
    if schedule not in V_SHAPED and schedule != "interleaved" and num_chunks != 1:
        raise ConfigError(
            f"{schedule} has one chunk per rank, got {num_chunks}; 'interleaved' takes any number of chunks."
        )
    if schedule == "interleaved":
        micro_batch_group(num_stages, num_micro_batches)
    if schedule == "dualpipev" and num_micro_batches < 2 * num_stages:
        raise ConfigError(
            f"dualpipev needs at least two micro-batches per rank, {2 * num_stages} for {num_stages} ranks, got "
            f"{num_micro_batches}; 'zbv' takes any number."
        )


def order(
    schedule: Schedule, num_stages: int, num_chunks: int, num_micro_batches: int
) -> tuple[tuple[Op, ...], ...]:
    """The operations of every rank, in the order in which it runs them.

    Raises ConfigError for a combination that the schedule cannot run.
    """
    check_shape(schedule, num_stages, num_chunks, num_micro_batches)
    group = micro_batch_group(num_stages, num_micro_batches) if schedule == "interleaved" else 1
    return grouped_order(schedule, num_stages, num_chunks, num_micro_batches, group)


@lru_cache(maxsize=64)
def grouped_order(
    schedule: Schedule, num_stages: int, num_chunks: int, num_micro_batches: int, group: int
) -> tuple[tuple[Op, ...], ...]:
    """`order` with the group of interleaved 1F1B given, so that fewer micro-batches can stand for more of them."""
    p, v, m = num_stages, num_chunks, num_micro_batches
    match schedule:
        case "none" | "1f1b":
            return tuple(_one_forward_one_backward(1, m, 1, p - 1 - rank) for rank in range(p))
        case "gpipe":
            return (tuple(Op(kind, 0, i) for kind in KINDS[:2] for i in range(m)),) * p
        case "interleaved":
            # With one chunk a backward comes back after as many forwards as there are ranks below. With several,
            # every rank below costs two: each runs a forward and a backward while the micro-batch passes.
            warmups = [2 * (p - 1 - rank) + (v - 1) * group for rank in range(p)]
            return tuple(_one_forward_one_backward(v, m, group, warmup) for warmup in warmups)
        case "zb-h1":
            return tuple(tuple(_zb_h1(p, m, rank)) for rank in range(p))
        case "zbv":
            return tuple(tuple(op for op in _zbv(p, m, rank) if op.micro_batch < m) for rank in range(p))
        case "dualpipev":
            return tuple(tuple(_dualpipev(p, m, rank)) for rank in range(p))


def _one_forward_one_backward(v: int, m: int, group: int, warmup: int) -> tuple[Op, ...]:
    forwards = [
        (chunk, i) for first in range(0, m, group) for chunk in range(v) for i in range(first, first + group)
    ]
    backwards = [(v - 1 - chunk, i) for chunk, i in forwards]
    warmup = min(warmup, m * v)
    ops = [Op("forward", *forward) for forward in forwards[:warmup]]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        ops += (Op("forward", *forward), Op("backward", *backward))
    return (*ops, *(Op("backward", *backward) for backward in backwards[m * v - warmup :]))


def _zb_h1(p: int, m: int, rank: int) -> Iterator[Op]:
    warmup = min(m, p - 1 - rank)
    yield from (Op("forward", 0, i) for i in range(warmup))
    for i in range(m):
        if warmup + i < m:
            yield Op("forward", 0, warmup + i)
        yield Op("backward_input", 0, i)
        # A rank that starts later lets its weight gradients wait, so that input gradients reach rank 0 sooner; all
        # ranks then hold as many activations as rank 0 does.
        if i >= rank:
            yield Op("backward_weight", 0, i - rank)
    yield from (Op("backward_weight", 0, i) for i in range(max(0, m - rank), m))


class _Counter:
    """Hands out the micro-batches of every kind of operation and chunk, one after the other."""

    def __init__(self) -> None:
        self.next: dict[tuple[Kind, int], int] = {}
        self.waiting: list[tuple[int, int]] = []

    def forward(self, chunk: int) -> Op:
        return Op("forward", chunk, self._take("forward", chunk))

    def backward(self, chunk: int) -> Op:
        return Op("backward", chunk, self._take("backward", chunk))

    def backward_input(self, chunk: int) -> Op:
        micro_batch = self._take("backward", chunk)
        self.waiting.append((chunk, micro_batch))
        return Op("backward_input", chunk, micro_batch)

    def oldest_weight(self) -> Op:
        return Op("backward_weight", *self.waiting.pop(0))

    def weight(self, chunk: int) -> Op:
        first = next(waiting for waiting in self.waiting if waiting[0] == chunk)
        self.waiting.remove(first)
        return Op("backward_weight", *first)

    def split(self, chunk: int) -> tuple[Op, Op]:
        return self.backward_input(chunk), self.weight(chunk)

    def overlapped(self, chunk: int) -> Op:
        return Op("forward_backward", chunk, self._take("forward", chunk), self._take("backward", 1 - chunk))

    def _take(self, kind: Kind, chunk: int) -> int:
        taken = self.next.get((kind, chunk), 0)
        self.next[kind, chunk] = taken + 1
        return taken


def _zbv(p: int, m: int, rank: int) -> Iterator[Op]:
    # The pattern needs 2p − 1 micro-batches to close; with fewer, the ones too many are left out by the caller.
    m = max(m, 2 * p - 1)
    hops = p - 1 - rank
    ops = _Counter()
    # Filling: until the first micro-batch has run down the V and up again to here.
    yield from (ops.forward(0) for _ in range(2 * hops + 1))
    for _ in range(rank):
        yield from (ops.forward(1), ops.forward(0))
    for _ in range(hops + 1):
        yield from (ops.forward(1), *ops.split(1))
    # Steady: each chunk runs a forward, an input gradient and a weight gradient.
    while ops.next["forward", 1] < m:
        if ops.next["forward", 0] < m:
            yield ops.forward(0)
        yield from (*ops.split(0), ops.forward(1), *ops.split(1))
    # Emptying: input gradients first, the weight gradients fill what would be a bubble.
    for _ in range(rank):
        yield from (ops.backward_input(0), ops.backward_input(1))
    for _ in range(hops + 1):
        yield from (ops.backward_input(0), ops.weight(0))
    for chunk in (1, 0):
        yield from (ops.weight(chunk) for _ in [w for w in ops.waiting if w[0] == chunk])


def _dualpipev(p: int, m: int, rank: int) -> Iterator[Op]:
    hops = p - 1 - rank
    ops = _Counter()
    # Filling.
    yield from (ops.forward(0) for _ in range(2 * hops))
    for _ in range(rank + 1):
        yield from (ops.forward(0), ops.forward(1))
    for _ in range(hops):
        yield from (*ops.split(1), ops.forward(1))
    # Steady: a forward of either chunk overlaps a backward of the other.
    for i in range(m - 2 * p + rank + 1):
        if i == 0 and hops == 0:
            # The bottom of the V: an overlapped pair would keep this first backward from its neighbour for longer.
            yield from (ops.forward(0), ops.backward(1))
        else:
            yield ops.overlapped(0)
        yield ops.overlapped(1)
    for _ in range(hops):
        yield from (ops.backward(1), ops.overlapped(1))
    # Emptying: the first half of the backwards runs whole, the second half sends input gradients on first.
    for i in range(2 * (rank + 1)):
        yield ops.backward(1 - i % 2) if i < rank + 1 else ops.backward_input(1 - i % 2)
    for _ in range(hops):
        yield from (ops.oldest_weight(), ops.backward_input(0))
    yield from (ops.oldest_weight() for _ in range(rank + 1))
