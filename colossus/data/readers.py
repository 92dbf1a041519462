"""From a Source to its documents, in an order that depends on names and contents alone.

One policy decides what happens to text that cannot be used (binary, invalid UTF-8, a record without the text
field, a damaged file). A file that a person *named* raises a DataError with the file and the place: they
asked for that very text. A file met in a *walk* (a directory, a glob, the standard library) is skipped and
counted under its reason: one stray file among thousands must not stop a run, and the counts in the manifest
keep it from going unseen. The unit is the document, so one bad record does not cost the file.

Documents of white space alone are skipped and counted as `empty` everywhere.
"""

import glob
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from colossus.data.formats import UnusableError, texts
from colossus.errors import DataError, did_you_mean
from colossus.spec.base import fingerprint
from colossus.spec.data import STANDARD_LIBRARY, Source

HUB_PREFIX = "hf:"
STANDARD_LIBRARY_SUFFIXES = frozenset({".py", ".txt", ".rst", ".md"})
STANDARD_LIBRARY_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)


class Document(NamedTuple):
    """One text of a corpus: where it came from, and its UTF-8 bytes (valid, never empty)."""

    source: int
    """Index of its Source in the configuration."""
    file: str
    """Name of the file, relative to the source when that is a directory."""
    ordinal: int
    """Index among the documents of that file, from 0."""
    data: bytes

    @property
    def text(self) -> str:
        """The text itself."""
        return self.data.decode("utf-8")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source, as the directory lists it."""

    path: Path
    name: str
    """Relative to the source; what the listing fingerprint and messages use."""
    size_bytes: int
    modified_ns: int
    named: bool
    """True when a person named this very file, False when a walk met it."""


class Skips:
    """Counts what was passed over, by reason, and keeps the first example of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, example: str) -> None:
        """One more for `reason`."""
        self.counts[reason] += 1
        # File names need not be UTF-8; what is said about them must be.
        self.examples.setdefault(reason, example.encode("utf-8", "backslashreplace").decode())

    def __str__(self) -> str:
        """`"binary 3 (first: a.png, it has …), empty 1 (first: b.txt)"`."""
        return ", ".join(
            f"{reason} {count} (first: {self.examples[reason]})" for reason, count in self.counts.items()
        )


def is_hub(source: Source) -> bool:
    """Whether the source is a dataset on the Hugging Face hub."""
    return source.path.startswith(HUB_PREFIX)


def list_files(source: Source, skips: Skips | None = None) -> Iterator[SourceFile]:
    """The files of a source in reading order, one at a time: a walk never holds more than one directory's
    names.

    A hub dataset has no files here. Raises DataError when the path does not exist or a glob matches nothing.
    """
    skips = skips if skips is not None else Skips()
    if source.path == STANDARD_LIBRARY:
        root = Path(sysconfig.get_paths()["stdlib"])
        yield from walk(root, "", skips, library=True)
        return
    path = Path(source.path).expanduser()
    if path.is_dir():
        yield from walk(path, "", skips, library=False)
    elif path.exists():
        yield named_file(path)
    elif glob.has_magic(source.path):
        yield from matching_files(source, skips)
    else:
        raise DataError(f"source {source.path!r} does not exist.{_similar_path(path)}")


def _similar_path(path: Path) -> str:
    try:
        neighbours = sorted(entry.name for entry in os.scandir(path.parent))
    except OSError:
        return f" Its folder {str(path.parent)!r} does not exist either."
    hint = did_you_mean(path.name, neighbours)
    # The whole list of a folder is no help; only a close name is.
    return hint if "Did you mean" in hint else f" The running folder is {str(Path.cwd())!r}."


def walk(root: Path, prefix: str, skips: Skips, library: bool) -> Iterator[SourceFile]:
    """Files below `root`, each directory sorted by name. Hidden names and bytecode caches are left out
    silently, links to directories are not followed (they can loop), and what is no regular file is skipped
    and counted."""
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        if not prefix:
            raise DataError(f"cannot list {str(root)!r}: {error.strerror}") from error
        skips.add("unreadable", f"{prefix}: {error.strerror}")
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        name = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            if not (library and entry.name in STANDARD_LIBRARY_SKIPPED):
                yield from walk(Path(entry.path), f"{name}/", skips, library)
        elif not library or Path(name).suffix in STANDARD_LIBRARY_SUFFIXES:
            file = met_file(Path(entry.path), name, skips)
            if file is not None:
                yield file


def met_file(path: Path, name: str, skips: Skips) -> SourceFile | None:
    """A file that a walk met, or None (counted) when it is no regular file or a broken link."""
    try:
        status = path.stat()
    except OSError as error:
        skips.add("unreadable", f"{name}: {error.strerror}")
        return None
    if stat.S_ISDIR(status.st_mode):
        return None  # a link to a directory
    if not stat.S_ISREG(status.st_mode):
        skips.add("not a file", name)
        return None
    return SourceFile(path, name, status.st_size, status.st_mtime_ns, named=False)


def named_file(path: Path) -> SourceFile:
    """The file that a person named."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"source {str(path)!r} is neither a file nor a directory")
    return SourceFile(path, path.name, status.st_size, status.st_mtime_ns, named=True)


def matching_files(source: Source, skips: Skips) -> Iterator[SourceFile]:
    """Files that a glob matches (`**` crosses directories), sorted."""
    pattern = str(Path(source.path).expanduser())
    found = False
    for match in sorted(glob.iglob(pattern, recursive=True), key=lambda name: Path(name).parts):  # noqa: PTH207 (absolute patterns)
        file = met_file(Path(match), match, skips)
        if file is not None:
            found = True
            yield file
    if not found:
        raise DataError(f"source {source.path!r} matches no file below {str(Path.cwd())!r}")


def listing_fingerprint(source: Source) -> str:
    """16 hex digits that change when a file of the source is added, removed, renamed, resized or rewritten.

    Made of names, sizes and modification times, so no file is read. A hub dataset's is made of its name
    alone: nothing is asked of the network.
    """
    import xxhash

    if is_hub(source):
        return fingerprint(source.path)
    digest = xxhash.xxh3_64()
    for file in list_files(source):
        digest.update(listing_entry(file))
    return digest.hexdigest()


def listing_entry(file: SourceFile) -> bytes:
    """What one file adds to its source's listing fingerprint."""
    return f"{file.name}\0{file.size_bytes}\0{file.modified_ns}\n".encode("utf-8", "surrogateescape")


def read_file(file: SourceFile, source_index: int, text_field: str, skips: Skips) -> Iterator[Document]:
    """The documents of one file. Raises DataError or counts in `skips`, by the policy at the top of this
    module."""
    ordinal = 0
    try:
        for text in texts(file.path, text_field, skip_binary=not file.named):
            if isinstance(text, UnusableError):
                if file.named:
                    raise DataError(f"cannot use {str(file.path)!r}: {text.detail}")
                skips.add(text.reason, f"{file.name}, {text.detail}")
            elif not text.strip():
                skips.add("empty", file.name)
            else:
                yield Document(source_index, file.name, ordinal, text)
                ordinal += 1
    except OSError as error:
        if file.named:
            raise DataError(f"cannot read {str(file.path)!r}: {error.strerror or error}") from error
        skips.add("unreadable", f"{file.name}: {error.strerror or error}")


def read_documents(source: Source, source_index: int = 0, skips: Skips | None = None) -> Iterator[Document]:
    """Every document of a source that lies on this machine, in reading order.

    Raises DataError (see the policy above). Hub datasets are brought here first: `colossus.data.hub.fetch`.
    """
    skips = skips if skips is not None else Skips()
    for file in list_files(source, skips):
        yield from read_file(file, source_index, source.text_field, skips)
