"""How long: one value in place of a step count, a token count, a time limit and rules for which wins."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_serializer, model_validator

from colossus.spec.base import Frozen
from colossus.units import format_count, parse_number

Unit = Literal["steps", "tokens", "seconds", "cpu_seconds"]

_UNITS: dict[str, tuple[Unit, float]] = {
    "step": ("steps", 1), "steps": ("steps", 1),
    "token": ("tokens", 1), "tokens": ("tokens", 1),
    "s": ("seconds", 1), "second": ("seconds", 1), "seconds": ("seconds", 1),
    "minute": ("seconds", 60), "minutes": ("seconds", 60), "min": ("seconds", 60),
    "hour": ("seconds", 3600), "hours": ("seconds", 3600), "h": ("seconds", 3600),
    "cpu_seconds": ("cpu_seconds", 1), "cpu_second": ("cpu_seconds", 1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come, in every unit that a duration can be given in."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Wall time of training, over all the times that the run was resumed."""
    cpu_seconds: float = 0.0
    """CPU time of the process on training, start-up included; preparing a corpus and evaluating are not."""


class Duration(Frozen):
    """A span of a run: `Duration.parse("3 minutes")`, `"10M tokens"`, `"2000 steps"`, `"75 cpu_seconds"`.

    In TOML it is written as that string. A span in steps or tokens ends at the same step on every machine;
    a span of time ends where the clock says.
    """

    amount: Annotated[float, Field(gt=0)]
    unit: Unit

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return cls._split(value) if isinstance(value, str) else value

    @model_serializer
    def _to_text(self) -> str:
        return str(self)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError when the text is not a count and a unit."""
        return cls.model_validate(text)

    @staticmethod
    def _split(text: str) -> dict[str, Any]:
        count, _, name = text.strip().partition(" ")
        if name.strip().lower() not in _UNITS:
            raise ValueError(
                f"{text!r} is not a duration; write for example '2000 steps', '10M tokens' or '3 minutes'"
            )
        unit, scale = _UNITS[name.strip().lower()]
        return {"amount": parse_number(count) * scale, "unit": unit}

    def __str__(self) -> str:
        """What `parse` gives the same duration for."""
        amount, unit = self.amount, str(self.unit)
        if unit == "seconds" and amount % 60 == 0 and amount / 60 * 60 == amount:
            amount, unit = amount / 60, "minutes"
        if amount == 1:
            unit = unit.removesuffix("s")
        return f"{int(amount) if amount == int(amount) else amount} {unit}"

    def describe(self) -> str:
        """For people: `"10M tokens"`."""
        return f"{format_count(self.amount)} tokens" if self.unit == "tokens" else str(self)

    @property
    def on_the_clock(self) -> bool:
        """Whether it is measured in time, and so ends at a step that depends on the machine."""
        return self.unit in ("seconds", "cpu_seconds")

    def done(self, progress: Progress) -> float:
        """The part of this span that `progress` has used, from 0 up; 1 and more is the end."""
        return float(getattr(progress, self.unit)) / self.amount

    def times_passed(self, progress: Progress) -> int:
        """How many whole spans fit into `progress`: something done every span is due when this grows."""
        return int(self.done(progress))
