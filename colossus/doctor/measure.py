"""What one rank of this machine does in a second: matmuls, attention, passes over elements, collectives.

Everything is measured as training runs it: by the modules of `colossus.models`, in a process prepared as the trainer
prepares it, forward and backward, on tensors that have not just been in the cache. All ranks measure the same at the
same time, as they share the machine's caches and memory while they train.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colossus.models import chunked_cross_entropy
from colossus.models.attend import attend, who_sees
from colossus.models.parts import GATED, PLAIN, LayerNorm, RmsNorm
from colossus.models.positions import Rope, rotate
from colossus.optim import gradient_norm
from colossus.parallel.collectives import Team, all_gather, reduce_scatter
from colossus.spec.model import LayerNormSpec, NormSpec, RopeSpec
from colossus.trainer.machine import spells
from colossus.trainer.precision import DTYPES

COLD_BYTES = {"cpu": 48 << 20, "cuda": 256 << 20}
"""Tensors that take turns fill so much: more than a core's share of the last cache."""
MATMULS = (
    (128, 128, 128), (512, 128, 128), (2048, 256, 256), (128, 512, 512), (1024, 512, 512), (32, 768, 768),
    (128, 2048, 256), (1024, 256, 1024), (1024, 1024, 256), (512, 3072, 768), (2048, 768, 768), (128, 4096, 512),
    (32, 8192, 512),
)  # fmt: skip
"""(tokens, outputs, inputs) of linear layers: square ones, skinny ones, and those of a loss by chunks."""
WIDE_MATMULS = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 1024, 8192), (2048, 16384, 4096))
"""Further ones, which keep a GPU busy."""
SEQUENCES = (128, 256, 512, 1024, 2048)
HEAD_DIMS = (32, 64, 128)
PAIRS = {"cpu": (2**17, 2**20, 2**23), "cuda": (2**22, 2**25, 2**28)}
"""Query-key pairs of all heads together, at least one head."""
ELEMENTS = {"cpu": (2**13, 2**16, 2**19, 2**22), "cuda": (2**16, 2**20, 2**24, 2**27)}
WIDTH = 512
"""Of what is normed or looked up."""
MESSAGES = (2**10, 2**14, 2**17, 2**20, 2**23, 2**25)
"""Bytes of a collective."""
EXCHANGES = 8
"""Collectives in a spell."""
WORK_S, WORK_WIDTH = {"cpu": 0.01, "cuda": 0.0002}, 256
"""What ranks compute between two of them: matmuls of square matrices."""
LEAST_SHARE = 1e-3
"""Of work and exchange together, in case the exchange is lost in the spread of the work."""
CHAIN = 4
"""Operations one after the other in one pass, so that starting a backward pass counts a fourth."""


@dataclass
class Records:
    """What has been measured, as the fields of `Measured` say it, and how much repetitions differ."""

    kind: str
    num_spells: int = 5
    spell_s: float = 0.03
    meet: Callable[[], None] = lambda: None
    """Waits until all ranks are here."""
    matmuls: list[dict[str, Any]] = field(default_factory=list)
    attention: list[dict[str, Any]] = field(default_factory=list)
    operations: list[dict[str, Any]] = field(default_factory=list)
    collectives: list[dict[str, Any]] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)

    def seconds(self, run: Callable[[], object], repeats: int = 1) -> float:
        """The median time of `run` over `repeats`."""
        self.meet()
        return self.median(
            [t / repeats for t in spells(run, self.kind, num_spells=self.num_spells, spell_s=self.spell_s)]
        )

    def median(self, times: Sequence[float]) -> float:
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
        self.spreads.append((high - low) / middle)
        return middle


# --- matmuls ---


def measure_matmuls(records: Records, shapes: Sequence[tuple[int, int, int]] = MATMULS) -> None:
    for name, dtype in DTYPES.items():
        for tokens, outputs, inputs in shapes:
            size = dtype.itemsize * (tokens * inputs + outputs * inputs + tokens * outputs)
            sets = [
                (_random(records, tokens, inputs, dtype=dtype), _random(records, outputs, inputs, dtype=dtype),
                 _random(records, tokens, outputs, dtype=dtype))
                for _ in range(_turns(records, size))
            ]  # fmt: skip
            turn = _endless(sets)
            products: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
                "forward": lambda x, weight, gradient: x @ weight.t(),
                "input_gradient": lambda x, weight, gradient: gradient @ weight,
                "weight_gradient": lambda x, weight, gradient: gradient.t() @ x,
            }
            for product, multiply in products.items():
                seconds = records.seconds(partial(_next_of, multiply, turn))
                records.matmuls.append(
                    {"dtype": name, "product": product, "tokens": tokens, "outputs": outputs, "inputs": inputs,
                     "seconds": seconds}
                )  # fmt: skip


def _next_of(run: Callable[..., object], turn: Iterator[Sequence[Tensor]]) -> object:
    return run(*next(turn))


# --- attention ---


def measure_attention(
    records: Records, sequences: Sequence[int] = SEQUENCES, head_dims: Sequence[int] = HEAD_DIMS
) -> None:
    """By the path that `attend` takes for the length, from where projections leave queries to where the output's
    projection takes what was mixed."""
    for name, dtype in DTYPES.items():
        for sequence in sequences:
            for head_dim in head_dims:
                sizes, forward, backward = [], [], []
                for num_heads in sorted({max(1, pairs // sequence**2) for pairs in PAIRS[records.kind]}):
                    there, both = _attention_s(records, dtype, sequence, head_dim, num_heads)
                    sizes.append(num_heads)
                    forward.append(there)
                    backward.append(max(both - there, 0.1 * both))
                records.attention.append(
                    {"dtype": name, "sequence_tokens": sequence, "head_dim": head_dim, "sizes": sizes,
                     "seconds": forward, "backward_seconds": backward}
                )  # fmt: skip


def _attention_s(
    records: Records, dtype: torch.dtype, sequence: int, head_dim: int, num_heads: int
) -> tuple[float, float]:
    """Seconds of (forward, forward and backward)."""
    if records.kind == "cuda":
        # Each shape has a kernel of its own, and of one function the compiler makes only a few.
        torch.compiler.reset()
    heads = min(num_heads, 8)
    rows = num_heads // heads
    shape = (rows, sequence, heads, head_dim)
    inputs = [_random(records, *shape, dtype=dtype).requires_grad_() for _ in range(3)]
    gradient = _random(records, rows, sequence, heads * head_dim, dtype=dtype)
    documents = torch.zeros(rows, sequence, dtype=torch.long, device=records.kind)
    index = torch.arange(sequence, device=records.kind)[None]
    sees = who_sees(documents, documents, index, dtype)

    def mixed() -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in inputs)
        return attend(query, key, value, sees, scale=head_dim**-0.5).transpose(1, 2).flatten(2)

    return (
        records.seconds(mixed),
        records.seconds(lambda: torch.autograd.grad(mixed(), inputs, gradient)),
    )


# --- passes over elements ---


def measure_operations(records: Records, sizes: Sequence[int] | None = None) -> None:
    sizes = ELEMENTS[records.kind] if sizes is None else sizes
    for name, dtype in DTYPES.items():
        for operation, make in _OPERATIONS.items():
            times = []
            for size in sizes:
                run, repeats = make(records, dtype, size)
                times.append(records.seconds(run, repeats))
            records.operations.append(
                {"name": operation, "dtype": name, "sizes": list(sizes), "seconds": times}
            )


Item = TypeVar("Item")

Made = tuple[Callable[[], object], int]
"""What is run, and how many operations that is."""


def _chained(records: Records, inputs: list[Tensor], step: Callable[[Tensor], Tensor]) -> Made:
    """`step` on what it has made itself, forward and backward."""
    gradient = _random(records, *inputs[0].shape, dtype=inputs[0].dtype)

    def run() -> object:
        x = inputs[0]
        for _ in range(CHAIN):
            x = step(x)
        return torch.autograd.grad(x, inputs, gradient)

    return run, CHAIN


def _normed(make: Callable[[], nn.Module]) -> Callable[[Records, torch.dtype, int], Made]:
    def made(records: Records, dtype: torch.dtype, size: int) -> Made:
        norm = make().to(records.kind)
        for parameter in norm.parameters():
            nn.init.ones_(parameter)
        x = _random(records, size // WIDTH, WIDTH, dtype=dtype).requires_grad_()
        return _chained(records, [x, *norm.parameters()], norm)

    return made


def _rotation(records: Records, dtype: torch.dtype, size: int) -> Made:
    head_dim, heads = 64, 8
    tokens = size // (head_dim * heads)
    rope = Rope(RopeSpec(), head_dim).to(records.kind)
    rotation = rope(torch.arange(tokens, device=records.kind)[None], dtype)
    x = _random(records, 1, tokens, heads, head_dim, dtype=dtype).requires_grad_()
    return _chained(records, [x], lambda x: rotate(x, rotation))


def _plain(activation: Callable[[Tensor], Tensor]) -> Callable[[Records, torch.dtype, int], Made]:
    def made(records: Records, dtype: torch.dtype, size: int) -> Made:
        return _chained(records, [_random(records, size, dtype=dtype).requires_grad_()], activation)

    return made


def _gated(activation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Records, torch.dtype, int], Made]:
    def made(records: Records, dtype: torch.dtype, size: int) -> Made:
        gate, *ups = (_random(records, size, dtype=dtype).requires_grad_() for _ in range(1 + CHAIN))
        turn = _endless(ups)
        return _chained(records, [gate, *ups], lambda x: activation(x, next(turn)))

    return made


def _add(records: Records, dtype: torch.dtype, size: int) -> Made:
    pairs = [
        (_random(records, size, dtype=dtype), _random(records, size, dtype=dtype))
        for _ in range(_turns(records, 2 * size * dtype.itemsize))
    ]
    turn = _endless(pairs)
    return lambda: torch.add(*next(turn)), 1


def _cast(records: Records, dtype: torch.dtype, size: int) -> Made:
    """A weight's way to the matmuls' dtype and its gradient's way back; nothing where both are float32."""
    turn = _endless([_random(records, size) for _ in range(_turns(records, 4 * size))])

    def run() -> object:
        weight = next(turn)
        return weight.to(dtype).to(weight.dtype)

    return run, 1


def _accumulate(records: Records, dtype: torch.dtype, size: int) -> Made:
    turns = _turns(records, 8 * size)
    turn = _endless([(_random(records, size), _random(records, size)) for _ in range(turns)])

    def run() -> object:
        total, gradient = next(turn)
        return total.add_(gradient)

    return run, 1


def _head_gradient(records: Records, dtype: torch.dtype, size: int) -> Made:
    """As the loss adds a chunk's: a sum of two dtypes takes longer than one of float32 alone."""
    turns = _turns(records, 8 * size)
    turn = _endless([(_random(records, size), _random(records, size, dtype=dtype)) for _ in range(turns)])
    return partial(_next_of, Tensor.add_, turn), 1


def _embedding(records: Records, dtype: torch.dtype, size: int) -> Made:
    """A table of few rows: what its own size costs is the gradient's addition."""
    table = _random(records, 1024, WIDTH).requires_grad_()
    rows = torch.randint(1024, (size // WIDTH,), device=records.kind)
    gradient = _random(records, size // WIDTH, WIDTH, dtype=dtype)

    def run() -> object:
        return torch.autograd.grad(nn.functional.embedding(rows, table).to(dtype), table, gradient)

    return run, 1


def _loss(records: Records, dtype: torch.dtype, size: int) -> Made:
    """One chunk of the loss, less its matmuls: of hidden states of 8, those hardly count."""
    vocabulary = max(256, min(4096, size // 128))
    tokens = size // vocabulary
    hidden = _random(records, tokens, 8, dtype=dtype).requires_grad_()
    weight = _random(records, vocabulary, 8).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=records.kind)
    chunk = max(32, 2**19 // vocabulary)
    return lambda: chunked_cross_entropy(hidden, weight, targets, chunk_tokens=chunk), 1


def _visibility(records: Records, dtype: torch.dtype, size: int) -> Made:
    sequence = max(64, min(1024, int(size**0.5)))
    rows = max(1, size // sequence**2)
    tokens = max(1, size // (rows * sequence))
    documents = torch.zeros(rows, sequence, dtype=torch.long, device=records.kind)
    index = torch.arange(sequence, device=records.kind)[None, -tokens:]
    return lambda: who_sees(documents[:, -tokens:], documents, index, dtype), 1


def _optimizer(records: Records, dtype: torch.dtype, size: int) -> Made:
    """In matrices of at most a million weights, as models have them."""
    count = max(1, size // 2**20)
    model = nn.ParameterList(_random(records, size // count) for _ in range(count))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)

    def run() -> object:
        gradient_norm(model)
        optimizer.step()
        return None

    return run, 1


_OPERATIONS: dict[str, Callable[[Records, torch.dtype, int], Made]] = {
    "norm": _normed(lambda: RmsNorm(WIDTH, NormSpec())),
    "layer_norm": _normed(lambda: LayerNorm(WIDTH, LayerNormSpec())),
    "rotation": _rotation,
    **{name: _plain(activation) for name, activation in PLAIN.items()},
    **{name: _gated(activation) for name, activation in GATED.items()},
    "add": _add,
    "cast": _cast,
    "accumulate": _accumulate,
    "head_gradient": _head_gradient,
    "embedding": _embedding,
    "loss": _loss,
    "visibility": _visibility,
    "optimizer": _optimizer,
}


def memory_bytes_per_s(records: Records) -> float:
    """Triad, a = b + s·c, on tensors far larger than any cache: bytes read and written per second."""
    size = (1 << 24) if records.kind == "cpu" else (1 << 28)
    b, c = _random(records, size), _random(records, size)
    a = torch.empty_like(b)
    return 3 * 4 * size / records.seconds(lambda: torch.add(b, c, alpha=3.0, out=a))


# --- collectives ---


def measure_collectives(records: Records, messages: Sequence[int] = MESSAGES) -> None:
    """On the clock on the wall: ranks wait for each other, and waiting takes no time of a CPU.

    Between two exchanges the ranks compute, as in a step, and what they take without exchanges is subtracted. One after
    the other, exchanges look cheaper: the threads that carry them then find a core free, and ranks need not wait for
    the one that computes longest.
    """
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    team = Team("group", rank, tuple(range(num_ranks)), dist.group.WORLD)
    work = _work(records)
    for collective, run in _COLLECTIVES.items():
        times = []
        for size in messages:
            numbers = size // 4 // (2 * num_ranks) * num_ranks
            whole = torch.ones(2, numbers, device=records.kind)
            part = torch.ones(2, numbers // num_ranks, device=records.kind)
            times.append(records.median(_exchange_spells(records, work, partial(run, whole, part, team))))
        records.collectives.append(
            {"kind": collective, "backend": dist.get_backend(), "num_ranks": num_ranks,
             "sizes": list(messages), "seconds": times}
        )  # fmt: skip


def _work(records: Records) -> Callable[[], None]:
    """Some WORK_S of matmuls, as many on every rank."""
    a, b = _random(records, WORK_WIDTH, WORK_WIDTH), _random(records, WORK_WIDTH, WORK_WIDTH)
    one_s = spells(lambda: a @ b, records.kind, num_spells=1, spell_s=0.01)[0]
    count = torch.tensor([max(1, round(WORK_S[records.kind] / one_s))], device=records.kind)
    dist.broadcast(count, 0)
    times = int(count)

    def work() -> None:
        for _ in range(times):
            a @ b

    return work


def _exchange_spells(records: Records, work: Callable[[], None], run: Callable[[], object]) -> list[float]:
    def both() -> None:
        work()
        run()

    both()
    times = []
    for _ in range(records.num_spells):
        alone_s, both_s = (_wall_s(records, part) for part in (work, both))
        times.append(max(both_s - alone_s, LEAST_SHARE * both_s))
    return times


def _wall_s(records: Records, run: Callable[[], object]) -> float:
    """Seconds of one of EXCHANGES runs, which all ranks start together."""
    records.meet()
    if records.kind == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(EXCHANGES):
        run()
    if records.kind == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / EXCHANGES


def _send(whole: Tensor, part: Tensor, team: Team) -> None:
    """Round the ring: each rank sends to the next one and receives from the one before."""
    received = torch.empty_like(whole)
    operations = [
        dist.P2POp(dist.isend, whole, (team.place + 1) % team.size),
        dist.P2POp(dist.irecv, received, (team.place - 1) % team.size),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


_COLLECTIVES: dict[str, Callable[[Tensor, Tensor, Team], object]] = {
    "all_reduce": lambda whole, part, team: dist.all_reduce(whole),
    "all_gather": lambda whole, part, team: all_gather(part, 1, team),
    "reduce_scatter": lambda whole, part, team: reduce_scatter(whole, 1, team),
    "all_to_all": lambda whole, part, team: dist.all_to_all_single(
        torch.empty(whole.numel(), device=whole.device), whole.flatten()
    ),
    "send": _send,
}


# --- tensors ---


def _random(records: Records, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=records.kind).to(dtype)


def _turns(records: Records, size_bytes: int) -> int:
    """Sets of `size_bytes` that take turns, so that none is still in the cache when it comes again."""
    return max(1, min(64, COLD_BYTES[records.kind] // size_bytes))


def _endless(items: Sequence[Item]) -> Iterator[Item]:
    while True:
        yield from items
