"""`colossus evaluate` on a real run."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from colossus.cli.evaluate import evaluate as command
from colossus.errors import ColossusError, ConfigError, DataError
from colossus.observe.run_directory import RunDirectory
from colossus.observe.summary import Summary

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(command)


def evaluate(*arguments: object) -> str:
    """What it prints to stdout; raises the errors that `main` shows."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, ColossusError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def as_json(*arguments: object) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(evaluate(*arguments, "--json"))
    return record


def test_its_own_held_out_text_as_its_summary_says(run: RunDirectory) -> None:
    said = Summary.from_json(run.summary_path.read_text()).heldout_bits_per_byte
    for batch in (1, 8):
        record = as_json(run.path, "--batch", batch)["text"]
        assert record["total"]["bits_per_byte"] == pytest.approx(said, rel=1e-6)
        assert record["context_tokens"] == record["stride_tokens"] == 32
    shown = evaluate(run.name, "--runs", run.path.parent)
    assert f"{said:.4f}" in shown
    assert "Windows of 32 tokens that do not overlap, as in training." in shown


def test_more_context_for_each_token(run: RunDirectory) -> None:
    record = as_json(run.path, "--stride", 4)["text"]
    apart = as_json(run.path)["text"]
    assert record["total"]["num_tokens"] == apart["total"]["num_tokens"]
    assert record["total"]["nats"] != apart["total"]["nats"]
    assert "at least 28 before it" in record["windows"]


def test_any_text(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("document 1: 2 3")
    (tmp_path / "b.jsonl").write_text('{"body": "document 2"}\n{"body": "4 5 6"}\n')
    arguments = (
        run.path,
        "--data",
        tmp_path / "a.txt",
        "--data",
        tmp_path / "*.jsonl",
        "--text-field",
        "body",
    )
    record = as_json(*arguments)["text"]
    assert [(row["name"], row["num_bytes"], row["num_documents"]) for row in record["rows"]] == [
        (str(tmp_path / "a.txt"), 15, 1),
        (str(tmp_path / "*.jsonl"), 15, 2),
    ]
    assert record["total"]["nats"] == pytest.approx(sum(row["nats"] for row in record["rows"]))
    by_file = as_json(run.path, "--data", tmp_path, "--text-field", "body", "--files")["text"]
    assert [row["name"] for row in by_file["rows"]] == ["a.txt", "b.jsonl"]
    shown = evaluate(*arguments, "--max-bytes", "8")
    assert "all" in shown
    assert as_json(*arguments, "--max-bytes", "8")["text"]["total"]["num_bytes"] == 16


def test_the_object_also_in_a_file(run: RunDirectory, tmp_path: Path) -> None:
    record = as_json(run.path, "--out", tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == record
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (("--stride", 33), ConfigError, "a stride of 33"),
        (("--context", 33), ConfigError, "made for 1 to 32"),
        (("--dtype", "float64"), ConfigError, "dtype is 'float64'"),
        (("--max-bytes", "9"), ConfigError, "--max-bytes goes with --data"),
        (("--limit", 3), ConfigError, "--limit goes with --tasks"),
        (("--data", "nowhere"), DataError, "'nowhere' does not exist"),
        (("--data", "hf:a/b"), DataError, "on the Hugging Face hub"),
        (("--data", "stdlib", "--max-bytes", "much"), ConfigError, "--max-bytes: "),
        (("--out", "no/where.json"), ConfigError, "there is no folder no"),
        (("--tasks", ","), ConfigError, "names no task"),
        (("--tasks", "nowhere.yaml"), ConfigError, "there is no such file"),
        (("--tasks", "x", "--include", "nowhere"), ConfigError, "there is no such folder"),
    ],
)
def test_mistakes_are_one_sentence(
    run: RunDirectory, arguments: tuple[object, ...], error: type[ColossusError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        evaluate(run.path, *arguments)


def test_without_its_corpus(run: RunDirectory, tmp_path: Path) -> None:
    corpora = run.path.parent / "corpora"
    corpora.rename(tmp_path / "away")
    try:
        with pytest.raises(DataError, match="--data measures any other text"):
            evaluate(run.path)
    finally:
        (tmp_path / "away").rename(corpora)
