"""`colossus export` and `colossus import`, as they are typed."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from colossus.checkpoint.hugging_face import open_directory
from colossus.cli import export, import_
from colossus.cli.group import Group
from colossus.errors import ConfigError
from colossus.observe.run_directory import RunDirectory

from .hugging_face_models import make_run, model, read_all, weights
from .states import assert_same


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs", model("llama"), weights(model("llama")))
    return tmp_path / "runs"


def colossus(*words: str) -> Result:
    app = typer.Typer(cls=Group)
    app.command("export")(export.export)
    app.command("import")(import_.import_)
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, Exception):
        raise result.exception
    return result


def test_out_and_in_by_command(runs: Path) -> None:
    said = json.loads(colossus("export", "latest", "out", "--shard-gb", "0.00002", "--json").stdout)
    spec = model("llama")
    assert said["num_bytes"] == 4 * spec.num_params()
    assert said["num_files"] == len(list(Path("out").glob("*.safetensors"))) > 1
    assert (said["step"], said["architecture"]) == (7, "LlamaForCausalLM")
    assert_same(read_all(open_directory("out")), weights(spec))
    words = ("import", "out", "--tokens", "6400", "--data", "a=2", "--text-field", "body", "--seed", "3")
    said = json.loads(colossus(*words, "--set", "batch.sequence_tokens=16", "--json").stdout)
    run = RunDirectory.open("out-001")
    assert Path(said["run"]) == Path("runs/out-001")
    config = run.config()
    assert (config.total_steps(), config.schedule.warmup_steps) == (50, 5)
    assert (config.data.sources[0].path, config.data.sources[0].weight) == ("a", 2.0)
    assert (config.seed, config.optimizer.kind, config.optimizer.learning_rate) == (3, "adamw", 1e-4)
    shown = colossus(
        "import", "out/", "--name", "other", "--set", "schedule.warmup_steps=7", "--steps", "100"
    )
    assert f"colossus train --resume {Path('runs/other-001')}" in shown.stdout
    assert RunDirectory.open("other-001").config().schedule.warmup_steps == 7
    colossus("export", "other-001", "half", "--dtype", "bfloat16")
    assert open_directory("half").num_bytes == 2 * spec.num_params()


def test_a_tokenizer_of_ones_own(runs: Path) -> None:
    colossus("export", "latest", "out")
    Path("out/tokenizer.json").rename("mine.json")
    with pytest.raises(ConfigError, match="--tokenizer FILE"):
        colossus("import", "out")
    colossus("import", "out", "--tokenizer", "mine.json")
    kept = RunDirectory.open("out-001").tokenizer_path
    assert (kept / "tokenizer.json").read_bytes() == Path("mine.json").read_bytes()
    assert not (kept / "tokenizer_config.json").exists()  # it was the other tokenizer's


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("export latest out --dtype bf16", "Did you mean 'bfloat16'"),
        ("export latest out --shard-gb 0", "above 0"),
        ("export latest out --shard-gb nan", "above 0"),
        ("export latest runs", "not empty"),
        ("import nowhere", "there is no directory nowhere"),
        ("import runs", "no config.json"),
        ("import out --steps 3 --tokens 4", "contradict"),
        ("import . --name a/b", "cannot name a run"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(words: str, sentence: str, runs: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        colossus(*words.split())
    assert [path.name for path in runs.parent.iterdir()] == ["runs"]
