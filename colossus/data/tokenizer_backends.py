"""What tokenizer libraries do for us, and which of a tokenizer's tokens ends a document."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from colossus.data.beside import CONFIG_NAME, Beside
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
