"""A trained model out of its run directory; and the command that lets it write."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from colossus.cli import main
from colossus.data import Tokenizer
from colossus.errors import CheckpointError, ConfigError, DataError
from colossus.generate import Sampling, generate, load_run
from colossus.models import Decoder
from colossus.observe.run_directory import RunDirectory
from tests.checkpoint.states import assert_same


def newest_payload(run: RunDirectory) -> Path:
    return max(run.checkpoints_path.glob("step-*")) / "model-00000.safetensors"


def damage(run: RunDirectory) -> None:
    path = newest_payload(run)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_the_newest_weights_and_their_tokenizer(
    run: RunDirectory, model: Decoder, tokenizer: Tokenizer
) -> None:
    loaded, found, rejected = load_run(run)
    assert_same(dict(loaded.named_parameters()), dict(model.named_parameters()))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert found.fingerprint == tokenizer.fingerprint
    assert rejected == ()
    sampling = Sampling(temperature=0, max_tokens=20)
    assert list(generate(loaded, found, "the", sampling)) == list(generate(model, tokenizer, "the", sampling))


def test_a_damaged_checkpoint_is_passed_over(run: RunDirectory) -> None:
    path = newest_payload(run)
    damage(run)
    loaded, _, rejected = load_run(run)
    assert all((parameter == 0).all() for parameter in loaded.parameters())
    assert [one.path for one in rejected] == [path.parent]


def test_nothing_to_load(run: RunDirectory) -> None:
    (tokenizer_file,) = run.tokenizer_path.iterdir()
    tokenizer_file.unlink()
    with pytest.raises(DataError):
        load_run(run)


def test_no_checkpoint_yet(run: RunDirectory) -> None:
    run.checkpoints_path.rename(run.path / "moved")
    run.checkpoints_path.mkdir()
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        load_run(run)


def test_a_tokenizer_of_another_model(run: RunDirectory) -> None:
    Tokenizer.train(["other text " * 50 + " ".join(map(str, range(900)))], 400).save(run.tokenizer_path)
    with pytest.raises(ConfigError, match="they do not belong together"):
        load_run(run)


# --- the command ---


def command(monkeypatch: pytest.MonkeyPatch, run: RunDirectory, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["colossus", "generate", str(run.path), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_prompt_and_what_follows(
    run: RunDirectory, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = "".join(generate(model, tokenizer, "the", Sampling(temperature=0, max_tokens=12)))
    for extra in ((), ("--no-stream",)):
        arguments = ("--prompt", "the", "--temperature", "0", "--max-tokens", "12", *extra)
        assert command(monkeypatch, run, *arguments) == 0
        assert capsys.readouterr().out == f"the{text}\n"


def test_json_is_one_object(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    arguments = ("--json", "--prompt=a", "--temperature=2", "--num-samples=3", "--seed=1", "--max-tokens=9")
    outputs = []
    for _ in range(2):
        assert command(monkeypatch, run, *arguments) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0].keys() == {"prompt", "samples", "tokens_per_s"}
    assert outputs[0]["prompt"] == "a"
    assert outputs[0]["tokens_per_s"] > 0
    assert outputs[0]["samples"] == outputs[1]["samples"]
    texts = [sample["text"] for sample in outputs[0]["samples"]]
    assert len(set(texts)) == 3
    assert all(1 <= sample["num_tokens"] <= 9 for sample in outputs[0]["samples"])


def test_damage_is_said_on_stderr(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    damage(run)
    assert command(monkeypatch, run, "--json", "--max-tokens", "3") == 0
    captured = capsys.readouterr()
    assert "warning: " in captured.err
    assert "step-00000002 is damaged" in captured.err
    json.loads(captured.out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--temperature", "nan"), "temperature is nan"),
        (("--top-k", "0"), "top_k is 0"),
        (("--top-p", "2"), "top_p is 2.0"),
        (("--max-tokens", "0"), "max_tokens is 0"),
        (("--seed", "-1"), "seed is -1"),
        (("--seed", str(2**63 - 1), "--num-samples", "2"), f"seed is {2**63}"),
        (("--stop", ""), "an empty stop text"),
        (("--prompt", "a\udcff"), "the prompt is not UTF-8"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: tuple[str, ...],
    sentence: str,
    run: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    assert command(monkeypatch, run, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert sentence in captured.err
    assert captured.out == ""
