"""A run's directory says what it is, and is enough to do it again."""

import dataclasses
import re
from pathlib import Path

import pytest

from colossus.observe.run_directory import RunDirectory
from colossus.observe.summary import Summary
from tests.stories.processes import colossus, kinds, recipe, same_course


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("explained")
    path = recipe(directory, model="sparse", optimizer="muon", dtype=None)
    done = colossus("train", path, "--runs", str(directory / "runs"), "--json", draws=True)
    (directory / "said.json").write_text(done.out)
    return directory / "runs"


def test_all_that_its_readme_names_is_there(runs: Path) -> None:
    run = RunDirectory(runs / "story-001")
    named = re.findall(r"^\| `([^`]+)` \|", (run.path / "README.md").read_text(), re.MULTILINE)
    assert len(named) >= 8
    missing = [name for name in named if not (run.path / name).exists()]
    assert set(missing) <= {"git.json"}  # only where the code is a git checkout
    assert kinds(run)[-4:] == ["CheckpointSaved", "EvaluationStarted", "Evaluated", "RunFinished"]
    assert kinds(run).count("CheckpointSaved") == 3  # 4, 8, 12: the last of them is not saved twice


def test_json_is_the_summary(runs: Path) -> None:
    text = (runs.parent / "said.json").read_text()
    assert text.count("\n") == 1
    assert (runs / "story-001" / "summary.json").read_text() == text
    said = Summary.from_json(text)
    assert text == said.to_json() + "\n"
    assert (said.steps, said.tokens) == (12, 12 * 4 * 32)
    assert said.heldout_bits_per_byte is not None
    for name, value in dataclasses.asdict(said).items():
        if name.endswith(("_s", "_bytes")):
            assert value >= 0, name


def test_its_configuration_alone_gives_the_same_run(runs: Path) -> None:
    first = RunDirectory(runs / "story-001")
    colossus("train", str(first.config_path), "--runs", str(runs), "--name", "again")
    again = RunDirectory(runs / "again-001")
    assert again.config() == first.config()
    same_course(first, again)
