"""Text ↔ token ids: a byte-level BPE trained here, or a tokenizer that exists.

A stream of documents is `END tokens(text) END tokens(text) …`: END opens each document and, as the next token
to predict, closes the one before. So END must come from document borders alone, never from text that spells
it.
"""

import codecs
import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from colossus.data.beside import CONFIG_NAME, Beside, read_beside
from colossus.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
END_NAMES = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<end_of_text>",
    "<EOT>",
    "<｜end▁of▁sentence｜>",
    "<EOS_TOKEN>",
)
"""Looked for in a loaded tokenizer, in this order; END of one that has none of them is its `eos_token`.

Not the other way round: the `eos_token` of the files beside it is often the end of a turn (`<|im_end|>`, `<|eot_id|>`),
and a name is found wherever the tokenizer's file goes alone."""

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

Ids = npt.NDArray[np.uint32]


class Backend(Protocol):
    """What a tokenizer library does for us."""

    vocab_size: int
    end_of_document: int
    end_text: str
    end_told_beside: bool
    """Whether the file alone does not say what END is."""

    def id_of(self, spelling: str) -> int | None:
        """The token that is spelled so; None if there is none."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, nothing added."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def token_bytes(self) -> list[bytes] | None:
        """The bytes that each id stands for, when the library's decoding is their plain concatenation."""

    def controls(self) -> dict[str, int]:
        """Ids of control tokens by spelling."""

    def encode_without_controls(self, text: str) -> Ids:
        """Ids of a text, none of them a control token's."""

    def put_before_text(self) -> tuple[int, ...]:
        """Ids that the file puts before a text."""


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


@contextlib.contextmanager
def _no_panic() -> Iterator[None]:
    """What the library breaks down over as a DataError. Its panics are no Exceptions, and have no public name."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"the tokenizer broke down: {error}") from None


class JsonBackend:
    """A `tokenizer.json` in the `tokenizers` library."""

    def __init__(self, content: bytes, where: str, beside: Beside) -> None:
        from tokenizers import Tokenizer as Library

        try:
            description = json.loads(content)
            end_text = _end_name(_vocabulary(description), where, beside)
            # Only a token marked special can be kept from matching text, below.
            for token in description.get("added_tokens") or ():
                token["special"] = token["special"] or token["content"] == end_text
            with _no_panic():
                self._library = Library.from_str(json.dumps(description))
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{where} is not a tokenizer.json: {error}") from error
        # What a file carries for other uses would cut, pad or swallow our text.
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True
        self._description = description
        self._plain: Any = None
        self.end_text: str = end_text
        self.end_told_beside = end_text not in END_NAMES
        self.end_of_document: int = self._library.get_vocab(with_added_tokens=True)[end_text]
        self.vocab_size: int = max(self._library.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text."""
        with _no_panic():
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        text: str = self._library.decode(list(ids), skip_special_tokens=False)
        return text

    def controls(self) -> dict[str, int]:
        """The added tokens, but for those that stand for white space."""
        added = self._description.get("added_tokens") or ()
        return {token["content"]: token["id"] for token in added if token["content"].strip()}

    def encode_without_controls(self, text: str) -> Ids:
        """By a copy of the library's object to which all controls are special, and special ones are not matched."""
        if self._plain is None:
            from tokenizers import Tokenizer as Library

            description = json.loads(json.dumps(self._description))
            for token in description.get("added_tokens") or ():
                token["special"] = token["special"] or bool(token["content"].strip())
            self._plain = Library.from_str(json.dumps(description))
            self._plain.no_truncation()
            self._plain.no_padding()
            self._plain.encode_special_tokens = True
        with _no_panic():
            return np.array(self._plain.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def id_of(self, spelling: str) -> int | None:
        """By the vocabulary and the added tokens."""
        found: int | None = self._library.token_to_id(spelling)
        return found

    def put_before_text(self) -> tuple[int, ...]:
        """What the post-processor adds in front, and not what it adds behind."""
        for text in ("a", "0", " ", "\u4e00"):
            plain = self._library.encode(text, add_special_tokens=False).ids
            if not plain:  # a vocabulary that lacks the letter
                continue
            ids = self._library.encode(text, add_special_tokens=True).ids
            starts = range(len(ids) - len(plain) + 1)
            return tuple(ids[: next((i for i in starts if ids[i : i + len(plain)] == plain), 0)])
        return ()

    def token_bytes(self) -> list[bytes] | None:
        """Bytes of each id, for byte-level tokenizers."""
        if (self._description.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        alphabet = byte_alphabet()
        added = {token["id"]: token["content"] for token in self._description.get("added_tokens") or ()}
        table = [b""] * self.vocab_size
        for text, token in self._library.get_vocab(with_added_tokens=True).items():
            if token in added:
                table[token] = added[token].encode()
            elif all(character in alphabet for character in text):
                table[token] = bytes(alphabet[character] for character in text)
            else:
                return None
        return table


class SentencePieceBackend:
    """A SentencePiece `.model`."""

    def __init__(self, content: bytes, where: str, beside: Beside) -> None:
        import sentencepiece

        if not content:
            raise DataError(f"{where} is neither a tokenizer.json nor a SentencePiece model: it is empty")
        try:
            self._library = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size = int(self._library.vocab_size())
        except Exception as error:
            raise DataError(
                f"{where} is neither a tokenizer.json nor a SentencePiece model: {error}"
            ) from error
        if not self.vocab_size:
            raise DataError(f"{where} is neither a tokenizer.json nor a SentencePiece model: it is empty")
        self.end_of_document = int(self._library.eos_id())
        self.end_told_beside = False
        if self.end_of_document < 0:
            names = {str(self._library.id_to_piece(token)): token for token in range(self.vocab_size)}
            name = _end_name(names, where, beside)
            self.end_of_document, self.end_told_beside = names[name], name not in END_NAMES
        self.end_text = str(self._library.id_to_piece(self.end_of_document))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text."""
        return [np.array(ids, dtype=np.uint32) for ids in self._library.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; END, which the library leaves out, as its spelling."""
        parts: list[str] = []
        run: list[int] = []
        for token in (*ids, self.end_of_document):
            if token == self.end_of_document:
                parts.append(self._library.decode(run) if run else "")
                run = []
            else:
                run.append(token)
        return self.end_text.join(parts)

    def controls(self) -> dict[str, int]:
        """Control pieces, `<s>` and `</s>` among them."""
        ids = range(self.vocab_size)
        kept = [token for token in ids if self._library.is_control(token)]
        return {str(self._library.id_to_piece(token)): token for token in kept}

    def encode_without_controls(self, text: str) -> Ids:
        """As always: the library makes no control piece out of text."""
        return self.encode_batch([text])[0]

    def id_of(self, spelling: str) -> int | None:
        """By the pieces."""
        token = int(self._library.piece_to_id(spelling))
        return token if self._library.id_to_piece(token) == spelling else None

    def put_before_text(self) -> tuple[int, ...]:
        """The piece that begins a text, where there is one."""
        begin = int(self._library.bos_id())
        return (begin,) if begin >= 0 else ()

    def token_bytes(self) -> list[bytes] | None:
        """None: a leading space depends on what stands before."""
        return None


def _vocabulary(description: dict[str, Any]) -> dict[str, int]:
    model = description["model"]
    words = model["vocab"]
    names = {entry[0]: i for i, entry in enumerate(words)} if isinstance(words, list) else dict(words)
    return names | {token["content"]: token["id"] for token in description.get("added_tokens") or ()}


def _end_name(vocabulary: Mapping[str, int], where: str, beside: Beside) -> str:
    for name in END_NAMES:
        if name in vocabulary:
            return name
    spellings = {token: name for name, token in vocabulary.items()}
    for end in beside.ends:
        found = spellings.get(end) if isinstance(end, int) else end
        if found is not None and found in vocabulary:
            return found
    raise DataError(
        f"{where} has no end-of-document token; looked for {', '.join(END_NAMES)}, and for the eos_token of a "
        f"{CONFIG_NAME} beside it"
    )


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level tokenizers write for each byte, reversed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }
