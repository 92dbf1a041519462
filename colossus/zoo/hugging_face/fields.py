"""Reading a config.json field by field: each of the right type and of a possible size, or a sentence that says no."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colossus.errors import ConfigError

MAX_SIZES = {
    "vocab_size": 10_000_000,
    "max_position_embeddings": 1_000_000_000,
    "n_positions": 1_000_000_000,
    "num_hidden_layers": 10_000,
    "n_layer": 10_000,
    "num_experts": 20_000,
    "num_local_experts": 20_000,
    "n_routed_experts": 20_000,
}
"""What no model comes near: a larger number is a mistake, or made to exhaust memory."""

MAX_SIZE = 2_000_000
"""The same, for widths and numbers of heads."""


@dataclass(frozen=True, slots=True)
class Fields:
    """A config.json's fields, or those of a table in it."""

    values: Mapping[str, Any]
    where: str = ""
    """The table's name with a dot after it; "" at the top."""

    def has(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1. Raises ConfigError if it is none, is absurdly large, or is not there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a whole number of at least 1")
        if value > (limit := MAX_SIZES.get(key, MAX_SIZE)):
            raise ConfigError(f"{self.where}{key} is {shown(value)}; more than {limit:,} is no model's")
        return value

    def count(self, key: str, default: int = 0) -> int:
        """A whole number that may be 0, as which null and -1 count, too; `default` where there is no such field."""
        if key not in self.values:
            return default
        value = self.values[key]
        if value is None:
            return 0
        return 0 if value in (0, -1) and not isinstance(value, bool) else self.integer(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises ConfigError if it is none, or is not there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise self.wrong(key, "a finite number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.number(key, default)
        if value <= 0:
            raise self.wrong(key, "a number above 0")
        return value

    def cap(self, key: str) -> float | None:
        """A soft cap; null, 0 and below mean none."""
        value = self.number(key, 0.0)
        return value if value > 0 else None

    def truth(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "text")
        return value

    def table(self, key: str) -> "Fields | None":
        """A table of fields; None where it is not there, is null or is empty."""
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "a table of fields")
        return Fields(value, f"{self.where}{key}.")

    def only(self, key: str, *allowed: Any, default: Any = None) -> None:
        """Raises ConfigError if the field is there and is none of what this architecture is read with."""
        value = self.values.get(key, default)
        if value is None or any(type(value) is type(one) and value == one for one in allowed):
            return
        known = " or ".join(shown(one) for one in allowed)
        raise ConfigError(f"{self.where}{key} is {shown(value)}; Colossus can read {known} there")

    def wrong(self, key: str, wanted: str) -> ConfigError:
        """The error of a field that is not what it must be."""
        value = self.values.get(key)
        if value is None:
            return ConfigError(f"{self.where}{key} is missing; it must be {wanted}")
        return ConfigError(f"{self.where}{key} is {shown(value)}; it must be {wanted}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value


def _finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:  # an integer that no float can hold
        return False


def shown(value: Any) -> str:
    """As JSON writes it, shortened."""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
