"""Conversations: messages to token ids, by the template that a model was taught with.

Nothing that stands in a message becomes a control token, whatever it spells: the spellings are broken up by a character
that no message has before the template writes the conversation, and the character is taken out of the text between
control tokens, which is encoded with none of them recognised.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from colossus.data import Tokenizer
from colossus.errors import ConfigError
from colossus.generate.load import LoadedModel
from colossus.generate.template import render
from colossus.zoo.chat_templates import chat_template_of

Message = Mapping[str, str]
"""`role` and `content`."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_BREAKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Characters that Unicode gives no meaning and keeps for use within a program."""
_THOUGHTS = ("<think>", "</think>")
"""Templates cut an assistant's own message by them."""


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How one model's conversations are written."""

    tokenizer: Tokenizer
    template: str
    special_tokens: Mapping[str, str]
    opening: tuple[int, ...]
    """Ids before what the template writes."""
    ends: frozenset[int]
    stop: tuple[str, ...]

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The conversation up to where the answer begins. Raises ConfigError for what the template does not take."""
        for message in messages:
            if message["role"] not in ROLES:
                raise ConfigError(f"the role is {message['role']!r}; known: {', '.join(ROLES)}")
        spoken = "".join(message["content"] for message in messages)
        for message in messages:
            try:
                message["content"].encode()
            except UnicodeEncodeError as error:  # a terminal hands over wrong bytes as half surrogates
                before = message["content"][: error.start][-20:]
                raise ConfigError(f"a message is not UTF-8 text: a wrong byte after {before!r}") from None
        mark = next((one for one in _BREAKS if one not in spoken), None)
        if mark is None:
            raise ConfigError("the messages have all of the characters U+FDD0 to U+FDEF, which no text has")
        controls = self.tokenizer.controls()
        harmless = [
            {**message, "content": _broken_up(message["content"], message["role"], controls, mark)}
            for message in messages
        ]
        written = render(self.template, harmless, self.special_tokens)
        ids = list(self.opening)
        for i, part in enumerate(_split(written, controls)):
            if i % 2:
                ids.append(controls[part])
            elif text := part.replace(mark, ""):
                ids += map(int, self.tokenizer.encode_without_controls(text))
        return ids or [self.tokenizer.end_of_document]

    def fit(self, messages: Sequence[Message], max_tokens: int) -> tuple[list[int], int]:
        """The ids of a conversation that takes at most `max_tokens`, and how many of its oldest messages were left
        out for that. What the system says at the beginning stays.

        Raises ConfigError where the last message alone is too long.
        """
        first = [message for message in messages[:1] if message["role"] in ("system", "developer")]
        rest = list(messages[len(first) :])
        num_dropped = 0
        while True:
            ids = self.ids([*first, *rest])
            if len(ids) <= max_tokens:
                return ids, num_dropped
            if len(rest) <= 1:
                raise ConfigError(
                    f"the conversation takes {len(ids):,} tokens with its last message alone, and there is room for "
                    f"{max_tokens:,}"
                )
            turn = next(
                (i for i, message in enumerate(rest[1:], 1) if message["role"] == "user"), len(rest) - 1
            )
            rest, num_dropped = rest[turn:], num_dropped + turn


def chat_format(loaded: LoadedModel) -> ChatFormat:
    """The directory's own template, else its family's, else a plain transcript."""
    controls = loaded.tokenizer.controls()
    special, ends = loaded.special_tokens, set(loaded.borders.ends)
    if (end := special.get("eos_token")) in controls:
        ends.add(controls[end])
    if loaded.chat_template is not None:
        return ChatFormat(loaded.tokenizer, loaded.chat_template, special, (), frozenset(ends), ())
    family = chat_template_of(loaded.name, controls)
    ends |= {controls[end] for end in family.ends if end in controls}
    opening = () if family.controls else loaded.borders.opening
    return ChatFormat(loaded.tokenizer, family.jinja, special, opening, frozenset(ends), family.stop)


def _broken_up(text: str, role: str, controls: Mapping[str, int], mark: str) -> str:
    """`text` in which no control is spelled, also not together with what a template writes before and after it."""
    parts = _split(text, {one: 0 for one in controls if role != "assistant" or one not in _THOUGHTS})
    text = "".join(part[:1] + mark + part[1:] if i % 2 else part for i, part in enumerate(parts))
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
    inner = text[begin:end]
    if any(inner.startswith(one[i:]) for one in controls for i in range(1, len(one))):
        inner = mark + inner
    if any(inner.endswith(one[:i]) for one in controls for i in range(1, len(one))):
        inner += mark
    return text[:begin] + inner + text[end:]


def _split(text: str, controls: Mapping[str, int]) -> list[str]:
    """Text, control, text, …: of controls that begin at the same place the longest."""
    if not controls:
        return [text]
    longest_first = sorted(controls, key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
