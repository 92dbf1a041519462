"""What a rank holds in memory while it runs: bytes of all tensors that are alive, at every moment and by what they are.

The real step is watched, operator by operator, on real tensors or on fake ones that have shapes and no data: so the
memory of a rank of any layout is known where no such machine is. What is not seen is what an operator takes for itself
while it runs.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind = Literal["weights", "gradients", "optimizer", "activations", "gathered", "loss", "workspace"]
KINDS: tuple[Kind, ...] = (
    "weights", "gradients", "optimizer", "activations", "gathered", "loss", "workspace",
)  # fmt: skip


class _Held:
    """A storage that is alive: its bytes when last seen, and what it is."""

    __slots__ = ("kind", "num_bytes", "reference")

    def __init__(self, reference: weakref.ref, num_bytes: int, kind: Kind) -> None:
        self.reference, self.num_bytes, self.kind = reference, num_bytes, kind


class MemoryTracer(TorchDispatchMode):
    """Counts bytes of live storages while it is entered; enter it after a FakeTensorMode, where there is one.

    A storage counts once, whatever views there are of it, from the first operator that shows it until nothing refers to
    it. One that is resized (FSDP2 frees gathered weights so) counts as large as it is. Its kind is that of the phase in
    which it is made, unless `own` says better.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.peak_parts: Counter[Kind] = Counter()
        """By kind, when all together were the most."""
        self.phase: Kind = "workspace"
        self._live: dict[int, _Held] = {}
        self._parts: Counter[Kind] = Counter()
        self._now = 0

    @property
    def live_bytes(self) -> int:
        return self._now

    @property
    def live_parts(self) -> Counter[Kind]:
        return Counter({kind: size for kind, size in self._parts.items() if size})

    def reset_peak(self) -> None:
        """Forgets what was before: the peak is what is alive now."""
        self.peak_bytes, self.peak_parts = self._now, self.live_parts

    def own(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """Says what the storages of these tensors are, whenever they were made."""
        for tensor in tensors:
            for plain in _plain(tensor):
                held = self._see(plain.untyped_storage(), kind)
                if held.kind != kind:
                    self._parts[held.kind] -= held.num_bytes
                    self._parts[kind] += held.num_bytes
                    held.kind = kind

    @contextmanager
    def during(self, phase: Kind) -> Iterator[None]:
        """What is made inside is of this kind."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def watch(self, model: nn.Module) -> None:
        """Tells forward passes of `model` from what comes after them, and gradients from what else is made in backward
        passes."""
        model.register_forward_pre_hook(lambda *_: self._enter("activations"), prepend=True)
        # Between the last layer and the backward pass stands the loss.
        model.register_forward_hook(lambda *_: self._enter("loss"))
        for parameter in model.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.register_post_accumulate_grad_hook(self._own_gradient)

    def _own_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:  # it is not where it is put off
            self.own("gradients", [parameter.grad])

    def _enter(self, phase: Kind) -> None:
        if torch._C._current_graph_task_id() == -1:
            self.phase = phase

    # --- seeing storages come and go ---

    def __enter__(self) -> Self:
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            made = self._resize(storage, size)
            self._see(storage, "gathered")
            return made

        # Not an operator: FSDP2 frees and takes memory of gathered weights with it.
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, where)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operators on local tensors come by again
        made = func(*args, **(kwargs or {}))
        phase = self.phase if torch._C._current_graph_task_id() == -1 else "workspace"
        if func.namespace in ("_c10d_functional", "c10d", "fsdp"):
            phase = "gathered"
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                for plain in _plain(tensor):
                    self._see(plain.untyped_storage(), phase)
        if "resize" in func.__name__ or func.__name__.startswith("set_"):
            self._see(args[0].untyped_storage(), phase)
        return made

    def _see(self, storage: torch.UntypedStorage, kind: Kind) -> _Held:
        key = storage._cdata
        held = self._live.get(key)
        if held is None or held.reference() is not storage:
            if held is not None:
                self._forget(held)
            held = self._live[key] = _Held(_nothing, 0, kind)
            mine = held

            def gone(_: Any) -> None:
                self._forget(mine)
                if self._live.get(key) is mine:
                    del self._live[key]

            held.reference = weakref.ref(storage, gone)
        elif held.num_bytes == 0:
            self._forget(held)
            held.kind = kind
        size = storage.nbytes()
        if size != held.num_bytes:
            self._parts[held.kind] += size - held.num_bytes
            self._now += size - held.num_bytes
            held.num_bytes = size
            if self._now > self.peak_bytes:
                self.reset_peak()
        return held

    def _forget(self, held: _Held) -> None:
        self._now -= held.num_bytes
        self._parts[held.kind] -= held.num_bytes
        held.num_bytes = 0


def _nothing() -> None:
    """A reference to a storage that is gone."""


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that have memory of `tensor`: a sharded one's part that is here, a sparse one's rows."""
    if isinstance(tensor, DTensor):
        yield from _plain(tensor._local_tensor)
    elif tensor.is_sparse:
        yield tensor._indices()
        yield tensor._values()
    elif tensor.layout == torch.strided:
        yield tensor
