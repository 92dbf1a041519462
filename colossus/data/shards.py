"""Token shards: flat files of ids, an index of documents beside each, and windows over many shards as one
stream.

`NNNNN.tokens`: ids in the corpus's dtype, little-endian. `NNNNN.index`: int64 [documents + 1, 2]; row d holds
the tokens and the UTF-8 bytes before document d. No document lies in two shards.
"""

import os
from array import array
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from colossus.data.manifest import ShardRecord, SplitRecord
from colossus.data.storage import hash_file, publish, temporary_name
from colossus.errors import DataError

SHARD_TOKENS = 64_000_000
"""Tokens per shard: 128 MB at two bytes; a shard ends with the document that reaches it."""
SHARD_DOCUMENTS = 1_000_000
"""Documents per shard at the most: 16 MB of index while it is written."""
OPEN_SHARDS = 1024
"""Memory maps kept at a time, well under what one process may have."""

TokenType = Literal["uint16", "uint32"]
Tokens = npt.NDArray[Any]


def token_dtype(vocab_size: int) -> TokenType:
    """The smallest dtype that holds every id below `vocab_size`. Raises DataError above 2^32."""
    if vocab_size <= 2**16:
        return "uint16"
    if vocab_size <= 2**32:
        return "uint32"
    raise DataError(
        f"a vocabulary of {vocab_size:,} entries does not fit in token ids of 32 bits ({2**32:,})"
    )


def index_name(tokens_name: str) -> str:
    """The index that belongs to a token file."""
    return tokens_name.removesuffix(".tokens") + ".index"


class ShardWriter:
    """Writes one shard; it gets its names when it is whole."""

    def __init__(self, path: Path, dtype: TokenType) -> None:
        import xxhash

        self._path = path
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._largest = np.iinfo(dtype).max
        self._file = temporary_name(path).open("wb")
        self._hash = xxhash.xxh3_64()
        self._ends = array("q", (0, 0))
        self.tokens = 0
        self.documents = 0
        self.bytes = 0

    def add(self, ids: npt.NDArray[np.uint32], num_bytes: int) -> None:
        """Appends one document: its ids with END first, and the UTF-8 bytes of its text."""
        if int(ids.max()) > self._largest:
            raise DataError(f"token id {int(ids.max())} does not fit in {self._dtype}")
        content = ids.astype(self._dtype).tobytes()
        self._file.write(content)
        self._hash.update(content)
        self.tokens += len(ids)
        self.documents += 1
        self.bytes += num_bytes
        self._ends.extend((self.tokens, self.bytes))

    def close(self, directory: Path) -> ShardRecord | None:
        """Publishes the shard, named relative to `directory`; a shard without documents leaves nothing."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if not self.documents:
            temporary_name(self._path).unlink()
            return None
        index = self._path.with_suffix(".index")
        with temporary_name(index).open("wb") as out:
            np.array(self._ends, dtype="<i8").tofile(out)
            out.flush()
            os.fsync(out.fileno())
        index_hash = hash_file(temporary_name(index))
        publish(temporary_name(index), index)
        publish(temporary_name(self._path), self._path)
        return ShardRecord(
            file=self._path.relative_to(directory).as_posix(),
            tokens=self.tokens,
            documents=self.documents,
            tokens_hash=self._hash.hexdigest(),
            index_hash=index_hash,
        )


class TokenStream:
    """All shards of one split of one source as one ring of tokens: after the last comes the first.

    The ring closes naturally: the first token is END, which is also what follows the last document.
    """

    def __init__(self, directory: Path, split: SplitRecord, dtype: TokenType) -> None:
        self.directory = directory
        self.split = split
        self.num_tokens = split.tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._starts = [0, *accumulate(shard.tokens for shard in split.shards)]
        self._maps: OrderedDict[int, Tokens] = OrderedDict()

    def copy(self, start: int, out: Tokens) -> None:
        """Fills `out` (1-d, at most the ring's length) with the tokens from `start` on, around the end."""
        start %= self.num_tokens
        filled = 0
        while filled < len(out):
            shard = bisect_right(self._starts, start) - 1
            begin = start - self._starts[shard]
            part = self._map(shard)[begin : begin + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            start = (start + len(part)) % self.num_tokens

    def document_ends(self) -> npt.NDArray[np.int64]:
        """int64 [documents + 1, 2]: tokens and bytes of this stream before each document; 16 bytes a
        document."""
        parts = [np.zeros((1, 2), np.int64)]
        for shard in self.split.shards:
            index = np.fromfile(self.directory / index_name(shard.file), "<i8").reshape(-1, 2)
            parts.append(index[1:] + parts[-1][-1])
        return np.concatenate(parts)

    def _map(self, shard: int) -> Tokens:
        tokens = self._maps.get(shard)
        if tokens is None:
            record = self.split.shards[shard]
            path = self.directory / record.file
            try:
                tokens = np.memmap(path, self._dtype, mode="r", shape=(record.tokens,))
            except (OSError, ValueError) as error:
                raise DataError(
                    f"cannot map {str(path)!r} ({record.tokens:,} tokens): {error}; prepare again"
                ) from error
            # A plain view: indexing a memmap costs several times more than indexing an array.
            tokens = tokens.view(np.ndarray)
            self._maps[shard] = tokens
            if len(self._maps) > OPEN_SHARDS:
                self._maps.popitem(last=False)
        return tokens
