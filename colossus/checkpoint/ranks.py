"""What saving and loading ask of the processes that do it together: very little, and nothing per tensor."""

import pickle
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Ranks(Protocol):
    """Processes that save or load one checkpoint together, in lockstep: all make the same calls in the same order.

    For saving, the ranks of one replica group (others hold copies of the same shards and have nothing to write);
    for loading, all ranks that are to use the same checkpoint. Called from the caller's thread only.
    """

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    def barrier(self) -> None:
        """Returns when all ranks have come here."""

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The small picklable `value` of rank `source`, on all ranks; what the others give is ignored."""

    def lowest(self, value: int) -> int:
        """The lowest of all ranks' values, on all ranks."""


class SingleRank:
    """One process by itself."""

    rank = 0
    num_ranks = 1

    def barrier(self) -> None:
        pass

    def broadcast(self, value: Any, source: int = 0) -> Any:
        return value

    def lowest(self, value: int) -> int:
        return value


class ProcessGroupRanks:
    """The ranks of a torch.distributed process group; of all processes if `group` is None. gloo or NCCL."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        # NCCL moves what is on the device only; a group with both, or gloo, takes the host's memory.
        self._device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

    def barrier(self) -> None:
        self.lowest(0)

    def broadcast(self, value: Any, source: int = 0) -> Any:
        data = pickle.dumps(value) if self.rank == source else b""
        root = dist.get_global_rank(self._group, source) if self._group is not None else source
        size = torch.tensor(len(data), device=self._device)
        dist.broadcast(size, src=root, group=self._group)
        if self.rank == source:
            block = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
        else:
            block = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        dist.broadcast(block, src=root, group=self._group)
        return pickle.loads(block.cpu().numpy().tobytes())

    def lowest(self, value: int) -> int:
        block = torch.tensor(value, dtype=torch.int64, device=self._device)
        dist.all_reduce(block, op=dist.ReduceOp.MIN, group=self._group)
        return int(block)
