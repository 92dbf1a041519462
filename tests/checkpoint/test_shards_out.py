"""What many ranks wrote goes out as what one process wrote does: to Hugging Face, to generation and evaluation."""

import shutil
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from colossus.checkpoint import load_newest, save
from colossus.checkpoint.hugging_face import export_run, open_directory
from colossus.generate import load_model
from colossus.observe.run_directory import RunDirectory

from .hugging_face_models import make_run, model, read_all, weights
from .hugging_face_processes import _peak_growth, _warm_up, in_process, make_large_run
from .layouts import SPLITS, save_split
from .states import assert_same

LARGEST_PARAMETER_BYTES = 4 * 1024 * 1024 * 4


def split_run(run: RunDirectory, split: str, num_ranks: int) -> RunDirectory:
    """The same run, as if so many ranks had written its checkpoint."""
    loaded, _ = load_newest(run.checkpoints_path)
    state = {name: tensor.clone() for name, tensor in loaded.tensors.items()}
    shutil.rmtree(run.checkpoints_path)
    path = save_split(
        run.checkpoints_path,
        loaded.step,
        state,
        SPLITS[split],
        num_ranks,
        facts=loaded.facts,
        model=loaded.model,
    )
    assert len(list(path.glob("model-*.safetensors"))) > 1
    return run


@pytest.mark.parametrize(("kind", "split"), [("llama", "both"), ("mixtral", "second dim"), ("gpt_oss", "rows"),
                                             ("deepseek", "staggered"), ("gpt2", "columns")])  # fmt: skip
def test_exports_are_the_same_files(kind: str, split: str, tmp_path: Path) -> None:
    spec = model(kind)
    one = make_run(tmp_path / "one", spec, weights(spec))
    many = split_run(make_run(tmp_path / "many", spec, weights(spec)), split, 4)
    for name, run in (("one-out", one), ("many-out", many)):
        export_run(run, tmp_path / name, max_shard_bytes=30_000)
    names = sorted(path.name for path in (tmp_path / "one-out").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "many-out").iterdir())
    for name in names:
        if name != "README.md":  # it has the run's place and time
            assert (tmp_path / "one-out" / name).read_bytes() == (tmp_path / "many-out" / name).read_bytes()
    assert_same(read_all(open_directory(tmp_path / "many-out")), weights(spec))


def test_generation_and_evaluation_load_it(tmp_path: Path) -> None:
    spec = model("mixtral")
    run = split_run(make_run(tmp_path, spec, weights(spec)), "both", 4)
    loaded = load_model(str(run.path)).model
    values = {name: parameter.detach() for name, parameter in loaded.named_parameters()}
    assert_same(values, {name: weights(spec)[name] for name in values})


def test_an_export_holds_one_tensor(tmp_path: Path) -> None:
    (num_bytes,) = in_process(make_large_run, tmp_path)
    split_run(RunDirectory.open(tmp_path / "large-001"), "second dim", 4)
    (growth,) = in_process(export_of_many_measured, tmp_path)
    assert growth < 4 * LARGEST_PARAMETER_BYTES < num_bytes / 3


def export_of_many_measured(said: Connection, folder: Path) -> None:
    run = RunDirectory.open(folder / "large-001")
    split_run(_warm_up(folder / "warm"), "second dim", 4)
    export_run(RunDirectory.open(folder / "warm/small/mixtral-001"), folder / "warm/out")
    said.send(_peak_growth(lambda: export_run(run, folder / "out")))


def test_one_expert_of_a_stack(tmp_path: Path) -> None:
    stack = torch.randn(5, 3, 4)
    save(tmp_path / "one", 1, {"model.experts": stack}, {})
    for split in ("rows", "second dim", "staggered"):
        save_split(tmp_path / split, 1, {"model.experts": stack}, SPLITS[split], 4)
    for directory in tmp_path.iterdir():
        loaded, _ = load_newest(directory)
        for i in range(5):
            assert_same({"x": loaded.one_of("model.experts", i)}, {"x": stack[i]})
