"""What any number of ranks wrote, under any layout, is what any other number finds under any other."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from colossus.checkpoint import (
    Box,
    Shard,
    list_checkpoints,
    load,
    load_newest,
    load_newest_shards,
    load_shards,
    retire,
    save,
    save_shards,
    verify,
)
from colossus.checkpoint.load_shards import parts_to_read, touched_chunks
from colossus.checkpoint.manifest import read_header
from colossus.checkpoint.payload import HASHED_BYTES
from colossus.errors import CheckpointError
from colossus.spec.run import Checkpoints

from .hugging_face_processes import in_process
from .layouts import (
    SPLITS,
    ThreadRanks,
    along,
    assert_boxes,
    assert_loads_as,
    on_threads,
    save_split,
    shards,
    wanted,
    whole_state,
)
from .rank_processes import load_parts_measured
from .states import assert_same, leftovers

STATE = whole_state(3)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("split", SPLITS)
def test_every_layout_loads_under_every_other(split: str, num_ranks: int, tmp_path: Path) -> None:
    path = save_split(tmp_path, 3, STATE, SPLITS[split], num_ranks, facts={"tokens": 5})
    assert_same(load(path).tensors, STATE)
    assert verify(path) == []
    assert load(path).facts == {"tokens": 5}
    assert leftovers(tmp_path) == []
    for other, num_readers in itertools.product(SPLITS.values(), (1, 3, 4)):
        assert_loads_as(path, STATE, other, num_readers)


def test_what_one_process_wrote_loads_in_boxes(tmp_path: Path) -> None:
    path = save(tmp_path, 3, STATE, {}).path
    assert json.loads((path / "manifest.json").read_text())["version"] == 1
    for split in SPLITS.values():
        assert_loads_as(path, STATE, split, 3)


def test_manifests_from_before_there_were_chunks(tmp_path: Path) -> None:
    path = save(tmp_path, 3, STATE, {}).path
    record = json.loads((path / "manifest.json").read_text())
    del record["chunks"], record["xxh3_128"]
    reseal(path / "manifest.json", json.dumps(record)[:-1].encode())
    assert_same(load(path).tensors, STATE)
    assert_loads_as(path, STATE, SPLITS["both"], 4)
    flip(path / "model-00000.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"model-00000\.safetensors is damaged"):
        assert_loads_as(path, STATE, SPLITS["both"], 4)


def reseal(file: Path, body: bytes) -> None:
    from colossus.checkpoint.pieces import sealed

    file.write_bytes(sealed(body))


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 16
    file.write_bytes(data)


def test_only_parts_that_are_needed_are_read(tmp_path: Path) -> None:
    path = save_split(tmp_path, 3, STATE, along(0), 4)
    index = read_header(path)
    for rank in range(4):
        needed = parts_to_read(index, wanted(STATE, along(0), rank, 4))
        assert set(needed) - {0} <= {rank}  # rank 0 has the scalar
    boxes = {"model.big": Box((301, 2100), (160, 0), (100, 2100), torch.float32)}
    assert set(parts_to_read(index, boxes)) == {2, 3}
    for rank in (0, 1):
        for file in path.glob(f"*-0000{rank}.*"):
            file.unlink()
    assert_boxes(load_shards(path, boxes).tensors, STATE, boxes)


def test_a_flipped_bit_is_noticed_where_it_is_read_and_nowhere_else(tmp_path: Path) -> None:
    state = {"model.big": torch.randn(1024, 1024)}  # four chunks of 256 rows
    path = save_split(tmp_path, 3, state, along(0), 1)
    flip(path / "model-00000.safetensors", -1 - HASHED_BYTES)  # in the last row of the third
    rows = {"model.big": Box((1024, 1024), (0, 0), (512, 1024), torch.float32)}
    assert_boxes(load_shards(path, rows).tensors, state, rows)
    for offsets, shape in (((512, 0), (1, 1)), ((700, 1000), (100, 3)), ((0, 5), (1024, 1))):
        with pytest.raises(CheckpointError, match=r"model\.big in model-00000\.safetensors is damaged"):
            load_shards(path, {"model.big": Box((1024, 1024), offsets, shape, torch.float32)})


def test_chunks_that_a_box_touches_against_counting() -> None:
    chance = random.Random(1)
    for _ in range(300):
        shape = tuple(chance.randint(1, 7) for _ in range(chance.randint(0, 4)))
        offsets = tuple(chance.randrange(size) for size in shape)
        lengths = tuple(chance.randint(1, size - start) for size, start in zip(shape, offsets, strict=True))
        item_bytes, chunk_bytes = chance.choice([1, 2, 8]), chance.choice([3, 8, 16, 50, 10_000])
        places = torch.arange(torch.Size(shape).numel()).view(shape)
        taken = places[tuple(slice(a, a + n) for a, n in zip(offsets, lengths, strict=True))].flatten()
        touched = {int(i) * item_bytes + b for i in taken for b in range(item_bytes)}
        expected = sorted({byte // chunk_bytes for byte in touched})
        assert touched_chunks(shape, offsets, lengths, item_bytes, chunk_bytes) == expected


@pytest.mark.parametrize(("split", "stride"), [("both", 5), ("staggered", 3)])
def test_one_flipped_bit_in_any_file(split: str, stride: int, tmp_path: Path) -> None:
    state = {"model.w": torch.randn(5, 6), "optimizer.step": torch.tensor(4)}
    path = save_split(tmp_path, 3, state, SPLITS[split], 3)
    names = sorted(file.name for file in path.iterdir())
    assert [name for name in names if name.endswith("json")] == [
        "manifest.json",
        *(f"part-0000{rank}.json" for rank in range(3)),
    ]
    for file in path.iterdir():
        original = file.read_bytes()
        for position in range(0, len(original), stride if file.suffix == ".json" else 97):
            data = bytearray(original)
            data[position] ^= 1 << (position % 8)
            file.write_bytes(data)
            with pytest.raises(CheckpointError, match=file.name):
                load(path)
        file.write_bytes(original)
    assert_same(load(path).tensors, state)


def test_missing_files(tmp_path: Path) -> None:
    path = save_split(tmp_path, 3, STATE, along(0), 3)
    for name in ("part-00001.json", "model-00002.safetensors", "manifest.json"):
        data = (path / name).read_bytes()
        (path / name).unlink()
        for read in (lambda: load(path), lambda: assert_loads_as(path, STATE, along(-1), 2)):
            with pytest.raises(CheckpointError, match=f"{name} is missing"):
                read()
        assert f"{name} is missing" in verify(path)[0]
        (path / name).write_bytes(data)
    other = save_split(tmp_path, 4, STATE, along(0), 3)
    (path / "part-00001.json").write_bytes((other / "part-00001.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"part-00001\.json is damaged"):
        load(path)


def shard(shape: tuple[int, ...], offsets: tuple[int, ...], *size: int) -> Shard:
    return Shard(shape, offsets, torch.zeros(size))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([shard((6, 4), (0, 0), 3, 4), shard((6, 4), (2, 0), 4, 4)], r"rank 0.*and .*rank 1.*overlap"),
        ([shard((6, 4), (0, 0), 3, 4), shard((6, 4), (0, 0), 3, 4)], r"overlap"),
        ([shard((6, 4), (0, 0), 6, 4), shard((6, 4), (5, 3), 1, 1)], r"overlap"),
        ([shard((6, 4), (0, 0), 3, 4), shard((6, 4), (4, 0), 2, 4)], r"have 20 of its 24 elements"),
        ([shard((6, 4), (0, 0), 6, 3), shard((6, 4), (0, 0), 0, 0)], r"have 18 of its 24 elements"),
        # As many elements as there should be, and yet a gap: only the overlap tells.
        ([shard((4, 4), (0, 0), 2, 4), shard((4, 4), (1, 0), 2, 4)], r"overlap"),
        ([shard((6, 4), (0, 0), 6, 4), shard((6, 5), (0, 0), 0, 0)], r"all ranks must mean one tensor"),
        ([shard((), ()), shard((), ())], r"overlap"),
        ([shard((4,), (0,), 0), shard((4,), (4,), 0)], r"have 0 of its 4 elements"),
    ],
)
def test_boxes_that_do_not_make_up_a_tensor(boxes: list[Shard], message: str, tmp_path: Path) -> None:
    save_split(tmp_path, 2, STATE, along(0), 2)

    def attempt(ranks: ThreadRanks) -> Any:
        good = shards(STATE, along(0), ranks.rank, 2)
        return save_shards(tmp_path, 3, {**good, "model.wrong": boxes[ranks.rank]}, {}, ranks, timeout_s=20)

    errors = on_threads(2, attempt)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert len({str(error) for error in errors}) == 1  # all ranks know why
    with pytest.raises(CheckpointError, match=message) as caught:
        raise errors[0]
    assert "model.wrong" in str(caught.value)
    assert [c.step for c in list_checkpoints(tmp_path)] == [2]
    save_split(tmp_path, 4, STATE, along(0), 2)
    assert leftovers(tmp_path) == []


def test_boxes_outside() -> None:
    with pytest.raises(
        CheckpointError, match=r"a box of \[3, 4\] at \[4, 0\] goes beyond a tensor of \[6, 4\]"
    ):
        shard((6, 4), (4, 0), 3, 4)
    with pytest.raises(CheckpointError, match="one offset and one length"):
        shard((6, 4), (0,), 3, 4)


def test_random_tilings(tmp_path: Path) -> None:
    """Cut a tensor at random, again and again: mostly no grid. Moving one box by one is always refused."""
    chance = random.Random(5)
    for trial in range(15):
        shape = (chance.randint(5, 12), chance.randint(5, 12), chance.randint(1, 3))
        boxes = [((0, 0, 0), shape)]
        while len(boxes) < 6:
            offsets, size = boxes.pop(chance.randrange(len(boxes)))
            dim = max(range(3), key=lambda d: (size[d] > 1, chance.random()))
            if size[dim] < 2:
                boxes.append((offsets, size))
                continue
            at = chance.randrange(1, size[dim])
            first = (*size[:dim], at, *size[dim + 1 :])
            second = (*size[:dim], size[dim] - at, *size[dim + 1 :])
            boxes.append((offsets, first))
            boxes.append(((*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :]), second))
        whole = torch.randn(shape)
        tiles = [
            Shard(shape, offsets, whole[tuple(slice(a, a + n) for a, n in zip(offsets, size, strict=True))])
            for offsets, size in boxes
        ]

        def save_tiles(ranks: ThreadRanks, tiles: list[Shard] = tiles, trial: int = trial) -> Any:
            return save_shards(tmp_path, trial, {"model.w": tiles[ranks.rank]}, {}, ranks, timeout_s=20)

        path = on_threads(6, save_tiles)[3].path
        assert_same(load(path).tensors, {"model.w": whole})
        for split in (SPLITS["both"], SPLITS["staggered"]):
            assert_loads_as(path, {"model.w": whole}, split, 4)
        i = chance.randrange(6)
        moved = [
            (*tiles[i].offsets[:dim], tiles[i].offsets[dim] + by, *tiles[i].offsets[dim + 1 :])
            for dim in range(2)
            for by in (-1, 1)
        ]
        fitting = [
            offsets
            for offsets in moved
            if all(
                a >= 0 and a + n <= size
                for a, n, size in zip(offsets, tiles[i].tensor.shape, shape, strict=True)
            )
        ]
        if fitting:
            tiles[i] = Shard(shape, chance.choice(fitting), tiles[i].tensor)
            errors = on_threads(6, save_tiles)
            assert all("overlap" in str(error) for error in errors)


def test_what_is_wanted_and_not_there(tmp_path: Path) -> None:
    path = save_split(tmp_path, 3, STATE, along(0), 2)
    big = Box((301, 2100), (0, 0), (3, 3), torch.float32)
    with pytest.raises(CheckpointError, match=r"it has no tensor model\.other"):
        load_shards(path, {"model.big": big, "model.other": big})
    found = load_shards(path, {"model.big": big, "ema.big": big}, optional=("ema.",)).tensors
    assert list(found) == ["model.big"]
    for wrong in (
        Box((301, 2100), (0, 0), (3, 3), torch.bfloat16),
        Box((301, 2101), (0, 0), (3, 3), torch.float32),
    ):
        with pytest.raises(CheckpointError, match=r"model\.big is torch\.float32 \[301, 2100\] in it"):
            load_shards(path, {"model.big": wrong})


def test_all_ranks_take_the_newest_that_is_good_for_all(tmp_path: Path) -> None:
    states = {step: whole_state(step) for step in (1, 2, 3)}
    for step, state in states.items():
        save_split(tmp_path, step, state, along(0), 4)
    flip(tmp_path / "step-00000003/model-00002.safetensors", -1)  # rank 2 alone would notice
    (tmp_path / "step-00000002/part-00003.json").unlink()

    def loaded(ranks: ThreadRanks) -> Any:
        boxes = wanted(STATE, along(0), ranks.rank, 4)
        boxes = {name: box for name, box in boxes.items() if box.global_shape}
        result, rejected = load_newest_shards(tmp_path, boxes, ranks)
        assert_boxes(result.tensors, states[result.step], boxes)
        return result.step, [one.reason for one in rejected]

    results = on_threads(4, loaded)
    assert results[0][0] == 1
    assert all(result == results[0] for result in results)
    damaged, missing = results[0][1]
    assert damaged.startswith("rank 2: tensor model.")
    assert "model-00002.safetensors is damaged" in damaged
    assert missing.startswith("rank 3: part-00003.json is missing")
    flip(tmp_path / "step-00000001/part-00000.json", 50)
    errors = on_threads(4, loaded)
    assert all("none of the 3 checkpoints" in str(error) for error in errors)
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        load_newest(tmp_path)


def test_one_rank_that_wants_another_model_stops_all(tmp_path: Path) -> None:
    save_split(tmp_path, 1, STATE, along(0), 2)

    def loaded(ranks: ThreadRanks) -> Any:
        shape = (301, 2100 + ranks.rank)
        return load_newest_shards(tmp_path, {"model.big": Box.whole(shape, torch.float32)}, ranks)

    errors = on_threads(2, loaded)
    assert all("rank 1: " in str(error) and "is wanted" in str(error) for error in errors)


def test_one_rank_without_memory_stops_all(tmp_path: Path) -> None:
    save_split(tmp_path, 1, STATE, along(0), 2)

    def loaded(ranks: ThreadRanks) -> Any:
        boxes = wanted(STATE, along(0), ranks.rank, 2)
        return load_newest_shards(tmp_path, Unlucky(boxes) if ranks.rank else boxes, ranks)

    zeroth, first = on_threads(2, loaded)
    assert isinstance(zeroth, CheckpointError)
    assert "rank 1: " in str(zeroth)
    assert "MemoryError: too little" in str(zeroth)
    assert isinstance(first, MemoryError)


class Unlucky(dict[str, Box]):
    def __iter__(self) -> Any:
        raise MemoryError("too little")


def test_a_part_of_a_large_tensor_takes_memory_for_that_part(tmp_path: Path) -> None:
    (growths,) = in_process(load_parts_measured, tmp_path)
    assert all(growth < 24 << 20 for growth in growths.values()), growths  # of 64 MiB


def test_retention_passes_over_one_with_a_missing_part(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_split(tmp_path, step, STATE, along(0), 3)
    (tmp_path / "step-00000002/part-00001.json").unlink()
    assert retire(tmp_path, 3, Checkpoints(keep_last=2)) == []
    (tmp_path / "step-00000001/optimizer-00002.safetensors").unlink()
    save_split(tmp_path, 4, STATE, along(0), 3)
    assert retire(tmp_path, 4, Checkpoints(keep_last=2)) == [1, 2]


def test_a_rank_that_cannot_write_is_named_at_once(tmp_path: Path) -> None:
    def attempt(ranks: ThreadRanks) -> Any:
        held: dict[str, Tensor | Shard] = dict(shards(STATE, along(0), ranks.rank, 3))
        if ranks.rank == 1:
            held["model.sparse"] = torch.eye(3).to_sparse()
        return save_shards(tmp_path, 3, held, {}, ranks, timeout_s=60)

    zeroth, first, second = on_threads(3, attempt)
    assert "model.sparse is not a plain tensor" in str(first)
    assert str(zeroth) == str(second)
    assert "rank 1 could not write its part: model.sparse is not a plain tensor" in str(zeroth)
    assert list_checkpoints(tmp_path) == []


def test_facts_that_json_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="set"):
        save_split(tmp_path, 3, STATE, along(0), 2, facts={"it": {1, 2}})
    assert list_checkpoints(tmp_path) == []


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    for seed in (1, 2):
        path = save_split(tmp_path, 5, whole_state(seed), SPLITS["both"], 2 * seed)
    assert [c.path.name for c in list_checkpoints(tmp_path)] == ["step-00000005"]
    assert_same(load(path).tensors, whole_state(2))


def test_ranks_with_nothing_or_only_a_scalar(tmp_path: Path) -> None:
    held: list[dict[str, Tensor | Shard]] = [
        {},
        {"optimizer.step": torch.tensor(7)},
        {"model.w": torch.arange(6.0).view(2, 3)},
    ]
    results = on_threads(3, lambda ranks: save_shards(tmp_path, 1, held[ranks.rank], {}, ranks, timeout_s=20))
    path = results[0].path
    assert_same(dict(load(path).tensors), {"optimizer.step": torch.tensor(7), "model.w": held[2]["model.w"]})
    assert load_shards(path, {}).tensors == {}
    assert [result.num_bytes > 0 for result in results] == [True, True, True]


def test_a_group_of_no_tensors(tmp_path: Path) -> None:
    path = on_threads(2, lambda ranks: save_shards(tmp_path, 1, {}, {"a": 1}, ranks, timeout_s=20))[0].path
    assert (dict(load(path).tensors), load(path).facts, verify(path)) == ({}, {"a": 1}, [])
