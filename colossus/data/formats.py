"""From one file to the texts in it: compression, plain text, JSON lines, Parquet. Nothing is held whole."""

import contextlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from colossus.errors import DataError

READ_BYTES = 1 << 20
WHOLE_TEXT_BYTES = 128 << 10
"""A plain text file up to this size is one document."""
PIECE_BYTES = 32 << 10
"""A larger one is cut at line ends into documents of at most this size: it has no marks of its own, and
pieces keep memory bounded and give the held-out split something to choose from."""
RECORD_TEXT_BYTES = 1 << 20
"""A record (JSON line, Parquet row) is one document; only one larger than this is cut, likewise at line
ends."""
MAX_LINE_BYTES = 64 << 20
"""A longer JSON line is refused rather than read into memory."""
PARQUET_ROWS = 64


class UnusableError(Exception):
    """One document, or the rest of a file, cannot be used. Never leaves this package.

    `reason` is the short word it is counted under, `detail` what a person needs to find it.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


Text = bytes | UnusableError
"""What a format yields: the UTF-8 bytes of one document, or why there is none at this place."""


class Stream(Protocol):
    """The part of a binary file that the formats use."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; empty at the end."""


class ZstandardStream:
    """Reads a .zst file frame by frame, and notices one that stops in the middle (the library's own does
    not)."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file = file
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._compressed = b""
        self._plain = bytearray()
        self._error = zstandard.ZstdError

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; raises EOFError inside a frame that is cut off."""
        while len(self._plain) < size and self._fill():
            pass
        block = bytes(self._plain[:size])
        del self._plain[:size]
        return block

    def _fill(self) -> bool:
        if not self._compressed:
            # Small steps: a few compressed bytes may hold 128 KiB, and a step is decompressed whole.
            self._compressed = self._file.read(1 << 10)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("the last frame is cut off")
            return False
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        try:
            self._plain += self._frame.decompress(self._compressed)
        except self._error as error:
            raise EOFError(str(error)) from error
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None
        else:
            self._compressed = b""
        return True


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[Stream]:
    """The file's bytes, decompressed when its name ends in .gz or .zst."""
    if path.suffix == ".gz":
        import gzip

        with gzip.open(path, "rb") as stream:
            yield stream
    elif path.suffix == ".zst":
        with path.open("rb") as file:
            yield ZstandardStream(file)
    else:
        with path.open("rb") as file:
            yield file


def split_bytes(data: bytes, limit: int) -> int:
    """Where to cut `data`, which is longer than `limit`: after the last line end, else between characters."""
    cut = data.rfind(b"\n", 0, limit) + 1
    if cut:
        return cut
    cut = limit
    # Continuation bytes look like 10xxxxxx; three steps back leave any valid character.
    while cut > limit - 3 and data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def pieces(data: bytes, limit: int) -> Iterator[bytes]:
    """`data` in order, in parts of at most `limit` bytes; their concatenation is `data`."""
    start = 0
    while len(data) - start > limit:
        cut = split_bytes(data[start : start + limit + 1], limit)
        yield data[start : start + cut]
        start += cut
    if start < len(data):
        yield data[start:]


def checked(data: bytes, offset: int) -> Text:
    """`data` if it is UTF-8, else why not; `offset` is where it stands in its file, decompressed."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return UnusableError("invalid UTF-8", f"byte {offset + error.start} is not UTF-8 ({error.reason})")
    return data


def plain_texts(stream: Stream, skip_binary: bool) -> Iterator[Text]:
    """A text file as one document, or as bounded pieces when it is large."""
    head = stream.read(WHOLE_TEXT_BYTES + 1)
    if skip_binary and b"\0" in head[:8192]:
        yield UnusableError("binary", f"it has a NUL at byte {head.index(0)}")
        return
    if len(head) <= WHOLE_TEXT_BYTES:
        yield checked(head, 0)
        return
    offset, data = 0, head
    while True:
        while len(data) > PIECE_BYTES:
            cut = split_bytes(data[: PIECE_BYTES + 1], PIECE_BYTES)
            yield checked(data[:cut], offset)
            offset, data = offset + cut, data[cut:]
        more = stream.read(4 * PIECE_BYTES)
        if not more:
            break
        data += more
    if data:
        yield checked(data, offset)


def lines(stream: Stream) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, line); a line above MAX_LINE_BYTES raises UnusableError."""
    number, offset, data = 0, 0, b""
    while block := stream.read(READ_BYTES):
        *whole, data = (data + block).split(b"\n") if b"\n" in block else (data + block,)
        for line in whole:
            number += 1
            yield number, offset, line
            offset += len(line) + 1
        if len(data) > MAX_LINE_BYTES:
            raise UnusableError(
                "record too long", f"line {number + 1} is longer than {MAX_LINE_BYTES:,} bytes"
            )
    if data:
        yield number + 1, offset, data


def json_texts(stream: Stream, text_field: str) -> Iterator[Text]:
    """The `text_field` of every line; blank lines are passed over."""
    for number, offset, line in lines(stream):
        if not line.strip():
            continue
        text = json_text(line, number, offset, text_field)
        if isinstance(text, UnusableError):
            yield text
        else:
            yield from record_texts(text)


def record_texts(text: bytes) -> Iterator[Text]:
    """One record's text: whole, empty, or in pieces when it is very large."""
    if len(text) <= RECORD_TEXT_BYTES:
        yield text
    else:
        yield from pieces(text, RECORD_TEXT_BYTES)


def json_text(line: bytes, number: int, offset: int, text_field: str) -> Text:
    """The text of one JSON line, which begins at byte `offset` of its file; or why it has none."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return UnusableError("invalid UTF-8", f"line {number}: byte {offset + error.start} is not UTF-8")
    except (ValueError, RecursionError) as error:
        return UnusableError("not JSON", f"line {number} is not JSON: {error}")
    if not isinstance(record, dict):
        return UnusableError("not JSON", f"line {number} is a JSON {type(record).__name__}, not an object")
    if text_field not in record:
        fields = ", ".join(sorted(record)) or "none"
        return UnusableError(
            f"no field {text_field!r}", f"line {number} has no field {text_field!r}; it has: {fields}"
        )
    return text_bytes(record[text_field], f"line {number}", text_field)


def text_bytes(value: Any, place: str, text_field: str) -> Text:
    """A field's value as UTF-8; None is the empty document."""
    if value is None:
        return b""
    if not isinstance(value, str):
        detail = f"{place}: field {text_field!r} is a {type(value).__name__}, not text"
        return UnusableError(f"field {text_field!r} is not text", detail)
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        detail = f"{place}: character {error.start} of {text_field!r} is half a surrogate pair"
        return UnusableError("invalid UTF-8", detail)


def parquet_texts(path: Path, text_field: str) -> Iterator[Text]:
    """The `text_field` column of a Parquet file, a few rows at a time."""
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        # Without pre_buffer, pages are read as rows are asked for and not a row group at a time.
        file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES)
    except arrow.ArrowInvalid as error:
        yield UnusableError("damaged", f"it is not a Parquet file: {error}")
        return
    with file:
        names = file.schema_arrow.names
        if text_field not in names:
            detail = f"it has no column {text_field!r}; it has: {', '.join(names) or 'none'}"
            yield UnusableError(f"no field {text_field!r}", detail)
            return
        row = 0
        try:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field], use_threads=False):
                for value in binary_values(batch.column(0)):
                    yield from parquet_text(value, row, text_field)
                    row += 1
        except (arrow.ArrowException, OSError) as error:
            yield UnusableError("damaged", f"row {row} or later cannot be read: {error}")


def binary_values(column: Any) -> list[Any]:
    """A column's values as bytes where it holds text, unchanged where it does not."""
    import pyarrow as arrow

    kind = column.type.value_type if arrow.types.is_dictionary(column.type) else column.type
    if arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or arrow.types.is_string_view(kind):
        # Bytes, so that a row with invalid UTF-8 is that row's trouble and not the batch's.
        column = column.cast(kind).cast(arrow.large_binary())
    values: list[Any] = column.to_pylist()
    return values


def parquet_text(value: Any, row: int, text_field: str) -> Iterator[Text]:
    """One row's text, in pieces when it is very large."""
    if isinstance(value, bytes):
        text = checked(value, 0)
        if isinstance(text, UnusableError):
            text = UnusableError(text.reason, f"row {row}: {text.detail}")
    else:
        text = text_bytes(value, f"row {row}", text_field)
    if isinstance(text, UnusableError):
        yield text
    else:
        yield from record_texts(text)


def texts(path: Path, text_field: str, skip_binary: bool) -> Iterator[Text]:
    """Every text of one file, by the file's name: .jsonl and .parquet hold records, all else is plain text.

    What cannot be used comes out as UnusableError, in its place. Operating system errors pass through.
    """
    inner = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    if inner.suffix == ".parquet":
        if inner != path:
            yield UnusableError("compressed Parquet", f"Parquet compresses inside; unpack it to {inner.name}")
            return
        yield from parquet_texts(path, text_field)
        return
    read: Callable[[Stream], Iterator[Text]] = (
        (lambda stream: json_texts(stream, text_field))
        if inner.suffix == ".jsonl"
        else (lambda stream: plain_texts(stream, skip_binary))
    )
    try:
        with open_stream(path) as stream:
            yield from read(stream)
    except UnusableError as unusable:
        yield unusable
    except (EOFError, zlib.error) as error:
        yield UnusableError("damaged", f"it cannot be decompressed: {error}")
    except OSError as error:
        if error.errno is not None or path.suffix != ".gz":
            raise
        yield UnusableError("damaged", f"it cannot be decompressed: {error}")  # gzip.BadGzipFile has no errno
    except ImportError as error:
        raise DataError(f"{path} needs the package {error.name!r}: pip install {error.name}") from error
