"""Text ↔ token ids: a byte-level BPE trained here, or a tokenizer that exists.

A stream of documents is `END tokens(text) END tokens(text) …`: END opens each document and, as the next token
to predict, closes the one before. So END must come from document borders alone, never from text that spells
it.
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from colossus.data.beside import CONFIG_NAME, Beside, read_beside
from colossus.data.tokenizer_backends import END_OF_DOCUMENT, Backend, Ids, JsonBackend, SentencePieceBackend
from colossus.errors import DataError

TokenizerKind = Literal["json", "sentencepiece"]
FILE_NAMES: dict[TokenizerKind, str] = {"json": "tokenizer.json", "sentencepiece": "tokenizer.model"}

PIECES = "|".join(
    (
        r"[\r\n]{1,32}[ \t]{0,64}",  # line ends with the indentation that follows: learnable as one
        r"(?:[^\S\r\n]|[^\s\p{L}\p{M}\p{N}])?[\p{L}\p{M}]{1,32}",  # a word, one sign or space before: `_name`
        r"\p{N}{1,3}",  # digits in small groups, so that numbers do not fill the vocabulary
        r"[^\S\r\n]?[^\s\p{L}\p{M}\p{N}]{1,32}",  # a run of signs
        r"[^\S\r\n]{1,64}(?!\S)",  # a run of spaces, all but the one that belongs to the next word
        r"[^\S\r\n]{1,64}",
    )
)
"""Where BPE may not merge across. Every character falls in one piece, so text comes back exactly.

Pieces are bounded: learning takes time and memory by their length, and a genome or a script without spaces
has none.
"""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        kind: `json` (the `tokenizers` library's file) or `sentencepiece`.
        vocab_size: one more than the largest id.
        end_of_document: the id that stands before every document; no text encodes to it.
        opening: the ids that its files put before a text (`<s>`), as models that others trained expect; empty where
            they put nothing (GPT-2, Qwen). `encode` leaves them out. What is trained here expects END.
        fingerprint: 16 hex digits of the file's bytes.
    """

    def __init__(self, kind: TokenizerKind, content: bytes, where: str, beside: Beside | None = None) -> None:
        """From a file's bytes; `where` names it in messages. Raises DataError when they are no tokenizer."""
        import xxhash

        self.kind = kind
        self._content = content
        beside = beside or Beside()
        self._backend: Backend = (
            JsonBackend(content, where, beside)
            if kind == "json"
            else SentencePieceBackend(content, where, beside)
        )
        self.vocab_size = self._backend.vocab_size
        self.end_of_document = self._backend.end_of_document
        self.opening = self._opening(beside)
        self.fingerprint: str = xxhash.xxh3_64_hexdigest(content)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of at most `vocab_size` entries: END, 256 bytes, and merges learned from `texts`.

        The same texts give the same tokenizer. Few texts give fewer entries: look at `vocab_size`.
        """
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Library
        from tokenizers.decoders import ByteLevel

        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        library.decoder = ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        library.train_from_iterator(texts, trainer)
        return cls("json", library.to_str().encode(), "the trained tokenizer")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """From a `tokenizer.json`, a SentencePiece `.model`, or a folder that holds one. Raises DataError.

        Files beside it (tokenizer_config.json and others) are asked for the `eos_token` where no name of `END_NAMES`
        is in the vocabulary, and for the `bos_token` where they say whether it is put before texts.
        """
        if path.is_dir():
            found = [path / name for name in FILE_NAMES.values() if (path / name).is_file()]
            if not found:
                raise DataError(f"{str(path)!r} holds no {' or '.join(FILE_NAMES.values())}")
            path = found[0]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {str(path)!r}: {error.strerror}") from error
        kind: TokenizerKind = "json" if content.lstrip()[:1] == b"{" else "sentencepiece"
        return cls(kind, content, repr(str(path)), read_beside(path.parent))

    def save(self, directory: Path) -> Path:
        """Writes the file into `directory` under its usual name; returns its path. `load` takes either.

        Where only a file beside it told what END is, one that does so is written, too.
        """
        from colossus.data.storage import write_atomically

        path = directory / FILE_NAMES[self.kind]
        write_atomically(path, self._content)
        if self._backend.end_told_beside and not (directory / CONFIG_NAME).exists():
            end = self._backend.end_text
            usual = "PreTrainedTokenizerFast" if self.kind == "json" else "LlamaTokenizer"
            record = {"tokenizer_class": usual, "bos_token": end, "eos_token": end, "add_bos_token": True}
            write_atomically(directory / CONFIG_NAME, json.dumps(record, ensure_ascii=False).encode())
        return path

    def encode(self, text: str) -> Ids:
        """Ids of one text, uint32 [tokens]; END is not added and never occurs, whatever the text spells."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text. Memory grows with the texts' size: hand over bounded batches."""
        encoded = self._backend.encode_batch(texts)
        for index, ids in enumerate(encoded):
            if (ids == self.end_of_document).any():
                encoded[index] = self._encode_around_end(texts[index])
        return encoded

    def _encode_around_end(self, text: str) -> Ids:
        """For a library that takes the spelling of END for END itself: cut the spelling in two."""
        spelling = self._backend.end_text
        middle = len(spelling) // 2
        parts: list[str] = [""]
        for index, part in enumerate(text.split(spelling)):
            if index:
                parts[-1] += spelling[:middle]
                parts.append(spelling[middle:])
            parts[-1] += part
        ids = np.concatenate(self._backend.encode_batch(parts))
        if (ids == self.end_of_document).any():
            raise DataError(
                f"this tokenizer makes its end-of-document token {spelling!r} out of ordinary text"
            )
        return ids

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """The text of ids; END comes out as its spelling. Bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(token) for token in ids])

    def controls(self) -> dict[str, int]:
        """Ids of the tokens that templates write to steer a model, by spelling: `<|im_start|>`."""
        return self._backend.controls()

    def encode_without_controls(self, text: str) -> Ids:
        """Ids of a text that someone else wrote, uint32 [tokens]: no control token, whatever the text spells."""
        return self._backend.encode_without_controls(text)

    def _opening(self, beside: Beside) -> tuple[int, ...]:
        if beside.puts_begin is False:
            return ()
        begin = None if beside.begin is None else self._backend.id_of(beside.begin)
        if beside.puts_begin and begin is not None:
            return (begin,)
        return self._backend.put_before_text()

    def stream(self) -> "StreamingDecoder":
        """Decodes ids one at a time, for generation."""
        return StreamingDecoder(self._backend)


class StreamingDecoder:
    """Ids in, text out as soon as it is whole: a character in several tokens comes with the last of them."""

    WAITING = 4
    """A UTF-8 character has at most four bytes, so at most four tokens are held back."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._bytes = backend.token_bytes()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._seen: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; often a word, sometimes nothing yet."""
        if self._bytes is not None:
            return self._utf8.decode(self._bytes[token])
        self._waiting.append(token)
        text = self._waiting_text()
        if text.endswith("\ufffd") and len(self._waiting) < self.WAITING:
            return ""
        # Decoding depends on the tokens just before (a leading space, say), so keep those and no more.
        self._seen = (self._seen + self._waiting)[-self.WAITING :]
        self._waiting = []
        return text

    def finish(self) -> str:
        """What is left when no more ids come: an unfinished character becomes U+FFFD."""
        if self._bytes is not None:
            return self._utf8.decode(b"", final=True)
        text = self._waiting_text() if self._waiting else ""
        self._seen, self._waiting = [], []
        return text

    def _waiting_text(self) -> str:
        before = self._backend.decode(self._seen) if self._seen else ""
        return self._backend.decode(self._seen + self._waiting)[len(before) :]
