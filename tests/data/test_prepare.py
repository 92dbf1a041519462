"""Preparation against a naive one, and everything that may change, break or be in the way."""

import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from colossus.data import Corpus, RichProgress, Tokenizer, prepare, read_documents
from colossus.data.duplicates import heldout_limit
from colossus.data.manifest import MANIFEST_NAME
from colossus.data.survey import SourceChangedError, document_hash
from colossus.errors import DataError
from colossus.spec.data import DataConfig, LoadedTokenizer, Source

from .builders import decoded, files_of, small_config

WriteTree = Callable[[dict[str, str | bytes]], Path]


def numbered(texts: list[str]) -> dict[str, str | bytes]:
    return {f"{number:04}.txt": text for number, text in enumerate(texts)}


@pytest.fixture
def tree(write_tree: WriteTree, texts: list[str]) -> Path:
    return write_tree(numbered(texts[:60]))


class Stages:
    """Notes the stages that run."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.done = 0

    def stage(self, name: str, total: int | None) -> None:
        self.names.append(name)
        self.done = 0

    def advance(self, amount: int) -> None:
        self.done += amount


def test_equals_a_naive_preparation(write_tree: WriteTree, texts: list[str], tmp_path: Path) -> None:
    repeated = texts[:50] + texts[10:20] + texts[50:80]
    first, second = write_tree(numbered(repeated)), write_tree(numbered(texts[40:160]))
    sources = (Source(path=str(first)), Source(path=str(second)))
    stages = Stages()
    corpus = prepare(
        small_config(*sources, heldout=0.3), tmp_path / "corpus", progress=stages, shard_tokens=500
    )

    seen: set[str] = set()
    for index, source in enumerate(sources):
        sides: dict[str, list[str]] = {"train": [], "heldout": []}
        duplicates = 0
        for document in read_documents(source):
            if document.text in seen:
                duplicates += 1
                continue
            seen.add(document.text)
            high = int.from_bytes(document_hash(document.data)[:8], "big")
            sides["heldout" if high < heldout_limit(0.3) else "train"].append(document.text)
        assert decoded(corpus, index, "train") == sides["train"]
        assert decoded(corpus, index, "heldout") == sides["heldout"]
        record = corpus.manifest.sources[index]
        assert record.duplicates == duplicates
        assert (
            record.documents
            == record.files
            == record.duplicates + len(sides["train"]) + len(sides["heldout"])
        )
        assert record.bytes == record.duplicate_bytes + record.train.bytes + record.heldout.bytes
        assert len(record.train.shards) > 3
        assert all(shard.tokens >= 500 for shard in record.train.shards[:-1]) or record.heldout.shards
        assert record.train.bytes == sum(len(text.encode()) for text in sides["train"])
    assert corpus.heldout_bytes == sum(record.heldout.bytes for record in corpus.manifest.sources)
    corpus.verify()
    assert stages.names[-1] == "writing tokens"
    assert stages.done == sum(record.bytes for record in corpus.manifest.sources)


def test_preparing_again_only_opens(tree: Path, tmp_path: Path) -> None:
    config = small_config(Source(path=str(tree)))
    before = files_of(prepare(config, tmp_path / "corpus").directory)
    stages = Stages()
    prepare(config, tmp_path / "corpus", progress=stages)
    assert stages.names == []
    assert files_of(tmp_path / "corpus") == before
    Corpus.open(tmp_path / "corpus", config)


def test_the_same_text_elsewhere_gives_the_same_shards(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "copy")
    one = prepare(small_config(Source(path=str(tree))), tmp_path / "one")
    other = prepare(small_config(Source(path=str(tmp_path / "copy"))), tmp_path / "other")
    assert one.tokenizer.fingerprint == other.tokenizer.fingerprint
    assert one.fingerprint == other.fingerprint
    assert one.manifest.plan != other.manifest.plan


def test_a_changed_source_is_noticed_and_rebuilt(tree: Path, tmp_path: Path) -> None:
    config = small_config(Source(path=str(tree)))
    old = prepare(config, tmp_path / "corpus")
    (tree / "more.txt").write_text("a document that was not there")
    with pytest.raises(DataError, match=r"files of source .* have changed; prepare it again"):
        Corpus.open(tmp_path / "corpus", config)
    assert len(Corpus.open(tmp_path / "corpus").differences()) == 1
    new = prepare(config, tmp_path / "corpus")
    assert new.manifest.sources[0].documents == old.manifest.sources[0].documents + 1
    assert not new.differences()
    # One generation is left.
    assert len(list((tmp_path / "corpus").glob("corpus-*"))) == 1


def test_a_missing_source_does_not_keep_a_corpus_from_opening(tree: Path, tmp_path: Path) -> None:
    config = small_config(Source(path=str(tree)))
    corpus = prepare(config, tmp_path / "corpus")
    shutil.move(corpus.directory, tmp_path / "elsewhere")
    shutil.rmtree(tree)
    moved = Corpus.open(tmp_path / "elsewhere")
    moved.verify()
    assert "does not exist" in moved.differences()[0]


def test_changed_settings_are_named(tree: Path, tmp_path: Path) -> None:
    corpus = prepare(small_config(Source(path=str(tree))), tmp_path / "corpus")
    other = small_config(Source(path=str(tree), weight=2.0), heldout=0.1, vocab_size=300)
    with pytest.raises(
        DataError, match=r"heldout_fraction was 0.2 and is now 0.1; tokenizer was .*; the sources"
    ):
        Corpus.open(tmp_path / "corpus", other)
    rebuilt = prepare(other, tmp_path / "corpus")
    assert rebuilt.manifest.plan != corpus.manifest.plan
    assert rebuilt.vocab_size == 300
    assert Corpus.open(tmp_path / "corpus", other).fingerprint == rebuilt.fingerprint


def test_a_loaded_tokenizer_and_its_change(tree: Path, tmp_path: Path) -> None:
    Tokenizer.train(["some text of some kind"] * 3, 270).save(tmp_path)
    config = DataConfig(
        sources=(Source(path=str(tree)),), tokenizer=LoadedTokenizer(path=str(tmp_path / "tokenizer.json"))
    )
    corpus = prepare(config, tmp_path / "corpus")
    assert corpus.tokenizer.fingerprint == Tokenizer.load(tmp_path / "tokenizer.json").fingerprint
    assert corpus.manifest.tokenizer.asked_vocab_size is None
    Tokenizer.train(["other words altogether"] * 3, 280).save(tmp_path)
    with pytest.raises(DataError, match=r"tokenizer file .* has changed"):
        Corpus.open(tmp_path / "corpus", config)
    assert prepare(config, tmp_path / "corpus").tokenizer.fingerprint != corpus.tokenizer.fingerprint
    (tmp_path / "tokenizer.json").write_text("garbage")
    with pytest.raises(DataError, match=r"tokenizer.json"):
        prepare(config, tmp_path / "corpus")


def test_a_vocabulary_that_could_not_be_filled_is_noted(tree: Path, tmp_path: Path) -> None:
    corpus = prepare(small_config(Source(path=str(tree)), vocab_size=50_000), tmp_path / "corpus")
    assert corpus.vocab_size < 50_000
    assert corpus.manifest.tokenizer.asked_vocab_size == 50_000
    assert corpus.manifest.token_dtype == "uint16"


def test_a_large_vocabulary_takes_four_bytes(tree: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    words = {"?": 0, "</s>": 1} | {f"word{n}": n for n in range(2, 70_000)}
    library = Library(models.WordLevel(words, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(tmp_path / "words.json"))
    (tree / "high.txt").write_text("word69999 word2 word65536")
    config = DataConfig(
        sources=(Source(path=str(tree / "high.txt")),),
        heldout_fraction=0.0,
        tokenizer=LoadedTokenizer(path=str(tmp_path / "words.json")),
    )
    corpus = prepare(config, tmp_path / "corpus")
    assert corpus.manifest.token_dtype == "uint32"
    ids = corpus.train_stream(0)
    found = np.empty(4, np.int64)
    ids.copy(0, found)
    assert found.tolist() == [1, 69999, 2, 65536]


def test_heldout_documents_stay_held_out_as_a_corpus_grows(
    write_tree: WriteTree, texts: list[str], tmp_path: Path
) -> None:
    root = write_tree(numbered(texts[:100]))
    config = small_config(Source(path=str(root)))
    small = prepare(config, tmp_path / "corpus")
    before = {split: set(decoded(small, 0, split)) for split in ("train", "heldout")}
    for name, text in numbered(texts[100:]).items():
        (root / f"more-{name}").write_bytes(str(text).encode())
    large = prepare(config, tmp_path / "corpus")
    after = {split: set(decoded(large, 0, split)) for split in ("train", "heldout")}
    assert before["train"] < after["train"]
    assert before["heldout"] < after["heldout"]
    assert not after["train"] & after["heldout"]


def test_sources_without_text(write_tree: WriteTree, tmp_path: Path) -> None:
    empty = write_tree({"a.png": b"\0\0", "b.txt": "  \n"})
    with pytest.raises(DataError, match=r"has no text \(passed over: binary 1 .first: a.png.*empty 1"):
        prepare(small_config(Source(path=str(empty))), tmp_path / "corpus")
    (empty / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"caf\\udce9.txt"):
        prepare(small_config(Source(path=str(empty))), tmp_path / "corpus")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    with pytest.raises(DataError, match=r"has no text \(0 files\)"):
        prepare(small_config(Source(path=str(nothing))), tmp_path / "corpus")


def test_a_folder_with_other_things_is_left_alone(tree: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    config = small_config(Source(path=str(tree)))
    with pytest.raises(DataError, match=r"not empty and not a corpus \(it holds 'thesis.tex'\)"):
        prepare(config, precious)
    (precious / "thesis.tex").rename(precious / MANIFEST_NAME)
    with pytest.raises(DataError, match="is not a corpus's"):
        prepare(config, precious)
    assert (precious / MANIFEST_NAME).read_text() == "years of work"
    (tmp_path / "file").write_text("a file")
    with pytest.raises(DataError, match=r"cannot prepare a corpus in .*file"):
        prepare(config, tmp_path / "file")
    with pytest.raises(DataError, match=r"cannot prepare a corpus in .*below"):
        prepare(config, tmp_path / "file" / "below")
    with pytest.raises(DataError, match="lies inside its own source"):
        prepare(config, tree / "corpus")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DataError, match="Choose a folder that can be written"):
        prepare(small_config(Source(path=str(tree))), tmp_path / "locked" / "corpus")


def test_a_full_disk_is_named_and_can_be_gone_on_from(tree: Path, tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: the write that crosses it fails."""
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from colossus.data import prepare; from colossus.errors import DataError\n"
        "from colossus.spec.data import DataConfig\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try: prepare(DataConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))\n"
        "except DataError as error: print(error)\n"
    )
    config = small_config(Source(path=str(tree)))
    command = [sys.executable, "-c", script, config.model_dump_json(), str(tmp_path / "corpus")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Make room" in result.stdout, result.stdout + result.stderr
    prepare(config, tmp_path / "corpus").verify()


def test_damage_is_found_and_repaired(tree: Path, tmp_path: Path) -> None:
    config = small_config(Source(path=str(tree)))
    whole = files_of(prepare(config, tmp_path / "corpus").directory)
    shard = next((tmp_path / "corpus").rglob("train-00000.tokens"))
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"content of .*train-00000.tokens is not what was written"):
        Corpus.open(tmp_path / "corpus").verify()
    shard.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"train-00000.tokens has [\d,]+ bytes instead of [\d,]+"):
        Corpus.open(tmp_path / "corpus")
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000.tokens is missing"):
        Corpus.open(tmp_path / "corpus")
    prepare(config, tmp_path / "corpus")
    assert files_of(tmp_path / "corpus") == whole


def test_no_corpus_and_another_format(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no corpus in .*prepare it first"):
        Corpus.open(tmp_path)
    config = small_config(Source(path=str(tree)))
    prepare(config, tmp_path / "corpus")
    manifest = tmp_path / "corpus" / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(DataError, match=r"no corpus manifest of format 1 .format_version"):
        Corpus.open(tmp_path / "corpus")
    prepare(config, tmp_path / "corpus").verify()


def test_a_file_that_changes_under_way_is_noticed(tree: Path, tmp_path: Path) -> None:
    class Meddler(Stages):
        def stage(self, name: str, total: int | None) -> None:
            super().stage(name, total)
            if name == "writing tokens":
                (tree / "0003.txt").write_text("something else")

    config = small_config(Source(path=str(tree)))
    with pytest.raises(SourceChangedError, match="changed while they were being read; prepare again"):
        prepare(config, tmp_path / "corpus", progress=Meddler())
    assert "something else" in decoded(prepare(config, tmp_path / "corpus"), 0, "train") + decoded(
        Corpus.open(tmp_path / "corpus"), 0, "heldout"
    )


def test_a_second_preparation_waits_and_opens(tree: Path, tmp_path: Path) -> None:
    config = small_config(Source(path=str(tree)))
    waiting, may_go_on = threading.Event(), threading.Event()

    class Slow(Stages):
        def stage(self, name: str, total: int | None) -> None:
            super().stage(name, total)
            if name == "training the tokenizer":
                may_go_on.set()
                assert waiting.wait(20)

    class Second(Stages):
        def stage(self, name: str, total: int | None) -> None:
            super().stage(name, total)
            waiting.set()

    first_stages, second_stages = Slow(), Second()
    found: list[Corpus] = []
    thread = threading.Thread(
        target=lambda: found.append(prepare(config, tmp_path / "corpus", progress=first_stages))
    )
    thread.start()
    assert may_go_on.wait(20)
    second = prepare(config, tmp_path / "corpus", progress=second_stages)
    thread.join()
    assert len(second_stages.names) == 1
    assert second_stages.names[0].startswith("waiting for another preparation")
    assert found[0].fingerprint == second.fingerprint


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_as_bars(tree: Path, tmp_path: Path) -> None:
    terminal = Terminal()
    with RichProgress(terminal) as progress:
        prepare(small_config(Source(path=str(tree))), tmp_path / "corpus", progress=progress)
    assert "writing tokens" in terminal.getvalue()


def test_progress_in_plain_lines(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RichProgress(every_s=0.0) as progress:
        prepare(small_config(Source(path=str(tree))), tmp_path / "corpus", progress=progress)
    said = capsys.readouterr().err
    assert "training the tokenizer\n" in said
    assert "writing tokens: " in said
    assert "\x1b" not in said
