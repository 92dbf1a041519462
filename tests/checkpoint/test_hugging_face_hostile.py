"""Directories that are damaged, lie, or mean harm: each is refused with a sentence, before weights are read."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from colossus.checkpoint.hugging_face import open_directory, write_directory
from colossus.checkpoint.hugging_face.header import read_header
from colossus.checkpoint.hugging_face.hub import find_directory
from colossus.errors import CheckpointError, ColossusError, ConfigError

from .hugging_face_models import model, read_all, weights

SPEC = model("llama")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    write_directory(SPEC, weights(SPEC).__getitem__, path)
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = tmp_path / "sharded"
    write_directory(SPEC, weights(SPEC).__getitem__, path, max_shard_bytes=20_000)
    return path


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def change(path: Path, **changes: Any) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**record, **changes}.items() if v is not ...}))


def refused(directory: Path, match: str, kind: type[ColossusError] = CheckpointError) -> None:
    with pytest.raises(kind, match=match):
        open_directory(directory)


# --- files that are not what they should be ---


def test_no_directory_no_config_no_weights(tmp_path: Path, directory: Path) -> None:
    refused(tmp_path / "none", "no directory", ConfigError)
    refused(tmp_path, "no config.json", ConfigError)
    (directory / "model.safetensors").unlink()
    refused(directory, "has no weights")
    (directory / "config.json").write_text("{")
    refused(directory, "not a JSON", ConfigError)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "x.pkl"])
def test_pickles_are_refused_and_never_opened(name: str, directory: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps(Bomb(mark)))
    refused(directory, rf"{name}.*can run code.*save_pretrained")
    (directory / name).rename(directory / "model.safetensors")
    refused(directory, "a pickle under the name of safetensors.*run code")
    torch.save({"x": Bomb(mark)}, directory / "model.safetensors")
    refused(directory, "a PyTorch archive under the name")
    assert not mark.exists()


@pytest.mark.parametrize("kept", [0, 5, 8, 200, 4096, 5000, -1])
def test_cut_off_files(kept: int, directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(directory, "model.safetensors is (cut off|not a good safetensors file: it is cut off)")


def test_a_file_that_shrinks_after_the_look(directory: Path) -> None:
    opened = open_directory(directory)
    os.truncate(directory / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="it has shrunk"):
        read_all(opened)


def header_file(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, end: int, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "'b' overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, "'b' overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, "'b' leaves a gap"),
        ({"a": entry(4, 12)}, "'a' leaves a gap"),
        ({"a": entry(0, 8), "b": entry(8, 10**12, (249999999998,))}, "cut off: 'b' ends at byte 1000000000"),
        ({"a": entry(0, 8)}, "end at byte"),
        ({"a": entry(8, 0)}, "takes 8 bytes, and has -8"),
        ({"a": entry(0, 16, (2**40, 2**40))}, "bytes, and has 16"),
        ({"a": entry(0, 16, (-2, -2))}, "has shape"),
        ({"a": entry(0, 16, (4.0,))}, "has shape"),
        ({"a": entry(0, 16, (True, 4))}, "has shape"),
        ({"a": entry(0, 16, "22")}, "has shape"),
        ({"a": entry(0, 16, (4,), "F4")}, "unknown dtype 'F4'"),
        ({"a": entry(0, 16, (4,), ["F32"])}, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "no dtype, shape and data_offsets"),
        ({"a": 3}, "no dtype, shape"),
        ([1], "not a JSON object"),
        (b"{'a'}", "not a good safetensors file"),
        (b"\xff" * 30, "not a good safetensors file"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b'{"a":1,"a":2}', "'a' is there twice"),
    ],
)
def test_headers_that_lie(header: Any, sentence: str, tmp_path: Path) -> None:
    file = header_file(tmp_path / "x.safetensors", header, bytes(16 if "at byte" not in sentence else 17))
    with pytest.raises(CheckpointError, match=sentence):
        read_header(file)


def test_a_header_of_absurd_length(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for length in (10**18, 2**64 - 1, 2_000):
        file.write_bytes(length.to_bytes(8, "little") + bytes(1000))
        with pytest.raises(CheckpointError, match="cut off, or not safetensors"):
            read_header(file)
    with file.open("wb") as opened:
        opened.write((10**9).to_bytes(8, "little"))
        opened.truncate(2 * 10**9)  # a hole: takes no room
    with pytest.raises(CheckpointError, match="announces a header of"):
        read_header(file)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2500), st.integers(0, 255))
def test_any_byte_of_a_header_changed_is_seen_or_does_no_harm(directory: Path, at: int, value: int) -> None:
    file = directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    before, data[at] = data[at], value
    file.write_bytes(data)
    said = ""
    try:
        opened = open_directory(directory)
        for source in opened.sources.values():
            source.read()
    except ColossusError as error:  # and nothing else
        said = str(error)
    data[at] = before
    file.write_bytes(data)
    assert not said or before != value
    assert not said or "safetensors" in said or "does not hold the model" in said


# --- an index that leads astray ---


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b.safetensors", "x\0y"]
)
def test_an_index_may_not_leave_the_directory(name: str, sharded: Path) -> None:
    save_file({"model.norm.weight": torch.ones(16)}, sharded.parent / "secret.safetensors")
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change(index, weight_map={**weight_map, "model.norm.weight": name})
    refused(sharded, "not a file of its own directory, and was not opened")


def test_links_out_of_the_directory_are_not_followed(sharded: Path) -> None:
    first = next(iter(sorted(sharded.glob("model-*"))))
    outside = sharded.parent / "elsewhere.safetensors"
    first.rename(outside)
    first.symlink_to(outside)
    refused(sharded, "a link to .*elsewhere.safetensors, outside the directory, and was not opened")
    outside.rename(sharded / "inside.safetensors")
    first.unlink()
    first.symlink_to("inside.safetensors")
    assert len(read_all(open_directory(sharded))) == len(SPEC.parameters())


def test_the_hubs_own_cache_is_made_of_links(directory: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    assert len(read_all(open_directory(snapshot))) == len(SPEC.parameters())


def test_an_index_that_is_wrong(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    files = sorted(set(good.values()))
    for weight_map, sentence in (
        ({**good, "model.norm.weight": "pytorch_model.bin"}, "pytorch_model.bin, which is not safetensors"),
        ({**good, "model.norm.weight": "other.safetensors"}, "other.safetensors is missing"),
        (
            {**good, "model.embed_tokens.weight": files[-1]},
            f"embed_tokens.weight is in {files[-1]}; it is in",
        ),
        ({**good, "nothing": files[0]}, "nothing is in .* it is in no file"),
        ([], "not a table"),
        ({}, "names no files"),
        ({"a": 3}, "not a table"),
    ):
        change(index, weight_map=weight_map)
        refused(sharded, sentence)
    for text in ("[]", "{}", "[" * 10**5, "\xff"):
        index.write_text(text)
        refused(sharded, "not an index")


def test_a_tensor_in_two_files(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": torch.ones(16)}, sharded / "more.safetensors")
    refused(sharded, r"model\.norm\.weight is both in model-0\S* and in more\.safetensors")


# --- a config.json that lies ---


def edited(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    file = directory / "model.safetensors"
    content = load_file(file)
    edit(content)
    save_file(content, file)
    return directory


def test_a_tied_head_that_is_stored_must_be_the_embedding(directory: Path) -> None:
    def head(factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
        return lambda tensors: tensors.update(
            {"lm_head.weight": factor * tensors["model.embed_tokens.weight"]}
        )

    if not SPEC.tied_embeddings:
        change(directory / "config.json", tie_word_embeddings=True)
        edited(directory, lambda tensors: [tensors.pop("lm_head.weight")])
    read_all(open_directory(edited(directory, head(1))))
    refused(edited(directory, head(2)), "lm_head.weight that is not model.embed_tokens.weight")


def test_names_that_no_file_system_takes(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    first = next(iter(record["weight_map"]))
    for name, sentence in (("x" * 5000 + ".safetensors", "cannot be"), ("x\udc80.safetensors", "missing")):
        record["weight_map"][first] = name
        index.write_text(json.dumps(record))
        refused(sharded, sentence)


def test_formats_that_are_not_read_are_named(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-q4.gguf")
    refused(directory, "model-q4.gguf is of a format that Colossus does not read")


def test_missing_extra_and_misshapen_tensors_are_named(directory: Path) -> None:
    def spoil(content: dict[str, torch.Tensor]) -> None:
        del content["model.layers.1.self_attn.q_proj.weight"]
        content["model.layers.2.mlp.up_proj.weight"] = torch.ones(24, 15)
        content["model.layers.0.surprise"] = torch.ones(1)
        content["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)  # no weight of a model
        content["model.norm.weight"] = torch.ones(16, dtype=torch.int64)

    with pytest.raises(CheckpointError) as caught:
        open_directory(edited(directory, spoil))
    for part in (
        "1 tensor is missing (model.layers.1.self_attn.q_proj.weight)",
        "model.layers.2.mlp.up_proj.weight is [24, 16] by config.json and [24, 15] in the file",
        "1 tensor is not of this model (model.layers.0.surprise)",
        "model.norm.weight is int64",
    ):
        assert part in str(caught.value)


def test_many_missing_tensors_are_counted(directory: Path) -> None:
    edited(directory, lambda content: [content.pop(name) for name in list(content) if ".layers.2." in name])
    refused(directory, r"9 tensors are missing \(.*, .*, .* and 6 more\)")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"vocab_size": 301},
            r"embed_tokens.weight is \[301, 16\] by config.json and \[300, 16\] in the file",
        ),
        ({"vocab_size": 9_000_000}, r"288M parameters .*vocabulary 9,000,000\).*\[300, 16\]"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"num_hidden_layers": 4}, r"9 tensors are missing \(model.layers.3"),
        ({"num_hidden_layers": 2}, "9 tensors are not of this model"),
        ({"num_hidden_layers": 5000}, "parameters|at least 1,000 tensors are missing"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 1_999_998, "head_dim": None}, "parameters|hidden_size"),
        ({"num_attention_heads": 1_000_000}, "parameters|heads"),
        ({"architectures": ["LlamaForCausalLMs"]}, "Did you mean 'LlamaForCausalLM'"),
        ({"architectures": ["os.system"]}, "unknown to Colossus"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'.*bfloat16 version"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size None"),
        ({"quantization_config": 3}, "quantised by 'unknown'"),
    ],
)
def test_a_config_that_lies(changes: dict[str, Any], sentence: str, directory: Path) -> None:
    change(directory / "config.json", **changes)
    refused(directory, sentence, ColossusError)


def test_non_finite_weights_are_named_when_read(directory: Path) -> None:
    def spoil(content: dict[str, torch.Tensor]) -> None:
        content["model.layers.1.mlp.down_proj.weight"][2, 3] = torch.nan
        content["model.layers.1.mlp.down_proj.weight"][1, 1] = -torch.inf

    opened = open_directory(edited(directory, spoil))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight .* 2 elements of 384"):
        read_all(opened)


def test_chat_templates_of_all_kinds(directory: Path) -> None:
    assert open_directory(directory).chat_template is None
    tokenizer = directory / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({"chat_template": "one"}))
    assert open_directory(directory).chat_template == "one"
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": "two"}]
    tokenizer.write_text(json.dumps({"chat_template": several}))
    assert open_directory(directory).chat_template == "two"
    (directory / "chat_template.jinja").write_text("three")
    assert open_directory(directory).chat_template == "three"
    (directory / "chat_template.jinja").unlink()
    tokenizer.write_text("[]")
    refused(directory, "not a JSON table")


def test_hub_names_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_directory(str(tmp_path)) == tmp_path
    for text in ("no/such/path", "../up", "/abs", "plain", "a/..", "a b/c"):
        with pytest.raises(ConfigError, match="there is no directory"):
            find_directory(text)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install .*--local-dir DIR"):
        find_directory("owner/name")


def test_only_safe_files_are_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fnmatch import fnmatch
    from types import SimpleNamespace

    asked: list[list[str]] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if name == "away/model":
            raise OSError("no route to host\nand more")
        return str(tmp_path)

    module = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", module)
    assert find_directory("owner/name") == tmp_path
    for name, wanted in (("a.safetensors", 1), ("config.json", 1), ("m.bin", 0), ("modeling_x.py", 0)):
        assert any(fnmatch(name, pattern) for pattern in asked[0]) == wanted
    with pytest.raises(ConfigError, match=r"could not be fetched \(no route to host\)"):
        find_directory("away/model")
