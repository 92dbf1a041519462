"""Whole tensors, ways to split them over ranks, and ranks that are threads of one process."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colossus.checkpoint import Box, Saved, Shard, load_shards, save_shards
from colossus.spec.model import ModelSpec

from .states import raw

Split = Callable[[int, int, tuple[int, ...]], list[tuple[int, int]]]
"""(rank, number of ranks, shape) → start and end in every dim."""


def whole_state(step: int) -> dict[str, Tensor]:
    """Odd sizes, two dtypes, a stack of experts, moments of the same shapes, a scalar, an empty tensor; one tensor
    has several hashed chunks."""
    generator = torch.Generator().manual_seed(step)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = {
        "up": random(5, 12),
        "head": random(16, 9).to(torch.bfloat16),
        "experts": random(4, 6, 10),
        "big": random(301, 2100),
        "bias": random(13),
        "none": random(0, 4),
    }
    return {
        **{f"model.{name}": tensor for name, tensor in weights.items()},
        **{f"optimizer.{name}.first": random(*tensor.shape) for name, tensor in weights.items()},
        "optimizer.up.step": torch.tensor(step),
    }


def _all(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(0, size) for size in shape]


def along(dim: int) -> Split:
    """Cut as torch.chunk does: equal pieces, the last ones shorter or empty."""

    def split(rank: int, num_ranks: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        box = _all(shape)
        which = min(dim, len(shape) - 1) if dim >= 0 else len(shape) + dim
        length = -(-shape[which] // num_ranks)
        box[which] = (min(rank * length, shape[which]), min((rank + 1) * length, shape[which]))
        return box

    return split


def both(rank: int, num_ranks: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Rows over pairs of ranks, columns within each."""
    if len(shape) < 2 or num_ranks % 2:
        return along(0)(rank, num_ranks, shape)
    rows = along(0)(rank // 2, num_ranks // 2, shape)
    columns = along(-1)(rank % 2, 2, shape)
    return [*rows[:-1], columns[-1]]


def uneven(rank: int, num_ranks: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Later ranks have more; the first may have nothing."""
    box = _all(shape)
    box[0] = tuple(shape[0] * i * i // (num_ranks * num_ranks) for i in (rank, rank + 1))  # type: ignore[call-overload]
    return box


def staggered(rank: int, num_ranks: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """No grid: the last rank has the lower rows, the others columns of the upper ones."""
    if len(shape) < 2 or num_ranks < 3:
        return uneven(rank, num_ranks, shape)
    half = shape[0] // 2
    if rank == num_ranks - 1:
        return [(half, shape[0]), *_all(shape)[1:]]
    columns = along(-1)(rank, num_ranks - 1, shape)[-1]
    return [(0, half), *_all(shape)[1:-1], columns]


def one_rank(rank: int, num_ranks: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """All on the last rank."""
    return _all(shape) if rank == num_ranks - 1 else [(0, 0) for _ in shape]


SPLITS: dict[str, Split] = {
    "rows": along(0),
    "second dim": along(1),
    "columns": along(-1),
    "both": both,
    "uneven": uneven,
    "staggered": staggered,
    "one rank": one_rank,
}


def box_of(tensor: Tensor, split: Split, rank: int, num_ranks: int) -> Box:
    shape = tuple(tensor.shape)
    ends = split(rank, num_ranks, shape) if shape else []
    return Box(shape, tuple(a for a, _ in ends), tuple(b - a for a, b in ends), tensor.dtype)


def values(tensor: Tensor, box: Box) -> Tensor:
    index = tuple(slice(a, a + n) for a, n in zip(box.offsets, box.shape, strict=True))
    return tensor[index]


def wanted(state: Mapping[str, Tensor], split: Split, rank: int, num_ranks: int) -> dict[str, Box]:
    return {name: box_of(tensor, split, rank, num_ranks) for name, tensor in state.items()}


def shards(state: Mapping[str, Tensor], split: Split, rank: int, num_ranks: int) -> dict[str, Tensor | Shard]:
    """What a rank writes; the scalars are written by rank 0."""
    held: dict[str, Tensor | Shard] = {}
    for name, tensor in state.items():
        if tensor.dim():
            box = box_of(tensor, split, rank, num_ranks)
            held[name] = Shard(box.global_shape, box.offsets, values(tensor, box))
        elif rank == 0:
            held[name] = tensor
    return held


def assert_boxes(loaded: Mapping[str, Tensor], state: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> None:
    """What was loaded is, bit for bit, those boxes of the state."""
    assert list(loaded) == list(boxes)
    for name, box in boxes.items():
        assert (loaded[name].shape, loaded[name].dtype) == (box.shape, box.dtype), name
        assert raw(loaded[name]) == raw(values(state[name], box)), name


def assert_loads_as(path: Path, state: Mapping[str, Tensor], split: Split, num_ranks: int) -> None:
    """Every one of so many ranks finds its boxes in the checkpoint."""
    for rank in range(num_ranks):
        boxes = wanted(state, split, rank, num_ranks)
        assert_boxes(load_shards(path, boxes).tensors, state, boxes)


class ThreadRanks:
    """Ranks that are threads."""

    def __init__(self, rank: int, num_ranks: int, meeting: threading.Barrier, table: dict[Any, Any]) -> None:
        self.rank, self.num_ranks, self._meeting, self._table = rank, num_ranks, meeting, table

    def barrier(self) -> None:
        self._meeting.wait()

    def broadcast(self, value: Any, source: int = 0) -> Any:
        return self._gather(value)[source]

    def lowest(self, value: int) -> int:
        return min(self._gather(value))

    def _gather(self, value: Any) -> list[Any]:
        self.barrier()
        self._table[self.rank] = value
        self.barrier()
        return [self._table[rank] for rank in range(self.num_ranks)]


def on_threads(num_ranks: int, work: Callable[[ThreadRanks], Any]) -> list[Any]:
    """What `work` returned on each rank, or the error it raised."""
    meeting, table = threading.Barrier(num_ranks, timeout=60), {}
    results: list[Any] = [None] * num_ranks

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, num_ranks, meeting, table))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def save_split(
    directory: Path,
    step: int,
    state: Mapping[str, Tensor],
    split: Split,
    num_ranks: int,
    *,
    facts: Mapping[str, Any] | None = None,
    model: ModelSpec | None = None,
) -> Path:
    """Save a state from so many ranks."""

    def save(ranks: ThreadRanks) -> Saved:
        held = shards(state, split, ranks.rank, num_ranks)
        return save_shards(directory, step, held, facts or {}, ranks, model=model, timeout_s=20)

    results = on_threads(num_ranks, save)
    errors = [result for result in results if isinstance(result, Exception)]
    if errors:
        raise errors[0]
    assert len({result.path for result in results}) == 1
    return results[0].path
