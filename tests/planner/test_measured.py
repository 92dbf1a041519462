"""Estimates from measured curves: laws that are known come back, and a step is the sum of what it does."""

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from colossus.hardware import chip, parse_fleet
from colossus.planner.estimate import network
from colossus.planner.estimate.compute import attention_s, linear_s
from colossus.planner.estimate.constants import Constants, shipped
from colossus.planner.estimate.execution import Hardware
from colossus.planner.estimate.measured import fitted_law, law_errors, rates, with_measured
from colossus.planner.plan import make_plan
from colossus.spec.fleet import Fleet
from colossus.spec.goal import Goal
from colossus.spec.measured import Measured
from tests.helpers import tiny
from tests.planner import measured as known

CURVES = known.made_up()


def fleet(measured: Measured | None = CURVES) -> Fleet:
    found = parse_fleet("cpu:2")
    pool = found.pools[0]
    cpu = pool.chip.model_copy(
        update={
            "measured": measured,
            "peak_flops": {"float32": 1e11, "bfloat16": 2e11},
            "memory_bytes": 4 << 30,
        }
    )
    node = pool.node.model_copy(update={"chip": cpu, "num_chips": 2, "scale_up_chips": 2})
    pool = pool.model_copy(update={"node": node, "num_nodes": 1})
    return found.model_copy(update={"pools": (pool,)})


def hardware(precision: str = "float32") -> Hardware:
    return Hardware.of(fleet().pools[0].node, precision)


def constants() -> Constants:
    values = with_measured(shipped(), fleet().pools[0].chip)
    return Constants.gather(values, ["cpu"], ["float32"], ["megatron-core"], ["cudnn"])


ONE = np.ones(())


def test_a_law_comes_back_from_its_points() -> None:
    points = [p for p in CURVES.matmuls if p.dtype == "bfloat16" and p.product == "forward"]
    assert fitted_law(points) == pytest.approx((1 / 2e11, 1 / known.BYTES_PER_S, known.CALL_S), rel=1e-6)
    assert np.abs(law_errors(points)).max() < 1e-9


def test_no_term_of_a_law_is_below_zero() -> None:
    """Small products that are faster in proportion would take a negative time for each call."""
    points = [
        point.model_copy(update={"seconds": point.flops**1.2 * 1e-12})
        for point in CURVES.matmuls
        if point.dtype == "float32" and point.product == "forward"
    ]
    assert min(fitted_law(points)) >= 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_linear_layers_between_the_measured_shapes(precision: str) -> None:
    forward, backward = linear_s(300.0 * ONE, 700.0 * ONE, 200.0 * ONE, hardware(precision), constants())
    once = known.matmul_s(precision, 300, 700, 200)
    assert float(forward) == pytest.approx(once, rel=1e-6)
    assert float(backward) == pytest.approx(2 * once, rel=1e-6)


@pytest.mark.parametrize(("sequence", "head_dim", "heads"), [(128, 32, 4), (300, 64, 12), (4096, 128, 8)])
def test_attention_computes_the_whole_square(sequence: int, head_dim: int, heads: int) -> None:
    width = float(heads * head_dim) * ONE
    forward, backward = attention_s(
        2.0 * sequence * ONE, float(sequence) * ONE, sequence / 2 * ONE, width, width, float(heads) * ONE, ONE, ONE,
        hardware(), constants(),
    )  # fmt: skip
    flops = 4 * 2 * sequence**2 * heads * head_dim
    assert float(forward) == pytest.approx(flops / known.ATTENTION_FLOPS, rel=1e-6)
    assert float(backward) == pytest.approx(2.5 * flops / known.ATTENTION_FLOPS, rel=1e-6)


def test_curves_have_a_floor_and_go_on_in_proportion() -> None:
    of = rates(CURVES)
    seconds = of.operation_s("norm", np.array([0.0, 8.0, 2.0**14, 2.0**25]), np.zeros(()))
    assert seconds == pytest.approx([0, 2**10 / 1e9, 2**14 / 1e9, 2**25 / 1e9])


def test_rows_in_different_dtypes_take_their_own_curves() -> None:
    both = Hardware.stack([hardware("float32"), hardware("bfloat16")])
    assert both.measured is rates(CURVES)
    forward, _ = linear_s(128.0 * ONE, 128.0 * ONE, 128.0 * ONE, both, constants())
    assert forward == pytest.approx([known.matmul_s(name, 128, 128, 128) for name in ("float32", "bfloat16")])
    assert linear_s(128.0 * ONE, 128.0 * ONE, 128.0 * ONE, both.take(np.array([1, 1])), constants())[0] == (
        pytest.approx(2 * [known.matmul_s("bfloat16", 128, 128, 128)])
    )


def test_a_collective_moves_its_share() -> None:
    """Three of four ranks' parts travel for one of two: half as much again for the same tensor."""
    size = 2.0**30 * ONE
    wide = replace(hardware(), scale_up_chips=4.0 * ONE)
    two, four = (float(network.ring_s(size, n * ONE, ONE, wide, constants())) for n in (2.0, 4.0))
    assert two == pytest.approx(known.LATENCY_S + 2**30 / known.LINK_BYTES_PER_S)
    assert four == pytest.approx(1.5 * two)
    assert float(network.all_reduce_s(0 * size, ONE, ONE, wide, constants())) == 0


def test_what_leaves_the_node_is_not_taken_from_its_curves() -> None:
    size = 2.0**30 * ONE
    across = network.ring_s(size, 2.0 * ONE, 2.0 * ONE, hardware(), constants()).item()
    assert across == pytest.approx(2**29 / 0.125e9, rel=0.01)


def test_faster_curves_make_a_faster_plan() -> None:
    """All curves twice as fast: a step of half the time, whatever the layout."""

    def halved(curves: Measured) -> Measured:
        def half(item):
            changes = {
                name: tuple(s / 2 for s in value) if isinstance(value, tuple) else value / 2
                for name in ("seconds", "backward_seconds")
                if (value := getattr(item, name, None)) is not None
            }
            return item.model_copy(update=changes)

        parts = ("matmuls", "attention", "operations", "collectives")
        return curves.model_copy(update={name: tuple(map(half, getattr(curves, name))) for name in parts})

    goal = Goal(tokens=10**6, max_global_batch_sequences=8, fixed={"tp": 1, "pp": 1, "cp": 1, "shard": 1})
    model = tiny(context_tokens=128)
    slow, fast = (
        make_plan(model, fleet(curves), goal, sequence_tokens=128).plan.estimate.step_time_s.likely
        for curves in (CURVES, halved(CURVES))
    )
    assert fast == pytest.approx(slow / 2, rel=1e-6)


def test_chips_that_were_not_measured_keep_their_constants() -> None:
    assert with_measured(shipped(), chip("h100")) is not None
    assert dict(with_measured(shipped(), chip("h100"))) == shipped()
    assert Hardware.of(fleet(None).pools[0].node, "float32").measured is None


def test_curves_that_lack_something_are_refused() -> None:
    plain = CURVES.model_dump()
    with pytest.raises(ValidationError, match="bfloat16 has matmuls, but no norm"):
        Measured.model_validate(
            {**plain, "operations": [o for o in plain["operations"] if o["name"] != "norm"]}
        )
    with pytest.raises(ValidationError, match="sizes must grow"):
        Measured.model_validate({**plain, "operations": [{**plain["operations"][0], "sizes": [4, 2, 1]}]})
