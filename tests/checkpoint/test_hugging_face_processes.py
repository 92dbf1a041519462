"""Memory that does not grow with the model, and a kill -9 at any moment."""

from pathlib import Path

import pytest

from colossus.checkpoint import load
from colossus.checkpoint.hugging_face import open_directory, write_directory

from .hugging_face_models import model, read_all, weights
from .hugging_face_processes import (
    export_and_die,
    export_measured,
    import_measured,
    in_process,
    make_large_run,
)
from .states import assert_same

SHARD_BYTES = 50_000_000
LARGEST_PARAMETER_BYTES = 4 * 1024 * 1024 * 4
BUFFER_BYTES = 8 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large")
    (num_bytes,) = in_process(make_large_run, path)
    assert num_bytes > 260_000_000
    return path


@pytest.mark.parametrize(
    ("max_shard_bytes", "dtype"), [(SHARD_BYTES, "float32"), (10**10, "float32"), (10**10, "bfloat16")]
)
def test_writing_holds_one_tensor_however_large_the_shard(
    max_shard_bytes: int, dtype: str, folder: Path
) -> None:
    (growth,) = in_process(export_measured, folder, max_shard_bytes, dtype)
    assert growth < 1.5 * SHARD_BYTES
    # One tensor as our checkpoint has it and once more as it is stored, the writer's buffer, and what torch keeps.
    assert growth < 2 * LARGEST_PARAMETER_BYTES + BUFFER_BYTES + 8e6


def test_importing_holds_one_parameter(folder: Path) -> None:
    directory = folder / f"out-{SHARD_BYTES}-float32"
    if not directory.exists():
        in_process(export_measured, folder, SHARD_BYTES, "float32")
    (growth,) = in_process(import_measured, folder, directory)
    assert growth < 1.5 * SHARD_BYTES
    assert growth < 2 * LARGEST_PARAMETER_BYTES + BUFFER_BYTES + 8e6
    first = load(folder / "large-001/checkpoints/step-00000007", prefix="model.")
    assert_same(load(folder / "imported-001/checkpoints/step-00000000").tensors, first.tensors)


def test_a_kill_leaves_all_of_a_directory_or_none(tmp_path: Path) -> None:
    spec = model("llama")
    kills = 0
    for fatal_call in range(1, 200, 3):
        path = tmp_path / str(fatal_call) / "out"
        path.parent.mkdir()
        finished = in_process(export_and_die, path, fatal_call)
        if path.exists():
            assert_same(read_all(open_directory(path)), weights(spec))
        if finished:
            break
        kills += 1
        if not path.exists():
            write_directory(spec, weights(spec).__getitem__, path)  # goes as if nothing had been
        assert [one.name for one in path.parent.iterdir()] == ["out"]
    assert finished
    assert kills > 5
