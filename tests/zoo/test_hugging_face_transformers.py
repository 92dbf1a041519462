"""The tables beside `transformers`: what it writes of a model is what our tables say, name by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from colossus import zoo
from colossus.spec.model import ModelSpec
from colossus.zoo.hugging_face import architecture_of, model_of
from tests.zoo.hugging_face_models import MODELS, NAMES

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

IN_TRANSFORMERS = [name for name in MODELS if not name.startswith("grok")]


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file."""
    data = file.read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _config(model: ModelSpec, directory: Path) -> Any:
    (directory / "config.json").write_text(json.dumps(architecture_of(model).write(model)))
    return transformers.AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_transformers_writes_exactly_our_tensors(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    built = transformers.AutoModelForCausalLM.from_config(_config(model, tmp_path))
    assert type(built).__name__ == NAMES[name]
    built.save_pretrained(tmp_path / "saved")
    ours = {tensor.name: tensor.shape for tensor in architecture_of(model).tensors(model)}
    assert _header(tmp_path / "saved" / "model.safetensors") == ours
    # And its own config.json, which it writes in another form, is read as the same model.
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert model_of(saved, model.name) == model


@pytest.mark.parametrize(
    "name",
    [
        "gpt2-xl",
        "llama3.1-8b",
        "mistral-7b",
        "qwen2.5-0.5b",
        "qwen2.5-7b",
        "qwen3-0.6b",
        "qwen3-30b-a3b",
        "olmo2-7b",
        "mixtral-8x7b",
        "gpt-oss-20b",
        "kimi-k2",
    ],
)
def test_published_sizes_have_as_many_parameters_in_transformers(name: str, tmp_path: Path) -> None:
    model = zoo.find(name)
    config = _config(model, tmp_path)
    config.num_hidden_layers = 2  # one layer of each kind; building more takes long
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    fewer = model.model_copy(update={"num_layers": 2})
    numbers = {*built.parameters(), *(b for key, b in built.named_buffers() if "correction" in key)}
    assert sum(math.prod(tensor.shape) for tensor in numbers) == fewer.num_params()


@pytest.mark.parametrize("name", ["llama3.1-8b", "gpt-oss-20b", "deepseek-v3"])
def test_rotations_are_the_same_from_both_forms_of_config(name: str, tmp_path: Path) -> None:
    config = architecture_of(zoo.find(name)).write(zoo.find(name))
    with_new = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    with_old = {key: value for key, value in config.items() if key != "rope_parameters"}
    parameters = []
    for i, form in enumerate((config, with_new, with_old)):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "config.json").write_text(json.dumps(form))
        parameters.append(transformers.AutoConfig.from_pretrained(tmp_path / str(i)).rope_parameters)
        assert model_of(form, name) == zoo.find(name)
    assert parameters[0] == parameters[1] == parameters[2]
