"""Preparation killed with SIGKILL at many places, gone on with, and compared byte for byte."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from colossus.data import Corpus, prepare
from colossus.spec.data import DataConfig, Source, TrainedTokenizer

from .builders import files_of

SCRIPT = """
import os, signal, sys
from pathlib import Path
from colossus.data import prepare
from colossus.data import storage
from colossus.spec.data import DataConfig

config, directory = DataConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2])
moment = int(sys.argv[3])
real, count = storage.publish, 0

def publish(temporary, path):
    # Moment 2n is just before the n-th file gets its name, moment 2n + 1 just after; 0 is never.
    global count
    count += 1
    if moment and count == moment // 2 and moment % 2 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(temporary, path)
    if moment and count == moment // 2:
        os.kill(os.getpid(), signal.SIGKILL)

for module in list(sys.modules.values()):
    if getattr(module, "__name__", "").startswith("colossus.data") and hasattr(module, "publish"):
        module.publish = publish
prepare(config, directory, shard_tokens=4000)
print(count)
"""


def run(config: DataConfig, directory: Path, moment: int) -> subprocess.CompletedProcess[str]:
    """Prepares in a process that kills itself at a moment."""
    command = [sys.executable, "-c", SCRIPT, config.model_dump_json(), str(directory), str(moment)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> DataConfig:
    root = tmp_path_factory.mktemp("text")
    for number, text in enumerate(texts[:120]):
        (root / f"{number}.txt").write_bytes(text.encode())
    sources = (Source(path=str(root)), Source(path=str(root / "7*.txt")))
    return DataConfig(sources=sources, heldout_fraction=0.2, tokenizer=TrainedTokenizer(vocab_size=300))


def test_killed_anywhere_and_gone_on_with(config: DataConfig, tmp_path: Path) -> None:
    whole = run(config, tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    publications = int(whole.stdout)
    assert publications > 20
    expected = files_of(tmp_path / "whole")
    # Each process goes on from where the one before was killed, and gets a few files further.
    kills = 0
    directory = tmp_path / "corpus"
    while True:
        result = run(config, directory, 2 * 9 + kills % 2)
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL, result.stderr
        kills += 1
        assert kills < publications, "no progress between kills"
    assert kills >= 3
    assert files_of(directory) == expected
    prepare(config, directory, shard_tokens=4000).verify()


def test_killed_around_the_manifest(config: DataConfig, tmp_path: Path) -> None:
    publications = int(run(config, tmp_path / "whole", 0).stdout)
    expected = files_of(tmp_path / "whole")
    for moment in (2 * publications - 1, 2 * publications, 2 * publications + 1):
        directory = tmp_path / f"corpus{moment}"
        assert run(config, directory, moment).returncode == -signal.SIGKILL
        prepare(config, directory, shard_tokens=4000)
        assert files_of(directory) == expected


def test_killed_while_rebuilding_leaves_the_old_corpus(config: DataConfig, tmp_path: Path) -> None:
    directory = tmp_path / "corpus"
    old = prepare(config, directory, shard_tokens=4000)
    changed = DataConfig(sources=config.sources, heldout_fraction=0.5, tokenizer=config.tokenizer)
    assert run(changed, directory, 21).returncode == -signal.SIGKILL
    survivor = Corpus.open(directory, config)
    survivor.verify()
    assert survivor.fingerprint == old.fingerprint
    assert prepare(changed, directory, shard_tokens=4000).manifest.config == changed
    assert len(list(directory.glob("corpus-*"))) == 1


def test_two_processes_at_once(config: DataConfig, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, config.model_dump_json(), str(tmp_path / "corpus"), "0"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = sorted(int(process.communicate(timeout=60)[0]) for process in both)
    assert counts[0] == 0, "one of them only opened"
    assert counts[1] > 20
    prepare(config, tmp_path / "corpus", shard_tokens=4000).verify()
