"""Every kind of damage is noticed, named, and gone around."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import xxhash

from colossus.checkpoint import list_checkpoints, load, load_newest, save, verify
from colossus.errors import CheckpointError

from .states import assert_is_state, assert_same, state

TINY = {
    "model.weight": torch.randn(6, 7),
    "model.half": torch.randn(3).to(torch.bfloat16),
    "optimizer.step": torch.tensor(3),
    "optimizer.mask": torch.tensor([True, False, True]),
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints", 3, TINY, {"tokens": 12, "rng": list(range(20))}).path


def files(path: Path) -> list[Path]:
    return sorted(path.iterdir())


def flipped_bits(file: Path) -> Iterator[int]:
    """Flip a random bit of every byte in turn, putting the one before right again."""
    chance = random.Random(0)
    with file.open("r+b", buffering=0) as handle:
        for position in range(file.stat().st_size):
            handle.seek(position)
            original = handle.read(1)
            handle.seek(position)
            handle.write(bytes([original[0] ^ (1 << chance.randrange(8))]))
            yield position
            handle.seek(position)
            handle.write(original)


def complaint(path: Path) -> str:
    """What loading says is wrong; nothing if it loads."""
    try:
        load(path)
    except CheckpointError as error:
        return str(error)
    return ""


def test_one_flipped_bit_in_any_byte_of_any_file(tiny: Path) -> None:
    assert [file.name for file in files(tiny)] == [
        "manifest.json",
        "model-00000.safetensors",
        "optimizer-00000.safetensors",
    ]
    for file in files(tiny):
        for position in flipped_bits(file):
            if file.name not in complaint(tiny):
                pytest.fail(f"a flipped bit in byte {position} of {file.name} was not noticed")
    assert_same(load(tiny).tensors, TINY)


def test_the_damaged_tensor_is_named(tiny: Path) -> None:
    file = tiny / "model-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"tensor model\.half in model-00000\.safetensors is damaged.*older"
    ):
        load(tiny)
    assert verify(tiny) == [
        "tensor model.half in model-00000.safetensors is damaged: its bytes do not match its hash"
    ]


def test_a_file_cut_short_at_any_length_or_longer(tiny: Path) -> None:
    for file in files(tiny):
        data = file.read_bytes()
        lengths = {*range(0, len(data), 37), *range(len(data) - 70, len(data))}
        for changed in (*(data[:length] for length in sorted(lengths)), data + b"\0", data + b"\n", data * 2):
            file.write_bytes(changed)
            with pytest.raises(CheckpointError, match=file.name):
                load(tiny)
            assert verify(tiny), (file.name, len(changed))
        file.write_bytes(data)
    assert_same(load(tiny).tensors, TINY)


def test_a_file_deleted_emptied_swapped_or_replaced_by_a_directory(tiny: Path) -> None:
    for file in files(tiny):
        data = file.read_bytes()
        file.unlink()
        with pytest.raises(CheckpointError, match=rf"{file.name} is missing"):
            load(tiny)
        file.mkdir()
        with pytest.raises(CheckpointError, match=file.name):
            load(tiny)
        file.rmdir()
        file.write_bytes(bytes(len(data)))
        with pytest.raises(CheckpointError, match=file.name):
            load(tiny)
        file.write_bytes(data)
    one, other = tiny / "model-00000.safetensors", tiny / "optimizer-00000.safetensors"
    data, other_data = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_data)
    other.write_bytes(data)
    assert len(verify(tiny)) == 2


def test_tensors_of_another_checkpoint_of_the_same_shape(tmp_path: Path) -> None:
    one, other = (save(tmp_path, step, state(step), {}).path for step in (1, 2))
    shutil.copy(one / "model-00000.safetensors", other / "model-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor model\.\S+ in model-00000\.safetensors is damaged"):
        load(other)


@pytest.mark.parametrize(
    ("find", "replace"),
    [
        (b'"payload":"model-', b'"payload":"../../'),
        (b'"start":4096', b'"start":4097'),
        (b'"start":4096', b'"start":-1'),
        (b'"dtype":"float32"', b'"dtype":"no_such"'),
        (b'"shape":[6,7]', b'"shape":[6,8]'),
        (b'"payloads": {', b'"nonsense": {'),
        (b'"colossus-checkpoint"', b'"other"'),
    ],
)
def test_a_manifest_that_is_sealed_but_wrong(tiny: Path, find: bytes, replace: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json|damaged"):
        load(reseal(tiny, find, replace))


def test_a_newer_format_says_so_and_nothing_older_is_taken(tiny: Path) -> None:
    save(tiny.parent, 2, TINY, {})
    reseal(tiny, b'"version": 1', b'"version": 3')
    with pytest.raises(
        CheckpointError, match=r"format version 3, and this version of Colossus reads up to 2"
    ):
        load_newest(tiny.parent)


def reseal(path: Path, find: bytes, replace: bytes) -> Path:
    file = path / "manifest.json"
    body, mark, _ = file.read_bytes().rpartition(b',\n"xxh3_128": ')
    assert find in body
    body = body.replace(find, replace)
    file.write_bytes(body + mark + f'"{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'.encode())
    return path


def damage(path: Path) -> None:
    file = path / "optimizer-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def test_the_newest_good_one_is_used(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, state(step), {"step": step})
    damage(tmp_path / "step-00000040")
    (tmp_path / "step-00000030" / "manifest.json").unlink()
    loaded, rejected = load_newest(tmp_path)
    assert loaded.step == 20
    assert_is_state(loaded)
    assert [(one.path.name, one.reason.split(" ")[0]) for one in rejected] == [
        ("step-00000040", "optimizer-00000.safetensors"),
        ("step-00000030", "manifest.json"),
    ]


def test_none_good(tmp_path: Path) -> None:
    for step in (10, 20):
        damage(save(tmp_path, step, state(step), {}).path)
    with pytest.raises(CheckpointError) as caught:
        load_newest(tmp_path)
    message = str(caught.value)
    assert "none of the 2 checkpoints" in message
    assert message.index("step-00000020: optimizer-00000.safetensors has") < message.index("step-00000010: ")


def test_nothing_there(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "none") == []
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="there is no checkpoint in"):
            load_newest(directory)
    with pytest.raises(CheckpointError, match="There is no such directory"):
        load(tmp_path / "none")
    save(tmp_path, 4, state(4), {})
    with pytest.raises(
        CheckpointError, match=r"a directory of checkpoints; give one of them, such as .*step-00000004"
    ):
        load(tmp_path)


def test_only_checkpoints_are_listed(tmp_path: Path) -> None:
    save(tmp_path, 4, state(4), {})
    save(tmp_path, 123456789, state(4), {})
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "step-9").mkdir()
    (tmp_path / ".writing-step-00000005.host.1.1.abcd").mkdir()
    assert [c.step for c in list_checkpoints(tmp_path)] == [4, 123456789]
