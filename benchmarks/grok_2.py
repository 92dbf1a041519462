"""Grok-2 out to a Hugging Face directory and in again, at its true shapes, in the memory of a small machine.

One layer of the 64 is real, with embeddings and head: 6.3 billion parameters. All 64 are checked by name and shape.

    python benchmarks/grok_2.py [--folder DIR]      needs 45 GB of disk, and takes some minutes
"""

import argparse
import hashlib
import json
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

SHARD_BYTES = 5_000_000_000
ROUNDING = "bfloat16"


def values(name: str, shape: tuple[int, ...]) -> Any:
    """Random values that both ends can make again: a block of noise, repeated from a place that the name decides."""
    import math

    import torch

    digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(digest))
    count = math.prod(shape)
    whole = torch.empty(count)
    for start in range(0, count, len(block)):
        part = whole[start : start + len(block)]
        part.copy_(block[: len(part)])
    # Rounded already, so that the file's bfloat16 is the same number.
    return whole.to(getattr(torch, ROUNDING)).float().view(shape)


def make(folder: Path) -> None:
    """A run with the weights, written tensor by tensor."""
    from colossus.checkpoint.continued import continued
    from colossus.checkpoint.new_run import run_from_weights
    from colossus.data.tokenizer import Tokenizer

    model = one_layer()
    (folder / "tokenizer").mkdir()
    tokenizer = Tokenizer.train(["a few words"], 300).save(folder / "tokenizer")
    parameters = ((p.name, values(p.name, p.shape)) for p in model.parameters())
    run_from_weights(
        continued(model), parameters, tokenizer=tokenizer, origin="noise", runs_directory=folder, name="grok"
    )


def leave(folder: Path) -> None:
    from colossus.checkpoint.hugging_face import export_run
    from colossus.observe.run_directory import RunDirectory

    export_run(
        RunDirectory.open(folder / "grok-001"), folder / "out", dtype=ROUNDING, max_shard_bytes=SHARD_BYTES
    )


def come_back(folder: Path) -> None:
    from colossus.checkpoint.continued import continued
    from colossus.checkpoint.hugging_face import import_run, open_directory

    source = open_directory(folder / "out")
    import_run(source, continued(source.model), runs_directory=folder, name="back")


def compare(folder: Path) -> None:
    """Every parameter of the imported run is the noise that was written."""
    import torch

    from colossus.checkpoint import load_newest

    loaded, _ = load_newest(folder / "back-001" / "checkpoints", expect=one_layer(), prefix="model.")
    for parameter in one_layer().parameters():
        assert torch.equal(loaded.tensors[f"model.{parameter.name}"], values(parameter.name, parameter.shape))
        loaded.forget_pages()


def one_layer() -> Any:
    from colossus import zoo

    return zoo.find("grok-2").model_copy(update={"num_layers": 1})


def check_all_names() -> dict[str, int]:
    """All 64 layers, by name and shape: layers are alike, and every weight has its place in the files."""
    import math

    from colossus import zoo
    from colossus.zoo.hugging_face import architecture_of

    model = zoo.find("grok-2")
    stored = {tensor.name: tensor.shape for tensor in architecture_of(model).tensors(model)}
    first = {
        name.removeprefix("model.layers.0."): shape for name, shape in stored.items() if ".layers.0." in name
    }
    for layer in range(64):
        for name, shape in first.items():
            assert stored[f"model.layers.{layer}.{name}"] == shape
    elements = sum(math.prod(shape) for shape in stored.values())
    assert elements == model.num_params() == 269_515_497_472
    return {"stored_tensors": len(stored), "per_layer": len(first), "elements": elements}


def measured(task: str, folder: Path) -> dict[str, float]:
    """Seconds and peak resident bytes of a task in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(task, folder, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _measure(task: str, folder: Path, sender: Any) -> None:
    import torch

    import colossus.checkpoint.hugging_face  # noqa: F401  its own memory is not the task's

    torch.set_num_threads(1)
    before = _peak_bytes()
    started, cpu = time.perf_counter(), time.process_time()
    globals()[task](folder)
    sender.send(
        {
            "wall_s": time.perf_counter() - started,
            "cpu_s": time.process_time() - cpu,
            "peak_growth_bytes": _peak_bytes() - before,
        }
    )


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the files go; default: a temporary directory")
    folder = Path(tempfile.mkdtemp(prefix="grok-2-", dir=parser.parse_args().folder))
    report: dict[str, Any] = {"names": check_all_names()}
    try:
        report["make"] = measured("make", folder)
        report["export"] = measured("leave", folder)
        shutil.rmtree(folder / "grok-001")  # the disk holds two of the three at once
        files = sorted((folder / "out").glob("*.safetensors"))
        largest = max(file.stat().st_size for file in files)
        report["files"] = {
            "count": len(files),
            "largest_bytes": largest,
            "bytes": sum(f.stat().st_size for f in files),
        }
        report["import"] = measured("come_back", folder)
        report["compare"] = measured("compare", folder)
        for task in ("export", "import"):
            report[task]["peak_over_largest_shard"] = report[task]["peak_growth_bytes"] / largest
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
