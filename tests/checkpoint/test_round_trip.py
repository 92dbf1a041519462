"""What is loaded is what was saved, bit for bit."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from colossus.checkpoint import list_checkpoints, load, load_newest, save, verify
from colossus.checkpoint.manifest import Manifest, Piece, TensorEntry, read_manifest
from colossus.checkpoint.payload import DTYPES
from colossus.errors import CheckpointError
from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec

from .states import assert_same, raw, state

SPEC = ModelSpec(
    name="small",
    vocab_size=32,
    context_tokens=16,
    num_layers=1,
    hidden_size=8,
    attention=AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=4),
    mlp=MlpSpec(intermediate_size=16),
)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bits that the dtype allows, NaN payloads among them."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = math.prod(shape) * dtype.itemsize
    high = 2 if dtype is torch.bool else 256
    data = torch.randint(0, high, (num_bytes,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).view(shape) if num_bytes else torch.empty(shape, dtype=dtype)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    tensor = random_tensor(draw(st.sampled_from(list(DTYPES))), shape, draw(st.integers(0, 10**6)))
    match draw(st.sampled_from(["plain", "transposed", "strided", "expanded", "offset"])):
        case "transposed" if tensor.ndim > 1:
            return tensor.transpose(0, -1)
        case "strided" if tensor.ndim:
            return tensor[::2]
        case "expanded":
            return tensor.unsqueeze(0).expand(3, *shape)
        case "offset" if tensor.ndim:
            return tensor[1:]
    return tensor


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text("abc.0", min_size=1, max_size=8), tensors(), max_size=6))
def test_any_dtype_shape_and_stride(saved: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = save(directory, 7, saved, {}).path
        assert_same(load(path).tensors, saved)
        assert verify(path) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = {
        "a.matrix": random_tensor(dtype, (17, 5), 1),
        "a.scalar": random_tensor(dtype, (), 2),
        "a.empty": random_tensor(dtype, (0, 3), 3),
        "b.transposed": random_tensor(dtype, (4, 6), 4).t(),
    }
    assert_same(load(save(tmp_path, 0, saved, {}).path).tensors, saved)


@pytest.mark.parametrize("size", [1, 2])
def test_one_element_or_none_with_a_stride(tmp_path: Path, size: int) -> None:
    saved = {"a": torch.arange(size)[::2], "b": torch.randn(size, 0)[::2], "c": torch.randn(2)[1:][::2]}
    assert_same(load(save(tmp_path, 0, saved, {}).path).tensors, saved)


def test_more_than_a_chunk(tmp_path: Path) -> None:
    saved = {"a.x": torch.randn(3_000_017), "a.y": torch.arange(5, dtype=torch.int8), "a.z": torch.randn(999)}
    assert_same(load(save(tmp_path, 0, saved, {}).path).tensors, saved)


def test_tied_weights_and_overlapping_views(tmp_path: Path) -> None:
    storage = torch.randn(100)
    saved = {
        "model.a": storage.view(10, 10),
        "model.b": storage.view(10, 10),
        "model.c": storage[5:50].view(5, 9),
    }
    loaded = load(save(tmp_path, 0, saved, {}).path).tensors
    assert_same(loaded, saved)
    loaded["model.a"].zero_()  # what is loaded may be written to, and is nobody else's
    assert raw(loaded["model.b"]) == raw(saved["model.b"])


def test_writing_to_what_was_loaded_leaves_the_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 0, state(0), {}).path
    for tensor in load(path).tensors.values():
        tensor.zero_()
    assert verify(path) == []


def test_parameters_that_need_gradients(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    assert_same(load(save(tmp_path, 0, {"p": parameter}, {}).path).tensors, {"p": parameter.detach()})


def test_facts_step_model_and_size(tmp_path: Path) -> None:
    facts = {"tokens": 12, "nested": {"list": [1, 2.5, None, "ü"]}, "loss": float("inf")}
    saved = save(tmp_path / "new" / "checkpoints", 1200, state(1), facts, model=SPEC)
    assert saved.path == tmp_path / "new" / "checkpoints" / "step-00001200"
    assert saved.num_bytes == sum(file.stat().st_size for file in saved.path.iterdir())
    loaded = load(saved.path)
    assert (loaded.step, loaded.facts, loaded.model) == (1200, facts, SPEC)


def test_other_readers_of_safetensors(tmp_path: Path) -> None:
    path = save(tmp_path, 3, state(3), {}).path
    for payload in path.glob("*.safetensors"):
        for name, tensor in load_file(payload).items():
            assert raw(tensor) == raw(state(3)[name])
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["tensors"]) == set(state(3))


def test_prefix_reads_only_what_it_names(tmp_path: Path) -> None:
    path = save(tmp_path, 3, state(3), {}).path
    (path / "optimizer-00000.safetensors").unlink()
    loaded = load(path, prefix="model.").tensors
    assert_same(loaded, {name: t for name, t in state(3).items() if name.startswith("model.")})
    with pytest.raises(
        CheckpointError, match=r"no tensor whose name starts with 'models\.'.*model, optimizer, rng"
    ):
        load(path, prefix="models.")


def test_a_tensor_in_pieces_of_several_ranks(tmp_path: Path) -> None:
    """What ranks will write when they hold shards loads already."""
    whole = torch.randn(6, 4)
    path = save(tmp_path, 0, {"a.left": whole[:, :1], "b.right": whole[:, 1:]}, {}).path
    manifest = read_manifest(path)
    left, right = manifest.tensors["a.left"].pieces[0], manifest.tensors["b.right"].pieces[0]

    def moved(piece: Piece, offsets: tuple[int, ...]) -> Piece:
        return Piece(offsets, piece.shape, piece.payload, piece.start, piece.num_bytes, piece.xxh3_128)

    pieces = (moved(left, (0, 0)), moved(right, (0, 1)))
    entry = TensorEntry(torch.float32, (6, 4), pieces)
    sharded = Manifest(0, None, None, {}, manifest.payloads, {"model.w": entry})
    (path / "manifest.json").write_bytes(sharded.encode())
    assert_same(load(path).tensors, {"model.w": whole})


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        save(tmp_path, 5, state(seed), {"seed": seed})
    assert [c.path.name for c in list_checkpoints(tmp_path)] == ["step-00000005"]
    loaded, rejected = load_newest(tmp_path)
    assert loaded.facts == {"seed": 3}
    assert rejected == ()
    assert_same(loaded.tensors, state(3))


def test_what_was_loaded_outlives_its_checkpoint(tmp_path: Path) -> None:
    loaded = load(save(tmp_path, 5, state(1), {}).path)
    save(tmp_path, 5, state(2), {})
    assert_same(loaded.tensors, state(1))


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(2, dtype=torch.complex128), torch.zeros(2, device="meta"), torch.eye(2).to_sparse()],
    ids=["dtype", "meta", "sparse"],
)
def test_what_cannot_be_held_is_named(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"model\.odd"):
        save(tmp_path, 0, {"model.odd": tensor}, {})
    assert list(tmp_path.iterdir()) == []


def test_facts_that_json_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save(tmp_path, 0, state(0), {"when": object()})
    assert list(tmp_path.iterdir()) == []


class TestExpect:
    def saved(self, directory: Path) -> Path:
        weights = {f"model.{p.name}": torch.zeros(p.shape) for p in SPEC.parameters()}
        return save(directory, 9, weights | {"optimizer.x": torch.zeros(3)}, {}, model=SPEC).path

    def test_the_same_model_in_every_way_to_say_it(self, tmp_path: Path) -> None:
        path = self.saved(tmp_path)
        renamed = SPEC.model_copy(update={"name": "another name"})
        shapes = {p.name: p.shape for p in SPEC.parameters()}
        for expect in (None, SPEC, renamed, SPEC.parameters(), shapes, SPEC.fingerprint()):
            assert load(path, expect=expect).step == 9

    def test_other_shapes(self, tmp_path: Path) -> None:
        wider = SPEC.model_copy(update={"hidden_size": 16, "num_layers": 2})
        with pytest.raises(CheckpointError) as caught:
            load(self.saved(tmp_path), expect=wider)
        message = str(caught.value)
        assert "embedding.weight is [32, 16] in the model and [32, 8] in the checkpoint" in message
        assert "21 differences" in message
        assert "and 17 more" in message

    def test_missing_and_extra_parameters(self, tmp_path: Path) -> None:
        shapes = {p.name: p.shape for p in SPEC.parameters() if p.name != "head.weight"} | {"bias": (3,)}
        with pytest.raises(
            CheckpointError, match=r"bias \[3\] is not in the checkpoint; head.weight .* not in the model"
        ):
            load(self.saved(tmp_path), expect=shapes)

    def test_equal_shapes_of_another_model(self, tmp_path: Path) -> None:
        heads = SPEC.model_copy(update={"attention": AttentionSpec(num_heads=4, num_kv_heads=4, head_dim=2)})
        path = self.saved(tmp_path)
        with pytest.raises(
            CheckpointError, match=r"attention.num_heads is 4 in the model and 2 in the checkpoint"
        ):
            load(path, expect=heads)
        assert load(path, expect=heads.parameters()).step == 9  # who asks only for shapes gets it

    def test_another_fingerprint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="fingerprint 0123456789abcdef is expected"):
            load(self.saved(tmp_path), expect="0123456789abcdef")

    def test_no_older_one_is_taken_instead(self, tmp_path: Path) -> None:
        self.saved(tmp_path)
        save(tmp_path, 10, {"model.other": torch.zeros(1)}, {})
        with pytest.raises(CheckpointError, match="step-00000010: it is of another model"):
            load_newest(tmp_path, expect=SPEC)
