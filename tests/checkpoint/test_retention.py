"""What stays when a new checkpoint is on the disk."""

from pathlib import Path

import pytest
import torch

from colossus.checkpoint import list_checkpoints, load_newest, retire, save
from colossus.spec.run import Checkpoints

from .states import leftovers


def make(directory: Path, *steps: int) -> None:
    for step in steps:
        save(directory, step, {"x": torch.tensor(step)}, {})


def steps(directory: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(directory)]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Checkpoints(keep_last=1), [50]),
        (Checkpoints(keep_last=2), [40, 50]),
        (Checkpoints(keep_last=9), [10, 20, 30, 40, 50]),
        (Checkpoints(keep_last=1, keep_every_steps=20), [20, 40, 50]),
        (Checkpoints(keep_last=2, keep_every_steps=30), [30, 40, 50]),
    ],
)
def test_last_n_and_every_m(tmp_path: Path, keep: Checkpoints, left: list[int]) -> None:
    make(tmp_path, 10, 20, 30, 40, 50)
    retired = retire(tmp_path, 50, keep)
    assert steps(tmp_path) == left
    assert retired == [step for step in (10, 20, 30, 40, 50) if step not in left]
    assert leftovers(tmp_path) == []


def test_after_going_back_the_new_course_is_kept_and_the_old_goes_when_passed(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 90)
    make(tmp_path, 25)
    retire(tmp_path, 25, Checkpoints(keep_last=1))
    assert steps(tmp_path) == [25, 90]
    make(tmp_path, 95)
    retire(tmp_path, 95, Checkpoints(keep_last=1))
    assert steps(tmp_path) == [95]


def test_a_damaged_one_pushes_out_no_good_one(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30)
    (tmp_path / "step-00000020" / "other-00000.safetensors").unlink()
    retire(tmp_path, 30, Checkpoints(keep_last=2))
    assert steps(tmp_path) == [10, 20, 30]
    (tmp_path / "step-00000030" / "manifest.json").unlink()
    assert load_newest(tmp_path)[0].step == 10
    make(tmp_path, 40, 50)
    retire(tmp_path, 50, Checkpoints(keep_last=2))
    assert steps(tmp_path) == [40, 50]


def test_what_cannot_be_deleted_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 10, 20)

    def refuse(*_: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(Path, "rename", refuse)
    retire(tmp_path, 20, Checkpoints(keep_last=1))
    assert steps(tmp_path) == [10, 20]
