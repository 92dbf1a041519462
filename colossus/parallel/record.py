"""What a rank exchanges while it runs: every collective by its kind, its group and its bytes.

The real step is watched, operator by operator, as it comes: forward, backward and optimizer, our own exchanges and
those that torch's sharding makes; with real ranks, or with shapes alone in a fake world.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from colossus.parallel.mesh import Mesh
from colossus.planner.estimate.collectives import Collective, Exchange, Kind, in_order

# Of each operator: its kind, the place of the process group among its arguments, and that of the tensors that count.
# Ours are named in parallel/collectives.py, torch's in its csrc/distributed/c10d/Ops.cpp.
_OURS: dict[str, Kind] = {
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "total": "all-reduce",
    "team_total": "all-reduce",
    "all_to_all": "all-to-all",
}
_TORCHS: dict[str, tuple[Kind, int]] = {
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 0),
    "alltoall_base_": ("all-to-all", 1),
    "send": ("send", 0),
}
_SILENT = frozenset({"recv_", "recv_any_source_", "barrier", "monitored_barrier_"})
"""Receives are the other side of sends; barriers carry nothing."""


class CollectiveRecorder(TorchDispatchMode):
    """Counts what is exchanged while it is entered; enter it after a FakeTensorMode, where there is one.

    Bytes are, of an all-gather, the whole that comes together; of a reduce-scatter, the whole that is put in; of an
    all-reduce, the tensor; of an all-to-all, all that this rank sends, to itself too; of a send, the message. A receive
    counts nothing: it is someone's send.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.counts: Counter[Collective] = Counter()

    def exchanges(self) -> tuple[Exchange, ...]:
        """What was exchanged so far."""
        return in_order(self.counts)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "colossus":
            kind = _OURS.get(func._opname)
            if kind is not None:
                self._ours(kind, args)
        elif func.namespace == "c10d":
            self._torchs(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _ours(self, kind: Kind, arguments: tuple[Any, ...]) -> None:
        x, *integers, group = arguments
        self._count(kind, group, x.nbytes * (integers[1] if kind == "all-gather" else 1))

    def _torchs(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name in _SILENT:
            return
        if name not in _TORCHS:
            raise NotImplementedError(f"a step used c10d.{name}, of which no bytes are known")
        kind, place = _TORCHS[name]
        group = next(one for one in map(_group_of, arguments) if one is not None)
        self._count(kind, group, _num_bytes(tree_leaves(arguments[place])))

    def _count(self, kind: Kind, process_group: str, num_bytes: int) -> None:
        group = self.mesh.axis(process_group)
        self.counts[Collective(kind, group or "group", num_bytes)] += 1


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _group_of(argument: Any) -> str | None:
    unbox: Callable[[Any], dist.ProcessGroup] = dist.ProcessGroup.unbox
    try:
        return str(unbox(argument).group_name)
    except (RuntimeError, TypeError, AttributeError):
        return None
