"""Goals that can be, and goals that cannot."""

from typing import Any

import pytest
from pydantic import ValidationError

from colossus.spec.goal import Goal


def test_a_goal_survives_json() -> None:
    goal = Goal(
        tokens=15_600_000_000_000, objective="cost", deadline_days=78.0, budget_usd=6e7, max_power_watts=3e7,
        max_global_batch_sequences=2048, fixed={"pp": 16, "precision": "fp8"},
    )  # fmt: skip
    assert Goal.model_validate_json(goal.model_dump_json()) == goal
    assert Goal(loss=2.0).fingerprint() != Goal(loss=2.1).fingerprint()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "either tokens or a loss to reach; given: neither"),
        ({"tokens": 1_000_000, "loss": 2.0}, "given: tokens 1,000,000 and loss 2.0"),
        ({"tokens": 0}, "greater than 0"),
        ({"tokens": 1e12}, "valid integer"),
        ({"loss": -1.0}, "greater than 0"),
        ({"loss": float("nan")}, "greater than 0|finite"),
        ({"tokens": 1, "deadline_days": 0.0}, "greater than 0"),
        ({"tokens": 1, "budget_usd": float("inf")}, "finite"),
        ({"tokens": 1, "max_power_watts": -5.0}, "greater than 0"),
        ({"tokens": 1, "max_global_batch_sequences": 0}, "greater than 0"),
        ({"tokens": 1, "objective": "speed"}, "'time', 'cost' or 'energy'"),
        ({"tokens": 1, "fixed": {"tp": 0}}, "greater than 0"),
        ({"tokens": 1, "fixed": {"tp": True}}, "valid integer"),
        ({"tokens": 1, "fixed": {"precision": ""}}, "at least 1 character"),
        ({"tokens": 1, "max_chips": 8}, "Extra inputs"),
    ],
)
def test_what_is_no_goal(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Goal(**given)


def test_a_goal_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Goal(tokens=1).tokens = 2  # type: ignore[misc]
