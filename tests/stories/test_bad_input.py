"""What people get wrong: one clear sentence each, no traceback, and nothing is overwritten."""

import json
from pathlib import Path

import pytest

from colossus.spec.config import from_toml, to_toml
from tests.stories.processes import colossus, recipe


def sentence(done_err: str) -> str:
    """The error, which is the last line, and the only one of its kind."""
    assert "Traceback" not in done_err
    assert done_err.count("error: ") == 1
    last = done_err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


TEXTS = {
    "empty": b"",
    "binary": bytes(range(256)) * 40,
    "too short": b"just this",
    "not UTF-8": "der Käse".encode("latin-1") * 500,
}
SAID = {
    "empty": "has no text (passed over: empty 1",
    "binary": "byte 128 is not UTF-8",
    "too short": "is too small: it has",
    "not UTF-8": "UTF-8",
}


@pytest.mark.parametrize("what", TEXTS)
def test_text_that_is_none(what: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(TEXTS[what])
    done = colossus(
        "train", recipe(tmp_path, "data.heldout_fraction=0"), "--runs", str(tmp_path / "runs"), "--data", str(text),
        status=1,
    )  # fmt: skip
    assert SAID[what] in sentence(done.err)
    assert text.read_bytes() == TEXTS[what]
    assert not list((tmp_path / "runs").glob("story-*"))


def test_a_tokenizer_that_the_model_has_no_rows_for(tmp_path: Path) -> None:
    runs = str(tmp_path / "runs")
    path = recipe(tmp_path)
    colossus("train", path, "--runs", runs, "--steps", "1")
    tokenizer = tmp_path / "runs" / "story-001" / "tokenizer" / "tokenizer.json"
    settings = [
        "data.tokenizer.kind=file",
        f"data.tokenizer.path={json.dumps(str(tokenizer))}",
        "model.vocab_size=280",
    ]
    done = colossus("train", path, "--runs", runs, *(x for s in settings for x in ("--set", s)), status=2)
    assert sentence(done.err) == (
        "error: the tokenizer has 300 entries, but model plain has a vocabulary of 280; "
        "set model.vocab_size to 300 or more"
    )
    assert not (tmp_path / "runs" / "story-002").exists()


def test_a_run_whose_configuration_was_edited(tmp_path: Path) -> None:
    path, runs = recipe(tmp_path), tmp_path / "runs"
    colossus("train", path, "--runs", str(runs), "--steps", "2")
    config = runs / "story-001" / "config.toml"
    edited = from_toml(config.read_text())
    for changes, said in (
        ({"hidden_size": 48}, "is [48, 32] in the model"),
        ({"logit_soft_cap": 5.0}, "logit_soft_cap is 5.0 in the model and None in the checkpoint"),
    ):
        config.write_text(
            to_toml(edited.model_copy(update={"model": edited.model.model_copy(update=changes)}))
        )
        files = sorted((runs / "story-001").rglob("*"))
        done = colossus("train", "--resume", "story-001", "--runs", str(runs), status=1)
        assert "it is of another model" in sentence(done.err)
        assert said in done.err or "hidden_size" in changes
        assert sorted((runs / "story-001").rglob("*")) == files
    config.write_text(to_toml(edited.model_copy(update={"plan": None})))
    done = colossus("train", "--resume", "story-001", "--runs", str(runs), status=1)
    assert "has no [plan]" in sentence(done.err)


def test_a_text_that_changed_under_a_run(tmp_path: Path) -> None:
    path, runs = recipe(tmp_path), tmp_path / "runs"
    colossus("train", path, "--runs", str(runs), "--steps", "2")
    for file in (tmp_path / "text").iterdir():
        file.write_text(file.read_text().replace("document", "parchment"))
    done = colossus("train", "--resume", "story-001", "--runs", str(runs), status=1)
    assert "another tokenizer than its corpus has now" in sentence(done.err)


def test_runs_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("mine")
    done = colossus("train", recipe(tmp_path), "--runs", str(tmp_path / "runs"), status=1)
    assert str(tmp_path / "runs") in sentence(done.err)
    assert (tmp_path / "runs").read_text() == "mine"


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    done = colossus("train", "--resume", "nowhere", "--runs", str(tmp_path / "runs"), status=1)
    assert "no run 'nowhere' in" in sentence(done.err)


def test_nothing_held_out_is_said_once(tmp_path: Path) -> None:
    path = recipe(tmp_path, "data.heldout_fraction=0", "evaluation.every=2 steps")
    done = colossus("train", path, "--runs", str(tmp_path / "runs"), "--json")
    assert done.err.count("evaluation: none. no document is held out; raise data.heldout_fraction") == 1
    assert done.json["heldout_bits_per_byte"] is None
