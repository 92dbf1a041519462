"""Published weights as they come: block FP8, MXFP4, and one file for each tensor-parallel rank."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from colossus.checkpoint.hugging_face import open_directory, write_directory
from colossus.checkpoint.hugging_face.read import Directory
from colossus.errors import CheckpointError

from .hugging_face_models import model, read_all, weights
from .states import assert_same


def written(kind: str, path: Path, **config: object) -> dict[str, torch.Tensor]:
    """A directory as we write it, with changes to its config.json; its stored tensors."""
    spec = model(kind)
    write_directory(spec, weights(spec).__getitem__, path)
    record = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**record, **config}))
    return load_file(path / "model.safetensors")


def value(directory: Directory, name: str) -> torch.Tensor:
    return next(directory.read(tensor) for tensor in directory.tensors if tensor.name == name)


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [6, 5], "activation_scheme": "dynamic"}


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu])
def test_block_fp8_element_by_element(scale_dtype: torch.dtype, tmp_path: Path) -> None:
    content = written("deepseek", tmp_path / "m", quantization_config=FP8)
    rows, columns = FP8["weight_block_size"]
    expected = {}
    for name, tensor in list(content.items()):
        if not name.endswith("_proj.weight"):
            continue
        content[name] = tensor.to(torch.float8_e4m3fn)
        shape = (-(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns))
        scale = torch.rand(shape).add(0.5).to(scale_dtype)
        content[f"{name}_scale_inv"] = scale
        expected[name] = torch.tensor(
            [
                [
                    float(content[name][i, j].float() * scale[i // rows, j // columns].float())
                    for j in range(tensor.shape[1])
                ]
                for i in range(tensor.shape[0])
            ]
        )
    save_file(content, tmp_path / "m/model.safetensors")
    directory = open_directory(tmp_path / "m")
    assert len(expected) > 10
    for name, values in expected.items():
        assert torch.equal(value(directory, name), values), name
    assert len(read_all(directory)) == len(directory.model.parameters())
    name = next(iter(expected))
    content[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(content, tmp_path / "m/model.safetensors")
    with pytest.raises(CheckpointError, match=r"the scales of .* are \[1, 1\], not \["):
        open_directory(tmp_path / "m")
    del content[f"{name}_scale_inv"]
    save_file(content, tmp_path / "m/model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is float8_e4m3fn and has no scales"):
        open_directory(tmp_path / "m")


def test_mxfp4_element_by_element_and_as_transformers_reads_it(tmp_path: Path) -> None:
    content = written("gpt_oss", tmp_path / "m", quantization_config={"quant_method": "mxfp4"})
    generator = torch.Generator().manual_seed(1)
    packed = {}
    for name in [name for name in content if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = content.pop(name).shape
        blocks = torch.randint(
            0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8
        )
        scales = torch.randint(0, 253, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        content[f"{name}_blocks"], content[f"{name}_scales"] = blocks, scales
        packed[name] = (blocks, scales)
    save_file(content, tmp_path / "m/model.safetensors")
    directory = open_directory(tmp_path / "m")
    assert len(packed) == 6
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for name, (blocks, scales) in packed.items():
        values = value(directory, name)
        for _ in range(200):
            e, o, b, i = (int(torch.randint(0, size, (), generator=generator)) for size in blocks.shape)
            low, high = int(blocks[e, o, b, i]) & 15, int(blocks[e, o, b, i]) >> 4
            factor = 2.0 ** (int(scales[e, o, b]) - 127)
            for code, at in ((low, 32 * b + 2 * i), (high, 32 * b + 2 * i + 1)):
                expected = (-1 if code & 8 else 1) * table[code & 7] * factor
                assert float(values[e, at, o]) == expected
    read = read_all(directory)
    assert torch.equal(
        read["layers.0.mlp.experts.gate.weight"][1],
        value(directory, "model.layers.0.mlp.experts.gate_up_proj")[1].float().T[0::2],
    )
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    for name, (blocks, scales) in packed.items():
        theirs = mxfp4.convert_moe_packed_tensors(blocks, scales.clamp(60, 190))
        content[f"{name}_scales"] = scales.clamp(60, 190)
        packed[name] = (blocks, theirs)
    save_file(content, tmp_path / "m/model.safetensors")
    directory = open_directory(tmp_path / "m")
    for name, (_, theirs) in packed.items():
        assert torch.equal(value(directory, name), theirs)
    content[f"{name}_scales"][0, 0, 0] = 255  # no number
    save_file(content, tmp_path / "m/model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} .* 32 elements"):
        read_all(open_directory(tmp_path / "m"))


def by_rank(directory: Path, content: dict[str, torch.Tensor], num_ranks: int) -> None:
    """Experts cut up as tensor-parallel ranks hold them, in files named as xai-org/grok-2 names them."""
    (directory / "model.safetensors").unlink()
    common = {name: tensor for name, tensor in content.items() if ".experts." not in name}
    save_file(common, directory / "pytorch_model-00000-TP-common.safetensors")
    for which, dim in (("w1", 0), ("w2", 1), ("w3", 0)):
        whole = {name: tensor for name, tensor in content.items() if name.endswith(f"{which}.weight")}
        for rank in range(num_ranks):
            part = {name: tensor.chunk(num_ranks, dim)[rank].contiguous() for name, tensor in whole.items()}
            save_file(part, directory / f"pytorch_model-{which}-TP-{rank:03d}.safetensors")


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_ranks_parts_are_joined(num_ranks: int, tmp_path: Path) -> None:
    content = written("mixtral", tmp_path / "m")
    by_rank(tmp_path / "m", content, num_ranks)
    assert_same(read_all(open_directory(tmp_path / "m")), weights(model("mixtral")))
    missing = tmp_path / "m/pytorch_model-w1-TP-001.safetensors"
    if num_ranks == 8:
        missing.unlink()
        with pytest.raises(
            CheckpointError, match="in the files of ranks 0, 2, 3, 4, 5, 6, 7; ranks from 0 on"
        ):
            open_directory(tmp_path / "m")
        (tmp_path / "m/pytorch_model-w1-TP-007.safetensors").rename(missing)
        with pytest.raises(CheckpointError, match=r"is \[24, 16\] by config.json and \[3, 16\] in the file"):
            open_directory(tmp_path / "m")
