"""The base of all nouns: frozen, strict, unknown keys refused."""

import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Frozen(BaseModel):
    """A value: immutable, compared by content, made only of what its fields name.

    Strict for Python callers (no `"3"` for 3); tuples may be written as lists, as TOML and JSON have no tuples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def fingerprint(self) -> str:
        """16 hex digits that change when any field changes: blake2b of the canonical JSON."""
        return fingerprint(self.model_dump(mode="json"))


def fingerprint(value: Any) -> str:
    """16 hex digits of a JSON-like value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
