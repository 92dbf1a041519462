"""What a run is for: how far to train, what to make small, and what must not be exceeded."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from colossus.spec.base import Frozen
from colossus.spec.model import Positive

Amount = Annotated[float, Field(gt=0)]
Objective = Literal["time", "cost", "energy"]


class Goal(Frozen):
    """How far to train, given as `tokens` or as the `loss` to reach, one of the two; and on what terms.

    Of the plans that keep all limits the planner takes the one with the least `objective`. A limit that is
    absent does not bind. The planner, not this value, knows which names `fixed` can have.
    """

    tokens: Positive | None = None
    loss: Amount | None = None
    """Final training loss in nats per token, turned into tokens by a scaling law."""
    objective: Objective = "time"
    deadline_days: Amount | None = None
    budget_usd: Amount | None = None
    max_power_watts: Amount | None = None
    """Of the whole facility, cooling included."""
    max_global_batch_sequences: Positive | None = None
    fixed: dict[str, Positive | Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    """Choices that are made already, by name: `{"pp": 16, "precision": "fp8"}`."""

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if (self.tokens is None) == (self.loss is None):
            given = "neither" if self.tokens is None else f"tokens {self.tokens:,} and loss {self.loss}"
            raise ValueError(f"a goal names either tokens or a loss to reach; given: {given}")
        return self
