"""A plan file says what was planned, to every version that can read it."""

import json

import pytest

from colossus.errors import ConfigError
from colossus.spec.base import fingerprint
from colossus.spec.plan import Plan
from tests.planner.plans import laptop_plan


def test_a_file_of_a_version_with_fewer_fields_is_read() -> None:
    written = json.loads(laptop_plan().to_json())
    for added_since in ("optimizer_state", "replica_sum", "wide_matmuls"):
        del written["plan"][added_since]
    written["fingerprint"] = fingerprint(written["plan"])
    assert Plan.from_json(json.dumps(written)) == laptop_plan()


def test_an_edited_file_is_refused() -> None:
    written = json.loads(laptop_plan().to_json())
    written["plan"]["tokens"] += 1
    with pytest.raises(ConfigError, match="was edited after it was planned"):
        Plan.from_json(json.dumps(written))
