"""Finding models as people write them, and reading them from files."""

import json
import re
from pathlib import Path

import pytest

from colossus import zoo
from colossus.errors import ConfigError
from colossus.spec.config import to_toml
from colossus.zoo.registry import ALIASES, ENTRIES
from tests.spec.configs import small_config


@pytest.mark.parametrize("name", zoo.names())
def test_each_name_finds_its_model_and_its_source(name: str) -> None:
    assert zoo.find(name).name == name
    assert len(zoo.source(name)) > 5
    assert re.fullmatch(r"[a-z0-9.]+(-[a-z0-9.]+)*", name)


def test_no_two_names_are_written_alike() -> None:
    written = [re.sub("[^a-z0-9.]", "", name) for name in (*ENTRIES, *ALIASES)]
    assert len(set(written)) == len(written)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("GPT-3 175B", "gpt3-175b"),
        ("gpt3", "gpt3-175b"),
        ("GPT2-XL", "gpt2-xl"),
        ("llama3-405b", "llama3.1-405b"),
        ("Llama-3.1-8B", "llama3.1-8b"),
        ("meta-llama/Llama-3.1-405B", "llama3.1-405b"),
        ("Mixtral 8x7B", "mixtral-8x7b"),
        ("mistralai/Mixtral-8x22B-v0.1", "mixtral-8x22b"),
        ("Mistral 7B", "mistral-7b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("mistralai/Mistral-7B-v0.3", "mistral-7b-v0.3"),
        ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b"),
        ("deepseek_v3", "deepseek-v3"),
        ("Grok2", "grok-2"),
        ("Nemotron-4-340B", "nemotron4-340b"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("gpt-oss 120b", "gpt-oss-120b"),
    ],
)
def test_names_as_people_write_them(written: str, name: str) -> None:
    assert zoo.find(written) is zoo.find(name)
    assert zoo.source(written) == zoo.source(name)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no model 'lama3-405b' in the zoo\. Nearest: llama3\.1-405b"):
        zoo.find("lama3-405b")
    with pytest.raises(ConfigError, match=r"no model 'zzz' in the zoo\. `colossus models` lists all"):
        zoo.source("zzz")
    with pytest.raises(ConfigError, match="no model '' in the zoo"):
        zoo.find("")


# --- files ---


@pytest.mark.parametrize("name", ["grok-2", "deepseek-v3", "gpt2", "spark"])
def test_a_file_of_a_model(name: str, tmp_path: Path) -> None:
    model = zoo.find(name)
    as_json = tmp_path / "model.json"
    as_json.write_text(model.model_dump_json())
    assert zoo.load(as_json) == model
    run = tmp_path / "config.toml"
    run.write_text(to_toml(small_config().model_copy(update={"model": model})))
    assert zoo.load(str(run)) == model


def test_load_takes_names_too() -> None:
    assert zoo.load("Grok-1") is zoo.find("grok-1")


def test_false_means_absent_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nvocab_size = 512\ncontext_tokens = 64\nnum_layers = 2\nhidden_size = 32\n'
        "attention = { num_heads = 2, num_kv_heads = 1, head_dim = 15, rope = false }\n"
        "mlp = { intermediate_size = 64 }\n"
    )
    model = zoo.load(path)
    assert model.name == "mine"
    assert model.attention.rope is None


@pytest.mark.parametrize(
    ("file_name", "text", "sentence"),
    [
        ("a.toml", "x = [", "a.toml is not a TOML file"),
        ("a.json", "{", "a.json is not a JSON file"),
        ("a.json", "[1]", "a.json: a model is a table of its fields"),
        ("a.json", "[" * 10**5, "a.json"),
        ("a.json", b"\xff\xfe\x00", "not UTF-8 text, from byte 0"),
        ("a.toml", 'name = "x"\nhiden_size = 3\n', "unknown key 'hiden_size'. Did you mean 'hidden_size'?"),
        ("a.yaml", "name: x", "its name must end in .toml or .json"),
    ],
)
def test_files_that_are_no_model(file_name: str, text: str | bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / file_name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        zoo.load(path)
    assert sentence in str(caught.value)


def test_values_that_cannot_be_are_named_with_their_file(tmp_path: Path) -> None:
    plain = json.loads(zoo.find("mixtral-8x7b").model_dump_json())
    plain["mlp"]["top_k"] = 9
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match=r"mine\.json: mlp: top_k 9 is more than num_experts 8"):
        zoo.load(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read model .*none\.toml: No such file"):
        zoo.load(tmp_path / "none.toml")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read model .*folder\.json: Is a directory"):
        zoo.load(tmp_path / "folder.json")
