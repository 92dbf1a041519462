"""Reasons, advice, explanations and comparisons, against the plan's own numbers computed here a second time."""

import re
from datetime import date

import pytest

from colossus.errors import ConfigError
from colossus.hardware import parse_fleet
from colossus.planner.estimate.memory import MemoryParts
from colossus.planner.estimate.step import StepParts
from colossus.planner.explain.advice import memory_with_half_tp
from colossus.planner.explain.compare import rows, verdicts
from colossus.planner.explain.describe import CHOICES, ESTIMATES, explain_field, field_names, runs
from colossus.planner.explain.facts import compared, held_chips, ideal_bubble
from colossus.planner.explain.parts import MEMORY_PARTS, STEP_PARTS, bare, step_parts
from colossus.planner.explain.plot import plot_png
from colossus.planner.explain.reasons import advice, reasons
from colossus.planner.plan import make_plan
from colossus.planner.run.power import rated_watts_per_chip
from colossus.spec.goal import Goal
from colossus.spec.plan import Plan
from colossus.zoo import find
from tests.planner.plans import laptop_plan, mixed_plan, planned, ranged

DAY = date(2026, 6, 1)
FIGURES = ("step_time_s", "tokens_per_s", "mfu", "memory_bytes", "days", "interruptions_per_day", "facility_watts",
           "energy_mwh", "water_m3", "co2_t", "cost_usd", "cost_owned_usd")  # fmt: skip
SCALES = {"mfu": 100, "memory_bytes": 2**-30, "facility_watts": 1e-6}


def last_number(text: str) -> float:
    """What a formula comes to: the first number behind its last equals sign."""
    found = re.search(r"[\d.,]+", text.rpartition("=")[2])
    assert found is not None, text
    return float(found[0].rstrip(".,").replace(",", ""))


def estimate(**changes: object) -> Plan:
    plan = mixed_plan()
    return plan.model_copy(update={"estimate": plan.estimate.model_copy(update=changes)})


def said(plan: Plan, part: str) -> str:
    """The one sentence of advice that has `part` in it."""
    found = [sentence for sentence in advice(plan, today=DAY) if part in sentence]
    assert len(found) == 1, (part, advice(plan, today=DAY))
    return found[0]


# --- parts ---


def test_every_part_of_the_step_and_of_memory_is_described() -> None:
    assert {bare(name) for name in StepParts.__dataclass_fields__} == set(STEP_PARTS)
    assert {bare(name) for name in MemoryParts.__dataclass_fields__} == set(MEMORY_PARTS)


def test_step_parts_take_names_with_and_without_unit() -> None:
    plan = mixed_plan()
    with_unit = estimate(step_parts_s={f"{k}_s": v for k, v in plan.estimate.step_parts_s.items()})
    assert step_parts(with_unit) == step_parts(plan)
    assert list(step_parts(plan))[:2] == ["matmul", "bubble"]
    assert sum(step_parts(plan).values()) == pytest.approx(plan.estimate.step_time_s.likely)


# --- reasons ---


@pytest.mark.parametrize("plan", [mixed_plan(), laptop_plan()], ids=["mixed", "laptop"])
def test_every_choice_has_a_reason(plan: Plan) -> None:
    assert set(reasons(plan)) >= set(CHOICES)
    assert all(reasons(plan).values())


def test_the_plans_own_reasons_count() -> None:
    assert reasons(mixed_plan())["tp"] == "the largest that stays within the NVLink domain of 8"
    assert "fills the NVLink domain" in reasons(mixed_plan(reasons={}))["tp"]


# --- advice ---


def test_advice_needs_neither_reasons_nor_a_search() -> None:
    bare_plan = mixed_plan(reasons={}, alternatives={})
    assert len(advice(bare_plan, today=DAY)) >= 6
    assert all(re.search(r"\d", sentence) for sentence in advice(bare_plan, today=DAY))


def test_tp_names_what_the_next_best_costs() -> None:
    sentence = said(mixed_plan(), "NVLink domain")
    assert "tp 4 would be 6.1 % slower" in sentence
    assert "450 GB/s inside, 50 outside" in sentence


def test_without_alternatives_half_of_tp_is_checked_against_memory() -> None:
    plan = mixed_plan(alternatives={})
    tight = plan.pools[0]
    gib = {name: size / 2**30 for name, size in tight.memory_bytes.items()}
    kept = gib["optimizer"] + gib["communication"] + gib["fragmentation"] + gib["context"]
    doubled = 2 * (sum(gib.values()) - kept) + kept
    assert memory_with_half_tp(plan, tight) / 2**30 == pytest.approx(doubled)
    assert f"tp 4 would need about {doubled:.1f} GiB of the 79.2 GiB of h100-sxm" in said(
        plan, "NVLink domain"
    )


def test_the_largest_cost_besides_matmuls() -> None:
    assert "costs most besides matmuls" in said(mixed_plan(), "The bubble is")
    parts = {"matmul": 5.0, "tensor": 2.0, "bubble": 1.0}
    assert "most goes to tp network: 25.0%" in said(estimate(step_parts_s=parts), "Besides matmuls")


def test_the_bubble_against_the_ideal_one() -> None:
    assert ideal_bubble(mixed_plan()) == pytest.approx(15 / (8 * 32))  # (p - 1) / (v m), arXiv:2104.04473
    assert ideal_bubble(mixed_plan(schedule="1f1b", virtual_stages=1)) == pytest.approx(15 / 32)
    assert ideal_bubble(mixed_plan(schedule="zb-h1", virtual_stages=1)) == pytest.approx(15 / 32 / 3)
    assert ideal_bubble(laptop_plan()) is None
    sentence = said(mixed_plan(), "ideal interleaved pipeline")
    once = 0.86 + 0.21 + 0.02 + 0.26 + 0.05 + 0.03  # bubble, data, optimizer, stragglers, fixed, head
    assert f"{0.86 / (8.42 - once):.1%} of the micro-batches' own time" in sentence
    assert "has 5.9%" in sentence
    assert "bubble" not in " ".join(advice(laptop_plan(), today=DAY))


def test_what_the_larger_chips_buy() -> None:
    sentences = " ".join(advice(mixed_plan(), planned().mixture, today=DAY))
    assert "h200 take 2 × 17 sequences per rank and step where h100-sxm take 1 × 32" in sentences
    assert "recompute none in place of selective" in sentences
    assert "all treated as the weakest would be 4.3 % slower, without h200 30 % slower" in sentences
    assert f"h200 wait {1 - 8.31 / 8.42:.1%} of each step" in sentences


def test_the_stronger_of_two_pools_with_equal_memory_is_the_one_that_does_more() -> None:
    plan = mixed_plan()
    equal = plan.pools[1].model_copy(update={"memory_limit_bytes": plan.pools[0].memory_limit_bytes})
    for pools in ((plan.pools[0], equal), (equal, plan.pools[0])):
        sentence = said(plan.model_copy(update={"pools": pools}), "sequences per rank")
        assert sentence.startswith("h200 take 2 × 17 sequences per rank and step where h100-sxm take 1 × 32")


def test_recovery_is_priced_in_hours() -> None:
    sentence = said(mixed_plan(), "Restarting the whole job")
    assert f"{24 * 0.26:.1f} hours a day" in sentence
    assert f"{24 * 0.05:.1f}: {0.95 / 0.74 - 1:.1%} more training" in sentence


def test_failures_per_day() -> None:
    assert "94.7 interruptions a day, one every 15 min, 35% of them by faulty GPU" in said(
        mixed_plan(), "Expect"
    )
    assert "every 4.0 days" in said(estimate(interruptions_per_day=ranged(0.25)), "Expect")


def test_power_of_the_site_by_day() -> None:
    plan = mixed_plan()
    rated = 1.3 * sum(pool.num_chips * rated_watts_per_chip(pool.node) for pool in plan.fleet.pools)
    assert f"rated at {rated / 1e6:.0f} MW with cooling, and memphis feeds 425" in said(
        plan, "Power does not bind"
    )
    early = [s for s in advice(plan, today=date(2024, 9, 3)) if s.startswith("Power binds")]
    assert len(early) == 1
    assert "181.0 MW on 2024-09-03" in early[0]
    assert not any("Power" in sentence for sentence in advice(laptop_plan(), today=DAY))


def test_the_batch_against_published_ones() -> None:
    plan = mixed_plan()
    times = plan.step_tokens / (15_360 * 4096)  # DeepSeek-V3
    assert f"411M tokens per step are {times:.1f} times the largest published batch" in said(plan, "63M")
    assert not any("published" in sentence for sentence in advice(laptop_plan(), today=DAY))


def test_limits_that_hold_only_at_the_likely_end() -> None:
    plan = mixed_plan()
    days = plan.estimate.days
    tight = plan.model_copy(
        update={"goal": plan.goal.model_copy(update={"deadline_days": (days.likely + days.high) / 2})}
    )
    assert "not at the high end" in said(tight, "The limit of")
    assert not any(
        "The limit" in sentence
        for sentence in advice(
            plan.model_copy(update={"goal": plan.goal.model_copy(update={"deadline_days": days.high})}),
            today=DAY,
        )
    )


def test_memory_that_may_not_hold() -> None:
    assert not any("rehearse" in sentence for sentence in advice(mixed_plan(), today=DAY))
    wide = estimate(memory_bytes=ranged(mixed_plan().estimate.memory_bytes.likely, 0.25))
    fullest = mixed_plan().pools[1]
    high = fullest.peak_bytes * 1.25 / 2**30
    assert high > 139.8
    assert f"Memory of h200 is 86% full, and the estimate's high end, {high:.1f} GiB" in said(
        wide, "rehearse"
    )


def test_chips_that_do_not_train() -> None:
    assert not any("do not train" in sentence for sentence in advice(mixed_plan(), today=DAY))
    plan = mixed_plan()
    few = plan.model_copy(
        update={"pools": (plan.pools[0].model_copy(update={"spare_nodes": 800}), plan.pools[1])}
    )
    assert f"{6400 + 94 * 8 + 176:,} of 200,000 chips" in said(few, "too few for another group of 512")
    many = plan.model_copy(
        update={"pools": (plan.pools[0].model_copy(update={"idle_chips": 5120}), plan.pools[1])}
    )
    assert "5,216 left out" in said(many, "would not help the goal")


# --- fields ---


@pytest.mark.parametrize("plan", [mixed_plan(), laptop_plan()], ids=["mixed", "laptop"])
def test_every_field_is_explained(plan: Plan) -> None:
    for name in field_names(plan):
        field = explain_field(plan, name)
        assert field.name == name
        assert field.value
        assert field.what.endswith(".")
    assert set(field_names(plan)) >= set(type(plan.estimate).model_fields)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("plan", [mixed_plan()], ids=["mixed"])
def test_formulas_come_to_what_the_estimate_says(plan: Plan, name: str) -> None:
    how = explain_field(plan, name).how[-1].partition(", of ")[0]
    assert last_number(how) == pytest.approx(
        getattr(plan.estimate, name).likely * SCALES.get(name, 1), rel=0.02
    )


@pytest.fixture(scope="module")
def real_plan() -> Plan:
    return make_plan(find("llama3.2-1b"), parse_fleet("h100:64+h200:16"), Goal(tokens=10**11), today=DAY).plan


@pytest.mark.parametrize("name", FIGURES)
def test_formulas_come_to_what_the_planner_itself_computed(real_plan: Plan, name: str) -> None:
    how = explain_field(real_plan, name).how[-1].partition(", of ")[0]
    # To the digits that are shown.
    assert last_number(how) == pytest.approx(
        getattr(real_plan.estimate, name).likely * SCALES.get(name, 1), rel=0.005, abs=0.05
    )


def test_chips_that_train_or_stand_ready() -> None:
    plan = mixed_plan()
    assert held_chips(plan) == 386 * 512 + (180 + 94) * 8
    left = sum(share.idle_chips for share in plan.pools)
    assert held_chips(plan) + left == plan.fleet.num_chips


def test_other_ways_to_name_a_field() -> None:
    plan = mixed_plan()
    assert explain_field(plan, "estimate.mfu").name == "mfu"
    assert explain_field(plan, "layout.tp").name == "tp"
    assert explain_field(plan, "bubble").name == "bubble_s"
    assert explain_field(plan, "weights").name == "weights_bytes"
    assert explain_field(plan, "micro_batch_sequences").name == "micro_batch"
    assert explain_field(plan, "cost").name == "cost_usd"


@pytest.mark.parametrize(
    ("name", "nearest"), [("goodputt", "'goodput'"), ("shcedule", "'schedule'"), ("", "Known: ")]
)
def test_an_unknown_field_gets_the_nearest_name(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(nearest)):
        explain_field(mixed_plan(), name)


def test_a_field_tells_what_the_next_best_costs() -> None:
    other = explain_field(mixed_plan(), "pp").next_best
    assert other is not None
    assert (other.value, compared(other.step_time_ratio)) == ("8", "3.4 % slower")


def test_ratios_in_words() -> None:
    assert compared(0.8) == "20 % faster"
    assert compared(1.0001) == "the same"
    assert compared(1.5, "cost") == "50 % dearer"
    assert compared(0.9, "energy") == "10 % less energy"
    assert compared(3.0) == "3 times the time"


def test_layers_of_stages_are_shortened() -> None:
    assert runs((7, 8, 8, 8, 7)) == "7, 3 × 8, 7"
    assert runs((12,)) == "12"


# --- comparison ---


def test_a_plan_equals_itself() -> None:
    plan = mixed_plan()
    assert not any(row.differs for row in rows(plan, plan))
    assert all(verdict.better == "same" for verdict in verdicts(plan, plan))
    assert {row.field for row in rows(plan, plan)} >= set(ESTIMATES) - {"step_parts_s"}


def test_which_plan_is_better_in_what() -> None:
    a = mixed_plan()
    e = a.estimate
    b = estimate(days=e.days * 0.5, cost_usd=e.cost_usd * 1.25, mfu=e.mfu * 1.02)
    found = {verdict.respect: verdict for verdict in verdicts(a, b)}
    assert (found["wall time"].better, found["wall time"].ratio) == ("b", pytest.approx(0.5))
    assert found["wall time"].text.startswith("50.0% less wall time")
    assert found["cost"].better == "a"
    assert found["cost"].text.startswith("20.0% less cost")
    assert found["MFU"].better == "b"
    assert found["cost"].text.endswith("(41,328,856 USD and 51,661,070 USD)")
    assert found["energy"].better == "same"
    assert [row.field for row in rows(a, b) if row.differs] == ["mfu", "days", "cost_usd"]


def test_shares_of_different_peaks_are_not_compared() -> None:
    respects = {verdict.respect for verdict in verdicts(mixed_plan(), mixed_plan(precision="fp8"))}
    assert "MFU" not in respects
    assert "tokens per second" in respects


def test_memory_left_is_that_of_the_tightest_pool() -> None:
    a = mixed_plan()
    tighter = a.pools[0].model_copy(update={"memory_limit_bytes": a.pools[0].memory_limit_bytes - 2**30})
    b = a.model_copy(update={"pools": (tighter, a.pools[1])})
    left = next(verdict for verdict in verdicts(a, b) if verdict.respect == "memory left")
    assert left.better == "a"
    assert left.text.startswith("1.0 GiB more memory left (13.5 and 12.5)")


# --- picture ---


@pytest.mark.parametrize("plan", [mixed_plan(), laptop_plan()], ids=["mixed", "laptop"])
def test_the_picture_is_a_png_of_its_size(plan: Plan) -> None:
    pytest.importorskip("matplotlib")
    png = plot_png(planned(plan))
    assert png.startswith(b"\x89PNG\r\n")
    assert int.from_bytes(png[16:20], "big") == 1650
