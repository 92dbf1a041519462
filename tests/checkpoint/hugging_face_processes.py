"""What other processes do: measure their memory, or be killed."""

import ctypes
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from colossus.checkpoint.continued import continued
from colossus.checkpoint.hugging_face import export_run, import_run, open_directory, write_directory
from colossus.checkpoint.payload import TensorType
from colossus.checkpoint.save import save_streamed
from colossus.observe.run_directory import RunDirectory

from .hugging_face_models import CONFIGS, make_run, model, weights
from .processes import die_at_call, start

LARGE = {
    **CONFIGS["mixtral"],
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 1024,
    "num_local_experts": 4,
    "num_hidden_layers": 4,
}
"""268 MB in float32; the largest parameter, four experts' stacked, has 16.8 MB, the largest stored tensor 4.2."""


def in_process(target: Callable[..., None], *arguments: Any) -> list[Any]:
    """What a new process says before it ends."""
    process, said = start(target, *arguments)
    messages = []
    try:
        while True:
            messages.append(said.recv())
    except EOFError:
        process.join()
        return messages


def _status_bytes(field: str) -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
    return int(line.split()[1]) * 1024


def _peak_growth(work: Callable[[], object]) -> int:
    """By how many bytes the peak of all resident memory, files' pages included, exceeds what it was before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status_bytes("VmRSS:")
    work()
    return _status_bytes("VmHWM:") - before


def _warm_up(folder: Path) -> RunDirectory:
    """Do all of it once on a small model: what is imported and allocated for good is not what is measured. Nor is what
    the allocator keeps of memory that was given back: from here on it gives large blocks back to the system."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD; else it rises to the size of what is freed
    torch.set_num_threads(1)
    small = model("mixtral")
    run = make_run(folder / "small", small, weights(small))
    export_run(run, folder / "small-out")
    source = open_directory(folder / "small-out")
    import_run(source, continued(source.model), runs_directory=folder / "small", name="warm")
    return run


def export_measured(said: Connection, folder: Path, max_shard_bytes: int, dtype: str) -> None:
    run = RunDirectory.open(folder / "large-001")
    _warm_up(folder / f"warm-{max_shard_bytes}-{dtype}")
    out = folder / f"out-{max_shard_bytes}-{dtype}"
    said.send(_peak_growth(lambda: export_run(run, out, max_shard_bytes=max_shard_bytes, dtype=dtype)))


def import_measured(said: Connection, folder: Path, directory: Path) -> None:
    _warm_up(folder / "warm-import")

    def work() -> None:
        source = open_directory(directory)
        import_run(source, continued(source.model), runs_directory=folder, name="imported")

    said.send(_peak_growth(work))


def make_large_run(said: Connection, folder: Path) -> None:
    from colossus.zoo.hugging_face import model_of

    torch.set_num_threads(1)
    small = make_run(folder, model("llama"), weights(model("llama")))
    spec = model_of(LARGE, "large")
    run = RunDirectory.create(folder, "large")
    for file in small.tokenizer_path.iterdir():
        (run.tokenizer_path / file.name).write_bytes(file.read_bytes())
    types = {f"model.{p.name}": TensorType(torch.float32, p.shape) for p in spec.parameters()}

    def tensor(name: str) -> torch.Tensor:
        return torch.arange(types[name].num_bytes // 4, dtype=torch.float32).view(types[name].shape)

    save_streamed(run.checkpoints_path, 7, types, tensor, {}, model=spec)
    run.write_description(small.config().model_copy(update={"name": "large", "model": spec}))
    said.send(sum(kind.num_bytes for kind in types.values()))


def export_and_die(said: Connection, path: Path, fatal_call: int) -> None:
    """Write a small model in several shards; be killed at the `fatal_call`-th thing asked of the file system."""
    torch.set_num_threads(1)
    spec = model("llama")
    tensors = weights(spec)
    die_at_call(fatal_call)
    write_directory(spec, tensors.__getitem__, path, max_shard_bytes=20_000)
    said.send("done")
