"""The Saver of many ranks: what changes from save to save, and what goes wrong on one of them."""

import contextlib
import importlib
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from colossus.checkpoint import Saved, SaveFailed, Saver, list_checkpoints, load
from colossus.checkpoint.manifest import read_header
from colossus.checkpoint.tiling import place
from colossus.spec.run import Checkpoints

from .layouts import SPLITS, ThreadRanks, assert_loads_as, on_threads, shards, whole_state
from .states import assert_same, leftovers

# The package's attribute of this name is the function.
save_shards_module = importlib.import_module("colossus.checkpoint.save_shards")


def test_boxes_may_change_from_save_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    monkeypatch.setattr(save_shards_module, "place", lambda parts: planned.append(1) or place(parts))
    order = ["rows", "rows", "both", "staggered", "staggered", "rows"]

    def run(ranks: ThreadRanks) -> Any:
        saver = Saver(tmp_path, keep=Checkpoints(keep_last=10), ranks=ranks, timeout_s=20)
        for step, split in enumerate(order):
            saver.save(step, shards(whole_state(step), SPLITS[split], ranks.rank, 4), {})
        return saver.wait()

    for results in on_threads(4, run):
        assert [type(result) for result in results] == [Saved] * len(order), results
    for step in range(len(order)):
        assert_same(load(tmp_path / f"step-{step:08d}").tensors, whole_state(step))
        assert_loads_as(tmp_path / f"step-{step:08d}", whole_state(step), SPLITS["columns"], 3)
    assert len(planned) == 4  # not again for the second of two that are alike
    same = [read_header(tmp_path / f"step-{step:08d}").parts[1].xxh3_128 for step in (0, 1)]
    assert same[0] != same[1]


def test_a_rank_that_cannot_copy_its_state_is_named_and_the_next_save_is_good(tmp_path: Path) -> None:
    def run(ranks: ThreadRanks) -> Any:
        saver = Saver(tmp_path, ranks=ranks, timeout_s=60)
        for step in (1, 2, 3):
            held = shards(whole_state(step), SPLITS["rows"], ranks.rank, 3)
            if (step, ranks.rank) == (2, 1):
                held["model.sparse"] = torch.eye(3).to_sparse()
            saver.save(step, held, {"step": step} if ranks.rank == 0 else {})
        return saver.wait()

    results = on_threads(3, run)
    for found in results:
        assert [type(result) for result in found] == [Saved, SaveFailed, Saved]
    assert results[0][1] == results[2][1]
    assert results[0][1].reason.startswith(
        "rank 1 could not write its part: model.sparse is not a plain tensor"
    )
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [1, 3]
    assert load(tmp_path / "step-00000003").facts == {"step": 3}
    assert leftovers(tmp_path) == []


def test_facts_that_json_cannot_say_on_rank_0(tmp_path: Path) -> None:
    def run(ranks: ThreadRanks) -> Any:
        saver = Saver(tmp_path, ranks=ranks, timeout_s=60)
        saver.save(1, shards(whole_state(1), SPLITS["rows"], ranks.rank, 2), {"it": {1}})
        return saver.wait()

    for (failed,) in on_threads(2, run):
        assert isinstance(failed, SaveFailed)
        assert "set is not JSON serializable" in failed.reason
    assert list_checkpoints(tmp_path) == []


def test_one_who_leaves_with_an_error_does_not_wait_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_shards_module, "_LEAVING_S", 0.1)

    def run(ranks: ThreadRanks) -> Any:
        with contextlib.suppress(ConnectionError), Saver(tmp_path, ranks=ranks, timeout_s=10_000) as saver:
            if ranks.rank != 1:
                saver.save(1, shards(whole_state(1), SPLITS["rows"], ranks.rank, 3), {})
                time.sleep(0.2)
            raise ConnectionError("a collective failed: rank 1 is gone")
        return saver.poll()

    zeroth, first, second = on_threads(3, run)
    assert first == []
    assert "1 of 3 ranks did not write their parts" in zeroth[0].reason
    assert isinstance(second[0], SaveFailed)


def test_a_disk_that_fills_up_on_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, data: bytes) -> int:
        if path.name == "manifest.json":
            raise OSError(28, "No space left on device")
        return write(path, data)

    write = save_shards_module.write_synced
    monkeypatch.setattr(save_shards_module, "write_synced", refuse)

    def run(ranks: ThreadRanks) -> Any:
        saver = Saver(tmp_path, ranks=ranks, timeout_s=60)
        saver.save(1, shards(whole_state(1), SPLITS["rows"], ranks.rank, 2), {})
        return saver.wait()

    for (failed,) in on_threads(2, run):
        assert "No space left on device" in failed.reason
    assert list_checkpoints(tmp_path) == []
