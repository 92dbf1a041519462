"""The search finds what brute force finds, and what it finds behaves as physics says."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus import zoo
from colossus.errors import ConfigError
from colossus.hardware.catalog import fabric
from colossus.hardware.fleet_text import parse_fleet
from colossus.planner.estimate.shape import ModelShape
from colossus.planner.search.best import Evaluated, Search
from colossus.planner.search.bounds import Problem
from colossus.planner.search.refine import choose
from colossus.planner.search.space import SHARDING, layouts, options
from colossus.spec.fleet import Pool
from colossus.spec.goal import Goal

GOAL = Goal(tokens=10**11)


def problem(
    model: str = "llama3.2-1b",
    fleet: str = "h100:16",
    sequences: int = 64,
    goal: Goal = GOAL,
    **changes: object,
) -> Problem:
    pools = list(parse_fleet(fleet).pools)
    return _problem(model, pools, sequences, goal, **changes)


def _problem(model: str, pools: list[Pool], sequences: int, goal: Goal = GOAL, **changes: object) -> Problem:
    spec = zoo.find(model)
    plain = Problem(
        shape=ModelShape.of(spec),
        pools=pools,
        sequence=4096,
        sequences=sequences,
        layouts=layouts(spec, pools, goal, 4096, sequences),
        options=options(goal, sequences),
        fabric=fabric("infiniband-ndr-2-tier"),
        chip_rates=[0.0] * len(pools),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def everything(search: Search) -> Evaluated:
    return search.evaluate(search.candidates)


CASES = [
    ("llama3.2-1b", "h100:16", 64),
    ("llama3-8b", "h100:16", 48),
    ("mixtral-8x7b", "h100:32", 128),
    ("llama3-8b", "h100:16+h200:8", 64),
    ("llama3-8b", "h100:8+b200:8", 96),
]


@pytest.mark.parametrize(("model", "fleet", "sequences"), CASES)
def test_equals_brute_force(model: str, fleet: str, sequences: int) -> None:
    search = Search(problem(model, fleet, sequences))
    found = search.best(at_once=128)
    assert len(found.objective) < len(search.candidates)  # it did leave some out
    assert found.objective.min() == pytest.approx(everything(search).objective.min(), rel=1e-12)


@pytest.mark.parametrize(("model", "fleet", "sequences"), CASES)
def test_the_bound_is_one(model: str, fleet: str, sequences: int) -> None:
    search = Search(problem(model, fleet, sequences))
    found = everything(search)
    assert np.all(search.bound <= found.objective * (1 + 1e-9))


@pytest.mark.parametrize("field", ["tp", "pp", "cp", "shard"])
def test_what_is_left_out_is_worse(field: str) -> None:
    search = Search(problem("llama3-8b", "h100:32", 128))
    column = getattr(search.problem.layouts, field)[search.candidates.layout]
    found = everything(search)
    for value in np.unique(column):
        here = search.best(column == value)
        assert here.objective.min() == pytest.approx(found.objective[column == value].min(), rel=1e-12)


def test_batches_are_not_exceeded_and_groups_fit() -> None:
    search = Search(problem("llama3-8b", "h100:16+h200:8", 64))
    found = everything(search)
    rows = search.problem.layouts.take(found.candidates.layout)
    micro_batch = search.problem.options.micro_batch[found.candidates.option]
    sequences = (found.groups * rows.shard[:, None] * micro_batch * found.micro_batches).sum(axis=1)
    assert sequences.max() <= 64
    for i, pool in enumerate(search.problem.pools):
        assert np.all(found.groups[:, i] * rows.group_ranks <= pool.num_chips)


def best_s(pools: list[Pool], model: str = "llama3-8b", sequences: int = 64) -> float:
    return float(Search(_problem(model, pools, sequences)).best().objective.min())


def faster(pool: Pool, **factors: float) -> Pool:
    chip = pool.chip
    update: dict[str, object] = {}
    for name, factor in factors.items():
        value = getattr(chip, name, None)
        if name == "peak_flops":
            update[name] = {precision: rate * factor for precision, rate in chip.peak_flops.items()}
        elif value is not None:
            update[name] = type(value)(value * factor)
    node = pool.node.model_copy(
        update={
            "chip": chip.model_copy(update=update),
            **{
                name: getattr(pool.node, name) * factor
                for name, factor in factors.items()
                if name in ("scale_up_bandwidth", "nic_bandwidth")
            },
        }
    )
    return pool.model_copy(update={"node": node})


@given(
    name=st.sampled_from(
        ["peak_flops", "memory_bandwidth", "memory_bytes", "scale_up_bandwidth", "nic_bandwidth"]
    ),
    factor=st.floats(1.0, 3.0),
)
@settings(max_examples=15, deadline=None)
def test_a_better_machine_never_hurts(name: str, factor: float) -> None:
    pools = list(parse_fleet("h100:16").pools)
    assert best_s([faster(pools[0], **{name: factor})]) <= best_s(pools) * (1 + 1e-9)


@given(factor=st.floats(0.999, 1.001))
@settings(max_examples=10, deadline=None)
def test_tiny_changes_change_little(factor: float) -> None:
    pools = list(parse_fleet("h100:16").pools)
    assert best_s([faster(pools[0], peak_flops=factor)]) == pytest.approx(best_s(pools), rel=0.01)


def test_no_step_is_faster_than_its_flops() -> None:
    search = Search(problem("llama3-8b", "h100:16", 64))
    found = everything(search)
    spec = zoo.find("llama3-8b")
    peak = 16 * max(search.problem.pools[0].chip.peak_flops.values())
    assert found.seconds_per_token.min() >= spec.flops_per_token(4096) / peak


def test_a_mixed_fleet_uses_what_it_has() -> None:
    h100, h200 = parse_fleet("h100:16+h200:16").pools
    both = best_s([h100, h200])
    assert both <= best_s([h100]) * 1.001
    assert both <= best_s([h200]) * 1.001


def test_a_congested_fabric_is_slower() -> None:
    slow = fabric("infiniband-ndr-2-tier").model_copy(update={"efficiency": 0.3})
    usual = Search(problem("llama3-8b", "h100:64", 64)).best().objective.min()
    assert Search(problem("llama3-8b", "h100:64", 64, fabric=slow)).best().objective.min() > usual


def test_the_order_of_pools_does_not_matter() -> None:
    h100, h200 = parse_fleet("h100:16+h200:16").pools
    assert best_s([h100, h200]) == pytest.approx(best_s([h200, h100]), rel=1e-12)


def test_twice_the_same_pool_is_one_pool_of_twice_the_size() -> None:
    (one,) = parse_fleet("h100:16").pools
    (two,) = parse_fleet("h100:32").pools
    assert best_s([one, one], sequences=1024) == pytest.approx(best_s([two], sequences=1024), rel=0.03)


def test_unequal_pools_finish_together() -> None:
    """H100 and B200 differ by more than 2 in FLOP/s; their groups take counts that fit."""
    search = Search(problem("llama3-8b", "h100:16+b200:16", 512))
    found = search.best()
    picked = choose(search.problem, search, found)
    assert picked is not None
    busy = found.busy_s[picked[0]]
    assert busy.min() > 0.85 * busy.max()
    assert found.micro_batches[picked[0]].min() < found.micro_batches[picked[0]].max()


def test_timelines_hardly_undercut_the_closed_form_that_ranks() -> None:
    search = Search(problem("llama3-8b", "h100:32", 256, Goal(tokens=10**11, fixed={"pp": 4})))
    found = search.best(slack=1.1)
    picked = choose(search.problem, search, found)
    assert picked is not None
    _, objective, step_s, parts = picked
    assert step_s == pytest.approx(float(parts.total_s[0]))
    assert objective * 1.03 >= found.objective.min()


@pytest.mark.parametrize(
    ("fixed", "says"),
    [
        ({"tp": 3}, "allows 1, 2, 4, 8"),
        ({"pp": 7}, "allows"),
        ({"precision": "fp9"}, "Did you mean 'fp8'"),
        ({"tensor": 8}, "no choice 'tensor'"),
        ({"precision": "nvfp4"}, "all chips of the fleet can run"),
        ({"schedule": "zb-h2"}, "Did you mean 'zb-h1'"),
        ({"tp": "many"}, "is a number"),
        ({"micro_batch": 4096}, "largest global batch"),
        ({"shard": 3}, "no layout"),
    ],
)
def test_impossible_choices_say_what_is_possible(fixed: dict[str, int | str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        problem("llama3-8b", "h100:16", 64, Goal(tokens=1, fixed=fixed))


def test_every_fixed_choice_is_kept() -> None:
    fixed: dict[str, int | str] = {
        "tp": 2, "pp": 2, "cp": 1, "shard": 4, "sharding": "optimizer", "precision": "bfloat16", "schedule": "1f1b",
    }  # fmt: skip
    space = problem("llama3-8b", "h100:16", 64, Goal(tokens=1, fixed=fixed)).layouts
    assert len(space) == 1
    assert (space.tp[0], space.pp[0], space.shard[0]) == (2, 2, 4)
    assert SHARDING[int(space.sharding[0])] == "optimizer"
