"""A trained model out of its run directory; and the command that lets it write."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from colossus.checkpoint.hugging_face import write_directory
from colossus.cli import main
from colossus.data import Tokenizer
from colossus.errors import CheckpointError, ConfigError, DataError, RunError
from colossus.generate import Borders, Sampling, generate, load_model, load_run
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


# --- Hugging Face directories ---


@pytest.fixture
def exported(tokenizer: Tokenizer, model: Decoder, tmp_path: Path) -> Path:
    path = tmp_path / "theirs"
    kept = tmp_path / "tokenizer"
    kept.mkdir()
    tokenizer.save(kept)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_directory(model.spec, weights.__getitem__, path, tokenizer=kept)
    return path


def test_a_hugging_face_directory_writes_what_the_run_writes(
    exported: Path, run: RunDirectory, model: Decoder, tokenizer: Tokenizer
) -> None:
    theirs, ours = load_model(exported, Path("nowhere")), load_model(str(run.path), Path("nowhere"))
    assert_same(dict(theirs.model.named_parameters()), dict(model.named_parameters()))
    assert not any(parameter.requires_grad for parameter in theirs.model.parameters())
    assert (theirs.name, ours.name) == ("theirs", "tiny-001")
    assert theirs.borders == ours.borders == Borders.of_run(tokenizer)
    assert theirs.chat_template is None
    sampling = Sampling(temperature=0, max_tokens=20)
    texts = [
        list(generate(one.model, one.tokenizer, "the", sampling, borders=one.borders))
        for one in (theirs, ours)
    ]
    assert texts[0] == texts[1]


def test_what_ends_a_text_and_its_template_come_from_the_directory(exported: Path) -> None:
    described = {"bos_token": {"content": "<s>"}, "add_bos_token": False, "chat_template": "{{ messages }}"}
    (exported / "tokenizer_config.json").write_text(json.dumps(described))
    (exported / "generation_config.json").write_text('{"eos_token_id": [7, 9, 10000000, "x", true]}')
    loaded = load_model(exported, Path("nowhere"))
    assert loaded.borders == Borders((), frozenset((0, 7, 9)))
    assert loaded.special_tokens["bos_token"] == "<s>"
    assert loaded.chat_template == "{{ messages }}"
    (exported / "chat_template.jinja").write_text("newer")
    assert load_model(exported, Path("nowhere")).chat_template == "newer"


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda path: (path / "tokenizer.json").unlink(), DataError, "no tokenizer.json"),
        (lambda path: (path / "config.json").unlink(), RunError, "no config.toml and no config.json"),
        (lambda path: (path / "config.json").write_text("{}"), ConfigError, "architectures"),
        (lambda path: (path / "model.safetensors").unlink(), CheckpointError, "no weights"),
        (
            lambda path: (path / "generation_config.json").write_text("[]"),
            DataError,
            "generation_config.json",
        ),
    ],
)
def test_what_is_wrong_with_a_directory_is_named(
    spoil: Any, error: type[Exception], words: str, exported: Path
) -> None:
    spoil(exported)
    with pytest.raises(error, match=words):
        load_model(exported, Path("nowhere"))


# --- many prompts ---


def test_a_file_of_prompts(
    run: RunDirectory,
    model: Decoder,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    lines = ["the cat", "", "naïve 🙂", "a"]
    (tmp_path / "asked.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    records = "\n".join(json.dumps({"prompt": line, "other": 1}) for line in lines)
    (tmp_path / "asked.jsonl").write_text(records)
    options = ("--seed", "3", "--num-samples", "2", "--max-tokens", "8", "--max-batch", "3")
    out = tmp_path / "answers.jsonl"
    expected = [
        "".join(generate(model, tokenizer, line, Sampling(seed=seed, max_tokens=8)))
        for line in lines
        for seed in (3, 4)
    ]
    for name in ("asked.txt", "asked.jsonl"):
        assert command(monkeypatch, run, "--prompts", str(tmp_path / name), "--out", str(out), *options) == 0
        assert "8 texts" in capsys.readouterr().out
        answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert [one["text"] for one in answers] == expected
        assert [one["prompt"] for one in answers] == [line for line in lines for _ in range(2)]
    assert command(monkeypatch, run, "--prompts", str(tmp_path / "asked.txt"), *options) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "asked.jsonl", "asked.txt"]


@pytest.mark.parametrize(
    ("content", "arguments", "sentence"),
    [
        (b"", ("--prompt", "b"), "--prompt and --prompts contradict"),
        (b'{"prompt": "a"}', ("--out", "/nowhere/at/all.jsonl"), "there is no directory /nowhere/at"),
        (b"\n", (), "is empty; put a prompt on each line"),
        (b"\xff", (), "is not UTF-8 text, from byte 0 on"),
        (b'{"prompt": "a"}\n{"prompt": 3}', (), 'line 2 has no text under "prompt"'),
        (b'{"prompt": "a"}\n{', (), "line 2 is not JSON"),
        (b'{"prompt": "\\ud800"}', (), "not UTF-8"),
        (None, (), "cannot read --prompts"),
    ],
)
def test_mistakes_with_many_prompts(
    content: bytes | None,
    arguments: tuple[str, ...],
    sentence: str,
    run: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    path = tmp_path / "asked.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert command(monkeypatch, run, "--prompts", str(path), *arguments) == 2
    assert sentence in capsys.readouterr().err
