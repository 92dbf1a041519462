"""A plan adds up, survives its file, keeps its limits, and says why when there is none."""

import json
import re
from datetime import date

import pytest

from colossus import zoo
from colossus.errors import ConfigError
from colossus.hardware.fleet_text import parse_fleet
from colossus.planner.plan import LARGEST_PUBLISHED_BATCH_TOKENS, largest_batch, make_plan
from colossus.planner.result import Planned
from colossus.spec.goal import Goal
from colossus.spec.plan import Plan

TODAY = date(2026, 11, 1)


def planned(model: str = "llama3-8b", fleet: str = "h100:64", **goal: object) -> Planned:
    goal.setdefault("tokens", 10**11)
    return make_plan(zoo.find(model), parse_fleet(fleet), Goal(**goal), today=TODAY)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dense() -> Planned:
    return planned()


@pytest.fixture(scope="module")
def mixed() -> Planned:
    return planned("llama3-70b", "h100:256+h200:128")


def test_a_plan_adds_up(dense: Planned) -> None:
    plan = dense.plan
    assert (
        plan.layout.num_ranks
        + sum(pool.idle_chips for pool in plan.pools)
        + 8 * sum(pool.spare_nodes for pool in plan.pools)
        == 64
    )
    assert sum(plan.stage_layers) == 32
    assert sum(plan.estimate.step_parts_s.values()) == pytest.approx(plan.estimate.step_time_s.likely)
    assert plan.step_tokens / plan.estimate.step_time_s.likely == pytest.approx(
        plan.estimate.tokens_per_s.likely
    )
    for pool in plan.pools:
        assert pool.peak_bytes <= pool.memory_limit_bytes
    days = plan.tokens / plan.estimate.tokens_per_s.likely / 86_400 / plan.estimate.goodput.likely
    assert plan.estimate.days.likely == pytest.approx(days)


def test_every_estimate_is_a_range(dense: Planned) -> None:
    estimate = dense.plan.estimate
    for name in ("step_time_s", "tokens_per_s", "mfu", "days", "goodput", "energy_mwh", "co2_t", "cost_usd"):
        value = getattr(estimate, name)
        assert 0 < value.low < value.likely < value.high, name


def test_every_choice_has_its_next_best_and_none_is_better(dense: Planned) -> None:
    assert {"tp", "pp", "shard", "precision", "micro_batch", "recompute"} <= set(dense.plan.alternatives)
    assert all(other.step_time_ratio > 0.99 for other in dense.plan.alternatives.values())
    assert dense.plan.alternatives["precision"].value == "bfloat16"


def test_no_point_of_the_front_is_beaten(dense: Planned) -> None:
    front = dense.front
    assert len(front) > 3
    for a in front:
        for b in front:
            better = (
                b.seconds_per_token < a.seconds_per_token * 0.995
                and b.memory_headroom_bytes > a.memory_headroom_bytes + 2**30
                and b.energy_joules_per_token < a.energy_joules_per_token * 0.995
                and b.group_ranks < a.group_ranks
            )
            assert not better


def test_a_plan_file_gives_the_plan_back(mixed: Planned) -> None:
    text = mixed.plan.to_json()
    again = Plan.from_json(text)
    assert again == mixed.plan
    assert again.fingerprint() == mixed.plan.fingerprint()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "cut short"),
        (lambda text: "{}", "is not a plan file: that is an object with"),
        (lambda text: text.replace('"schedule": "', '"schedule": "x'), "schedule"),
        (
            lambda text: json.dumps({**json.loads(text), "plan": {**json.loads(text)["plan"], "tokens": 7}}),
            "edited",
        ),
        (lambda text: re.sub(r'"replica": (\d+)', r'"replica": 1\1', text), "replica groups"),
    ],
)
def test_a_damaged_plan_file_is_refused(mixed: Planned, damage, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=says):
        Plan.from_json(damage(mixed.plan.to_json()), "my.json")


def test_a_mixed_fleet_is_worth_its_parts(mixed: Planned) -> None:
    plan, gain = mixed.plan, mixed.mixture
    assert gain is not None
    assert {pool.node for pool in plan.pools} == {"hgx-h100", "hgx-h200"}
    assert all(ratio >= 1.0 for ratio in gain.without.values())
    assert gain.all_as_weakest >= 0.999
    busy = [pool.busy_s for pool in plan.pools]
    assert min(busy) > 0.9 * max(busy)  # they finish together


@pytest.mark.slow
def test_a_weak_pool_is_left_out() -> None:
    """Eight A100 beside 64 B200: a step that waits for them would be longer than one without."""
    both = planned("llama3-70b", "b200:64+a100-80:8")
    assert [pool.node for pool in both.plan.pools] == ["dgx-b200"]
    alone = planned("llama3-70b", "b200:64")
    assert both.plan.estimate.tokens_per_s.likely >= alone.plan.estimate.tokens_per_s.likely * 0.999


def test_limits_of_the_goal_are_kept() -> None:
    free = planned()
    slow = planned(objective="cost", deadline_days=free.plan.estimate.days.likely * 4)
    assert slow.plan.estimate.cost_usd.likely <= free.plan.estimate.cost_usd.likely
    assert slow.plan.estimate.days.likely <= free.plan.estimate.days.likely * 4 * 1.1
    small = planned(max_global_batch_sequences=64)
    assert small.plan.global_batch_sequences <= 64
    dark = planned(max_power_watts=60e3)
    assert dark.plan.layout.num_ranks <= 60e3 / 1000
    fixed = planned(fixed={"tp": 8, "precision": "bfloat16"})
    assert (fixed.plan.layout.tp, fixed.plan.precision) == (8, "bfloat16")
    assert fixed.plan.estimate.tokens_per_s.likely <= free.plan.estimate.tokens_per_s.likely


@pytest.mark.parametrize(
    ("model", "fleet", "goal", "says"),
    [
        ("llama3.1-405b", "h100:8", {}, r"needs [\d.]+ GiB of [\d.]+ usable .*it fits on [\d,]+ such chips"),
        ("llama3-8b", "h100:64", {"deadline_days": 0.01}, "fastest takes .* days .deadline 0.01"),
        ("llama3-8b", "h100:64", {"budget_usd": 1.0}, "cheapest [\\d,]+ USD"),
        ("llama3-8b", "h100:64", {"max_power_watts": 100.0}, "feed no node"),
        ("llama3-70b", "h100:8", {"fixed": {"tp": 1}}, "with tp=1 fixed"),
    ],
)
def test_what_binds_is_said(model: str, fleet: str, goal: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        planned(model, fleet, **goal)


def test_a_loss_is_turned_into_tokens() -> None:
    with_loss = make_plan(zoo.find("llama3-8b"), parse_fleet("h100:64"), Goal(loss=2.2), today=TODAY)
    assert 1e10 < with_loss.plan.tokens < 1e13
    with pytest.raises(ConfigError, match="loss"):
        make_plan(zoo.find("llama3-8b"), parse_fleet("h100:64"), Goal(loss=1.0), today=TODAY)


def test_the_default_batch() -> None:
    assert largest_batch(Goal(tokens=10**13), 10**13, 8192) == LARGEST_PUBLISHED_BATCH_TOKENS // 8192
    assert largest_batch(Goal(tokens=10**9), 10**9, 1024) * 1024 * 2000 <= 10**9


def test_sequences_beyond_the_context_are_refused() -> None:
    with pytest.raises(ConfigError, match="longer than the context"):
        make_plan(
            zoo.find("llama3-8b"),
            parse_fleet("h100:8"),
            Goal(tokens=10**9),
            sequence_tokens=10**6,
            today=TODAY,
        )
