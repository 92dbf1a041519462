"""Round trips, determinism, the END token, and files that are no tokenizers."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.data import Tokenizer
from colossus.data.shards import token_dtype
from colossus.data.storage import write_atomically
from colossus.data.tokenizer import END_OF_DOCUMENT
from colossus.errors import DataError

CODE = (
    "def some_function_name(first_value, second_value):\n"
    "    if first_value == 12345:\n"
    "        return self.other_value[1024]\n\n"
    "    x   =  3\t# don't\n"
    "class CamelCase:\r\n    pass  \n"
)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train([CODE * 5, "naïve café 你好你好 🙂🙂 " * 5], 600)


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece model with byte fallback, as Llama 2 has."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE.splitlines() * 20),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("pieces") / "small.model"
    path.write_bytes(model.getvalue())
    return path


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    stream = trained.stream()
    assert "".join(stream.push(int(token)) for token in ids) + stream.finish() == text


@given(st.lists(st.sampled_from([END_OF_DOCUMENT, "<|endof", "text|>", "</s>", " ", "\n", "x"]), max_size=8))
@settings(max_examples=60, deadline=None)
def test_text_never_makes_the_end_token(trained: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = trained.encode(text)
    assert trained.end_of_document not in ids
    assert trained.decode(ids) == text


def test_training_is_deterministic_across_processes(trained: Tokenizer) -> None:
    script = (
        "from colossus.data import Tokenizer; import sys, json;"
        "print(Tokenizer.train(json.loads(sys.argv[1]), 600).fingerprint)"
    )
    texts = json.dumps([CODE * 5, "naïve café 你好你好 🙂🙂 " * 5])
    result = subprocess.run([sys.executable, "-c", script, texts], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == trained.fingerprint


def test_pieces_suit_code(trained: Tokenizer) -> None:
    tokenizer = Tokenizer.train([CODE * 50], 2000)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(CODE)]
    assert "\n        " in pieces, "a line end with its indentation is one token"
    assert "_value" in pieces
    assert "_function" in pieces, "identifiers split at underscores"
    assert all(not (any(c.isdigit() for c in piece) and len(piece) > 3) for piece in pieces)
    assert "  " in pieces, "spaces stay together"


def test_a_tiny_corpus_gives_a_smaller_vocabulary() -> None:
    tokenizer = Tokenizer.train(["abab abab"], 4096)
    assert 257 <= tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("zürich")) == "zürich"


def test_save_and_load(trained: Tokenizer, tmp_path: Path) -> None:
    path = trained.save(tmp_path)
    for loaded in (Tokenizer.load(path), Tokenizer.load(tmp_path)):
        assert loaded.fingerprint == trained.fingerprint
        assert loaded.vocab_size == trained.vocab_size
        assert loaded.end_of_document == trained.end_of_document
        assert np.array_equal(loaded.encode(CODE), trained.encode(CODE))


def test_a_file_with_truncation_and_an_ordinary_end_token(trained: Tokenizer, tmp_path: Path) -> None:
    description = json.loads(trained.save(tmp_path).read_text())
    description["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    description["added_tokens"][0]["special"] = False
    (tmp_path / "other.json").write_text(json.dumps(description))
    loaded = Tokenizer.load(tmp_path / "other.json")
    text = f"{CODE}{END_OF_DOCUMENT}{CODE}"
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.end_of_document not in loaded.encode(text)


def word_level(tmp_path: Path, words: list[str]) -> Path:
    """A tokenizer.json whose model itself knows the spelling of END."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    library = Library(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


def test_a_model_that_knows_the_spelling_of_end(tmp_path: Path) -> None:
    loaded = Tokenizer.load(word_level(tmp_path, ["?", "a", "b", "</s>"]))
    assert loaded.end_of_document == 3
    assert 3 not in loaded.encode("a </s> b")


def test_sentencepiece(piece_model: Path, tmp_path: Path) -> None:
    loaded = Tokenizer.load(piece_model)
    assert loaded.kind == "sentencepiece"
    assert loaded.vocab_size == 400
    text = "def naïve(): return 你好 🙂"
    ids = loaded.encode(text)
    assert loaded.decode(ids) == text
    assert loaded.end_of_document not in loaded.encode("a </s> b")
    assert loaded.decode([*ids, loaded.end_of_document, *ids]) == f"{text}</s>{text}"
    stream = loaded.stream()
    assert "".join(stream.push(int(token)) for token in ids) + stream.finish() == text
    loaded.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == loaded.fingerprint


def test_streaming_holds_back_half_a_character(trained: Tokenizer) -> None:
    tokenizer = Tokenizer.train(["plain"], 257)
    ids = [int(token) for token in tokenizer.encode("a🙂b")]
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids] == ["a", "", "", "", "🙂", "b"]
    assert stream.push(ids[1]) == ""
    assert stream.finish() == "\ufffd"


def test_streaming_random_ids_equals_decoding_at_once(trained: Tokenizer) -> None:
    numbers = random.Random(0)
    for _ in range(50):
        ids = [numbers.randrange(trained.vocab_size) for _ in range(60)]
        stream = trained.stream()
        assert "".join(stream.push(token) for token in ids) + stream.finish() == trained.decode(ids)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"{}",
        b'{"model": 3}',
        b"\0\x01\x02" * 50,
        b'{"version": "1.0", "model": {"type": "BPE"}}',
    ],
)
def test_garbage_is_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(DataError, match=r"broken.*(tokenizer.json|SentencePiece)"):
        Tokenizer.load(tmp_path / "broken")


def test_missing_files_and_missing_end(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no tokenizer.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match=r"no end-of-document token; looked for <\|endoftext\|>, "):
        Tokenizer.load(word_level(tmp_path, ["?", "a"]))


# --- what files beside a tokenizer say ---


def beside(path: Path, name: str = "tokenizer_config.json", **fields: Any) -> Path:
    (path.parent / name).write_text(json.dumps(fields))
    return path


def test_end_is_a_known_name_first_and_else_what_the_files_beside_say(tmp_path: Path) -> None:
    known = beside(word_level(tmp_path, ["?", "a", "<|im_end|>", "<|endoftext|>"]), eos_token="<|im_end|>")
    assert Tokenizer.load(known).end_of_document == 3
    path = word_level(tmp_path, ["?", "a", "<|im_end|>", "STOP"])
    assert Tokenizer.load(beside(path, eos_token="STOP")).end_of_document == 3
    assert Tokenizer.load(beside(path, eos_token={"content": "STOP", "special": True})).end_of_document == 3
    beside(path, "generation_config.json", eos_token_id=[2, 3])
    assert Tokenizer.load(beside(path, eos_token="not there")).end_of_document == 2
    assert Tokenizer.load(beside(path)).end_of_document == 2
    beside(path, "special_tokens_map.json", eos_token="STOP")
    assert Tokenizer.load(path).end_of_document == 3
    assert 3 not in Tokenizer.load(path).encode("a STOP a")
    for name in ("special_tokens_map.json", "generation_config.json"):
        (tmp_path / name).write_text("{")  # says nothing
    with pytest.raises(DataError, match=r"and for the eos_token of a tokenizer_config\.json beside it"):
        Tokenizer.load(path)


def test_a_copy_keeps_an_end_that_the_file_does_not_name(tmp_path: Path, trained: Tokenizer) -> None:
    path = beside(word_level(tmp_path, ["?", "a", "STOP"]), eos_token="STOP")
    (tmp_path / "copy").mkdir()
    Tokenizer.load(path).save(tmp_path / "copy")
    again = Tokenizer.load(tmp_path / "copy")
    assert (again.end_of_document, again.opening) == (2, (2,))
    (tmp_path / "plain").mkdir()
    trained.save(tmp_path / "plain")
    assert [file.name for file in (tmp_path / "plain").iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A </s>", "$A", "<s> <s> $A"])
def test_what_stands_before_a_text_is_what_the_library_puts_there(single: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers.processors import TemplateProcessing

    path = word_level(tmp_path, ["?", "a", "<s>", "</s>"])
    library = Library.from_file(str(path))
    library.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 2), ("</s>", 3)])
    library.save(str(path))
    front = (2,) * single.count("<s>")
    loaded = Tokenizer.load(path)
    assert loaded.opening == front
    assert tuple(library.encode("a a").ids)[: len(front) + 1] == (*front, 1)
    assert loaded.encode("a a").tolist() == [1, 1], "only generation and evaluation put it there"
    assert Tokenizer.load(beside(path, bos_token="</s>", add_bos_token=True)).opening == (3,)
    assert Tokenizer.load(beside(path, bos_token="gone", add_bos_token=True)).opening == front
    assert Tokenizer.load(beside(path, bos_token="<s>", add_bos_token=False)).opening == ()
    assert Tokenizer.load(beside(path, bos_token="</s>")).opening == front


def test_what_stands_before_a_text_in_sentencepiece(piece_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(piece_model.read_bytes())
    assert Tokenizer.load(path).opening == (1,)
    assert Tokenizer.load(beside(path, add_bos_token=False)).opening == ()
    assert Tokenizer.load(beside(path, bos_token="</s>", add_bos_token=True)).opening == (2,)
    assert Tokenizer.load(beside(path, bos_token="nothing", add_bos_token=True)).opening == (1,)


def test_token_dtype_holds_the_vocabulary() -> None:
    assert token_dtype(2**16) == "uint16"
    assert token_dtype(2**16 + 1) == "uint32"
    assert token_dtype(2**32) == "uint32"
    with pytest.raises(DataError, match="4,294,967,297 entries does not fit"):
        token_dtype(2**32 + 1)


def test_patterns_that_never_come_to_an_end_are_an_error(trained: Tokenizer, tmp_path: Path) -> None:
    path = trained.save(tmp_path)
    record = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    record["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    path.write_text(json.dumps(record))
    tokenizer = Tokenizer.load(path)
    for encode in (tokenizer.encode, tokenizer.encode_without_controls):
        with pytest.raises(DataError, match="the tokenizer broke down"):
            encode("a" * 60 + "!")
        assert tokenizer.decode(encode("b")) == "b"


def test_writing_atomically_leaves_devices_and_no_remains(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, b"text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert pipe.is_fifo()
    with pytest.raises(OSError):
        write_atomically(tmp_path / ("x" * 250), b"text")  # the temporary name is too long
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
