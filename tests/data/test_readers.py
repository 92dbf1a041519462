"""Every kind of file gives the same documents; what cannot be used is refused or counted."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as arrow
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from colossus.data import formats, read_documents
from colossus.data.readers import Skips, list_files, listing_fingerprint
from colossus.errors import DataError
from colossus.spec.data import Source

WriteTree = Callable[[dict[str, str | bytes]], Path]
TEXTS = ["first\n", "zweite Zeile ü\nmore", "三\n\n🙂", "last, with\ttab"]


def read(path: Path | str, skips: Skips | None = None, text_field: str = "text") -> list[str]:
    """The texts of a source."""
    source = Source(path=str(path), text_field=text_field)
    return [document.text for document in read_documents(source, skips=skips)]


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": n, field: text}).encode() + b"\n" for n, text in enumerate(texts))


def write_parquet(path: Path, texts: list[str | None], kind: arrow.DataType | None = None) -> Path:
    parquet.write_table(arrow.table({"text": arrow.array(texts, kind)}), path, row_group_size=3)
    return path


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    content = json_lines(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    # Two frames, as appending to a file leaves them.
    frames = [zstandard.compress(part) for part in (content[:20], content[20:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    write_parquet(tmp_path / "d.parquet", TEXTS)
    write_parquet(tmp_path / "e.parquet", TEXTS, arrow.large_string())
    write_parquet(tmp_path / "f.parquet", TEXTS, arrow.dictionary(arrow.int32(), arrow.string()))
    (tmp_path / "many").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "many" / f"{number}.txt").write_bytes(text.encode())
    (tmp_path / "packed").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "packed" / f"{number}.md.gz").write_bytes(gzip.compress(text.encode()))
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == TEXTS, path.name
    assert read(tmp_path / "many" / "*.txt") == TEXTS


def test_a_document_says_where_it_came_from(write_tree: WriteTree) -> None:
    root = write_tree({"b/x.txt": "one", "a.jsonl": json_lines(["two", "three"])})
    found = [(d.source, d.file, d.ordinal, d.text) for d in read_documents(Source(path=str(root)), 7)]
    assert found == [(7, "a.jsonl", 0, "two"), (7, "a.jsonl", 1, "three"), (7, "b/x.txt", 0, "one")]


def test_a_walk_is_sorted_and_skips_what_is_no_text(write_tree: WriteTree) -> None:
    root = write_tree(
        {
            "z.c": "int main;",
            "a/b.py": "import os",
            "a/image.png": b"\x89PNG\0\0\0",
            "a/latin.txt": "caf\xe9".encode("latin-1"),
            "blank.txt": " \n\t\n",
            "empty.jsonl": b'{"text": ""}\n\n{"text": null}\n',
            ".git/config": "hidden",
            "__pycache__/x.txt": "hidden",
            "broken.gz": b"\x1f\x8bnot really",
            "cut.zst": zstandard.compress(bytes(range(32, 120)) * 9)[:-5],
            "other.jsonl": b'{"body": "x"}\n{"text": "kept"}\nnot json\n[1]\n'
            b'{"text": 3}\n{"text": "\\ud800"}\n',
        }
    )
    (root / "gone.txt").symlink_to(root / "nowhere")
    (root / "loop").symlink_to(root)
    skips = Skips()
    assert read(root, skips) == ["import os", "kept", "int main;"]
    assert skips.counts == {
        "binary": 1,
        "invalid UTF-8": 2,
        "empty": 3,
        "damaged": 2,
        "no field 'text'": 1,
        "not JSON": 2,
        "field 'text' is not text": 1,
        "unreadable": 1,
    }
    assert "latin.txt, byte 3" in str(skips)


def test_named_files_that_cannot_be_used_are_errors(write_tree: WriteTree) -> None:
    long_text = b"ab\n" * 100_000
    root = write_tree(
        {
            "bad.txt": b"abc\xffdef",
            "large.txt": long_text + b"\xc3(" + long_text,
            "bad.jsonl": b'{"text": "fine"}\n{"text": "\xff"}\n',
            "field.jsonl": b'{"title": "x", "body": "y"}\n',
            "not.jsonl": b'{"text": "fine"}\n{"text": \n',
            "bad.gz": gzip.compress(b"hello" * 100)[:-10],
            "bad.zst": zstandard.compress(b"hello" * 100)[:-3],
            "bad.parquet": b"PAR1 but no more",
            "x.parquet.gz": b"",
        }
    )
    messages = {
        "bad.txt": "bad.txt.*byte 3 ",
        "large.txt": "large.txt.*byte 300000 ",
        "bad.jsonl": "bad.jsonl.*line 2: byte 27 ",
        "field.jsonl": "field.jsonl.*line 1 has no field 'text'; it has: body, title",
        "not.jsonl": "not.jsonl.*line 2 is not JSON",
        "bad.gz": "bad.gz.*cannot be decompressed",
        "bad.zst": "bad.zst.*cannot be decompressed: .*cut off",
        "bad.parquet": "bad.parquet.*not a Parquet file",
        "x.parquet.gz": "unpack it",
    }
    for name, message in messages.items():
        with pytest.raises(DataError, match=message):
            read(root / name)
    write_parquet(root / "y.parquet", ["a"])
    with pytest.raises(DataError, match="no column 'body'; it has: text"):
        read(root / "y.parquet", text_field="body")
    with pytest.raises(DataError, match=r"bad.txt' does not exist|Did you mean 'bad.txt'"):
        read(root / "bad.tx")
    with pytest.raises(DataError, match="matches no file"):
        read(root / "*.rs")


def test_another_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS, "content"))
    assert read(tmp_path / "a.jsonl", text_field="content") == TEXTS


def test_parquet_rows_that_are_no_text(tmp_path: Path) -> None:
    table = arrow.table({"text": arrow.array([b"good", b"\xff", None, b"also"], arrow.binary())})
    parquet.write_table(table.cast(arrow.schema([("text", arrow.binary())])), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 1"):
        read(tmp_path / "a.parquet")
    skips = Skips()
    assert read(tmp_path, skips) == ["good", "also"]
    assert skips.counts == {"invalid UTF-8": 1, "empty": 1}
    parquet.write_table(arrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="row 0: field 'text' is a int"):
        read(tmp_path / "b.parquet")


def test_a_large_text_is_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"line {number} é\n" for number in range(40_000)]
    path = tmp_path / "large.txt"
    path.write_bytes("".join(lines).encode())
    documents = read(path)
    assert "".join(documents) == "".join(lines)
    assert len(documents) > 10
    assert all(len(document.encode()) <= formats.PIECE_BYTES for document in documents)
    assert all(document.endswith("\n") for document in documents)
    (tmp_path / "large.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read(tmp_path / "large.txt.gz") == documents


@given(st.text(alphabet="aé三🙂\n", max_size=80), st.integers(4, 20))
def test_pieces_lose_nothing_and_break_no_character(text: str, limit: int) -> None:
    pieces = list(formats.pieces(text.encode(), limit))
    assert b"".join(pieces) == text.encode()
    assert all(0 < len(piece) <= limit for piece in pieces)
    assert "".join(piece.decode() for piece in pieces) == text


def test_a_text_without_line_ends_is_cut_between_characters(tmp_path: Path) -> None:
    text = "🙂三é" * 60_000
    (tmp_path / "one_line.txt").write_bytes(text.encode())
    assert "".join(read(tmp_path / "one_line.txt")) == text


def test_a_huge_record_is_refused_before_it_fills_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 3 << 20)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["fine", "x" * (6 << 20)]))
    with pytest.raises(DataError, match="line 2 is longer than"):
        read(tmp_path / "a.jsonl")


def test_standard_library_without_tests_and_packages() -> None:
    names = [file.name for file in list_files(Source(path="stdlib"))]
    assert "json/decoder.py" in names
    assert names.index("abc.py") < names.index("json/decoder.py") < names.index("zipimport.py")
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    assert {Path(name).suffix for name in names} <= {".py", ".txt", ".rst", ".md"}


def test_listing_changes_with_names_sizes_and_times(write_tree: WriteTree) -> None:
    root = write_tree({"a.txt": "one", "b/c.txt": "two"})
    source = Source(path=str(root))
    prints = [listing_fingerprint(source)]
    assert listing_fingerprint(source) == prints[0]
    (root / "a.txt").write_text("longer")
    prints.append(listing_fingerprint(source))
    (root / "new.txt").write_text("x")
    prints.append(listing_fingerprint(source))
    (root / "new.txt").rename(root / "newer.txt")
    prints.append(listing_fingerprint(source))
    assert len(set(prints)) == 4
