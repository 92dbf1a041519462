"""What the files beside a tokenizer say of it: what ends a text, and whether something is put before one."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_NAME = "tokenizer_config.json"
MAX_BYTES = 16_000_000
"""No such file is longer; one that is counts as not there."""


@dataclass(frozen=True, slots=True)
class Beside:
    """Of a tokenizer that lies alone, nothing."""

    ends: tuple[str | int, ...] = ()
    """Spellings and ids of what ends a text, as each file says, the tokenizer's own first. Models that converse often
    have the mark there that ends a turn."""
    begin: str | None = None
    puts_begin: bool | None = None
    """Whether `begin` is put before every text, whatever the tokenizer's own file has; None: as that has it."""


def read_beside(directory: Path) -> Beside:
    """From tokenizer_config.json, special_tokens_map.json, generation_config.json and config.json, as far as they are
    there. What cannot be read says nothing."""
    config = _table(directory / CONFIG_NAME)
    marks = _table(directory / "special_tokens_map.json")
    spelled = [_spelling(table.get("eos_token")) for table in (config, marks)]
    numbered = [
        _table(directory / name).get("eos_token_id") for name in ("generation_config.json", "config.json")
    ]
    ids = [one for found in numbered for one in (found if isinstance(found, list) else [found])]
    puts_begin = config.get("add_bos_token")
    return Beside(
        ends=(*filter(None, spelled), *(one for one in ids if type(one) is int)),
        begin=_spelling(config.get("bos_token")) or _spelling(marks.get("bos_token")),
        puts_begin=puts_begin if isinstance(puts_begin, bool) else None,
    )


def _spelling(token: Any) -> str | None:
    """A token is written as text, or as a table with its `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _table(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return {}
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
