"""From text, or from a corpus' held-out part, to the pieces that windows are cut from."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from colossus.data import Corpus, Document, Tokenizer
from colossus.data.readers import HUB_PREFIX, Skips, is_hub, read_documents
from colossus.errors import DataError
from colossus.evaluate.windows import Piece
from colossus.spec.data import Source

_ENCODE_BYTES = 1 << 20
"""Text handed to the tokenizer at a time; short documents go together."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of a source: whose loss is counted together."""

    source: int
    """Index of its source."""
    name: str
    """As readers call it: relative to a directory."""


def check_readable(sources: Sequence[Source]) -> None:
    """Raises DataError for a source that is not on this machine."""
    for source in sources:
        if is_hub(source):
            raise DataError(
                f"{source.path} is a dataset on the Hugging Face hub, which evaluation does not fetch; download it "
                f"and name its files (`colossus data prepare --data {HUB_PREFIX}…` brings one here for training)"
            )


def text_pieces(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    files: list[File],
    *,
    opening: Sequence[int] = (),
    max_bytes: int | None = None,
    skips: Skips | None = None,
) -> Iterator[Piece]:
    """The documents of all sources in order. Appends to `files` as it meets them; a piece's owner is an index of it.

    opening: what a document begins with; empty: END, as in training. max_bytes: of each source, so many UTF-8
    bytes; the document that they end in is cut at a character. Raises DataError as `read_documents` does, and when
    a source has no text.
    """
    skips = skips if skips is not None else Skips()
    check_readable(sources)
    opening = opening or (tokenizer.end_of_document,)
    for index, source in enumerate(sources):
        before, num_files = dict(skips.counts), len(files)
        documents = _up_to(read_documents(source, index, skips), max_bytes)
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([document.text for document, _ in batch])
            for (document, whole), ids in zip(batch, encoded, strict=True):
                file = File(index, document.file)
                if len(files) == num_files or files[-1] != file:
                    files.append(file)
                yield Piece.of(
                    ids.astype(np.int64),
                    opening=opening,
                    end=tokenizer.end_of_document,
                    num_bytes=len(document.data),
                    owner=len(files) - 1,
                    whole=whole,
                )
        if len(files) == num_files:
            why = f": {skips}" if dict(skips.counts) != before else ""
            raise DataError(f"there is no text in {source.path!r}{why}")


def held_out_pieces(corpus: Corpus, files: list[File]) -> Iterator[Piece]:
    """The held-out documents of a corpus as training reads them, source after source; the owner is the source.

    Raises DataError when nothing is held out.
    """
    if not corpus.heldout_tokens:
        raise DataError(
            "the run's corpus has no held-out text: no document was held out; give --data, or train with a larger "
            "data.heldout_fraction"
        )
    for index, record in enumerate(corpus.manifest.sources):
        files.append(File(index, record.source.path))
        stream = corpus.heldout_stream(index)
        ends = stream.document_ends()
        for (first, first_byte), (last, last_byte) in pairwise(ends):
            tokens = np.empty(last - first, np.int64)
            stream.copy(int(first), tokens)
            yield Piece.of(
                tokens[1:],
                opening=tokens[:1].tolist(),
                end=corpus.end_of_document,
                num_bytes=int(last_byte - first_byte),
                owner=index,
            )


def _up_to(documents: Iterable[Document], max_bytes: int | None) -> Iterator[tuple[Document, bool]]:
    """Documents up to so many bytes, and whether each is whole."""
    left = max_bytes
    for document in documents:
        if left is None:
            yield document, True
            continue
        data = document.data[:left].decode("utf-8", "ignore").encode()
        if data:
            yield document._replace(data=data), len(data) == len(document.data)
        left -= len(data)
        if len(data) < len(document.data) or not left:
            return


def _batches(documents: Iterable[tuple[Document, bool]]) -> Iterator[list[tuple[Document, bool]]]:
    batch: list[tuple[Document, bool]] = []
    num_bytes = 0
    for document, whole in documents:
        batch.append((document, whole))
        num_bytes += len(document.data)
        if num_bytes >= _ENCODE_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch
