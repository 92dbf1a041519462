"""A plan tried out in a world of shapes: what it shows is what real ranks do, and it says so where a rank could not."""

from typing import Any

import pytest
import torch

from colossus.errors import ConfigError
from colossus.parallel.dry_run import enough_micro_batches, prove, roles
from colossus.planner.estimate.collectives import collectives
from colossus.spec.job import Job, Share
from colossus.spec.layout import Layout
from colossus.spec.run import OptimizerKind
from tests.parallel.layouts import DEEPSEEK_LIKE, GPT_LIKE, GROK_LIKE, SPARSE, dense, mixture
from tests.parallel.plans import plan_of

LARGE: dict[str, Any] = {
    "pp, fsdp, ep": (DEEPSEEK_LIKE, {"replica": 64, "pp": 2, "shard": 8, "ep": 4, "sharding": "gradients"}),
    "fsdp, tp, expert_tp": (
        GROK_LIKE, {"replica": 4, "shard": 128, "tp": 4, "ep": 4, "expert_tp": 4, "sharding": "weights"}
    ),
    "cp, tp, tied, zb-h1": (
        GPT_LIKE, {"replica": 16, "pp": 2, "cp": 4, "tp": 2, "schedule": "zb-h1", "context_exchange": "ring"}
    ),
    "traded, optimizer, zbv": (
        dense(),
        {"replica": 2, "pp": 2, "shard": 4, "cp": 2, "context_exchange": "all-to-all", "sharding": "optimizer",
         "schedule": "zbv", "virtual_stages": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("recompute", "optimizer"), [("none", "adamw"), pytest.param("full", "muon", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", LARGE)
def test_exchanges_in_large_worlds_are_those_that_were_priced(
    name: str, recompute: Any, optimizer: OptimizerKind
) -> None:
    model, settings = LARGE[name]
    share = Share(num_groups=settings["replica"], num_micro_batches=4, recompute=recompute)
    proof = prove(plan_of(model, shares=(share,), optimizer=optimizer, **settings))
    for one in proof.roles:
        assert not one.differences, one.role
        assert one.issued


def test_every_rank_of_the_plan_plays_one_of_the_roles() -> None:
    shares = (
        Share(num_groups=3, num_micro_batches=5),
        Share(num_groups=2, num_micro_batches=6, recompute="full"),
    )
    plan = plan_of(DEEPSEEK_LIKE, replica=5, pp=4, shard=2, tp=2, shares=shares)
    found = roles(plan)
    assert sum(role.num_ranks for role in found) == plan.layout.num_ranks
    # First, middle and last stage of each pool; the dense layer of this model is on the first one.
    assert [(role.pool, role.stage) for role in found] == [(0, 0), (0, 1), (0, 3), (1, 0), (1, 1), (1, 3)]
    for role in found:
        assert plan.layout.coordinates(role.rank).pp == role.stage


def test_a_rank_keeps_its_share_of_the_weights() -> None:
    plan = plan_of(dense(), shard=4, tp=2, sharding="weights")
    (one,) = prove(plan).roles
    assert 8 * sum(one.num_params.values()) == pytest.approx(plan.model.num_params(), rel=0.02)
    assert one.memory_bytes["weights"] == pytest.approx(4 * sum(one.num_params.values()), rel=0.02)


def test_averages_of_adamw_are_twice_the_weights_and_of_muon_once_for_matrices() -> None:
    held = {}
    for optimizer in ("adamw", "muon"):
        (one,) = prove(plan_of(dense(), shard=4, sharding="weights", optimizer=optimizer)).roles
        held[optimizer] = one.memory_bytes["optimizer"]
    params = sum(one.num_params.values())
    assert held["adamw"] == pytest.approx(8 * params, rel=0.01)
    assert held["muon"] == pytest.approx(8 * params - 4 * one.num_params["dense"], rel=0.05)


def test_as_many_micro_batches_as_fill_the_pipeline() -> None:
    def enough(place: int, there: int, **settings: Any) -> int:
        layout = Layout(pp=settings.pop("pp"))
        job = Job(layout=layout, stage_layers=(2,) * layout.pp, sequence_tokens=8, **settings)
        return enough_micro_batches(job, place, there)

    assert enough(0, 100, pp=1, schedule="none") == 2
    assert enough(0, 1, pp=1, schedule="none") == 1
    assert [enough(place, 100, pp=4, schedule="1f1b") for place in range(4)] == [4, 3, 2, 2]
    assert enough(0, 3, pp=4, schedule="1f1b") == 3
    assert enough(0, 100, pp=4, schedule="zbv", virtual_stages=2) <= 8
    assert enough(0, 100, pp=4, schedule="dualpipev", virtual_stages=2) >= 8
    assert enough(0, 30, pp=4, schedule="gpipe") == 30
    assert enough(0, 100, pp=4, schedule="interleaved", virtual_stages=2) % 4 == 0


def test_more_micro_batches_hold_no_more_memory() -> None:
    """What is run in place of hundreds shows the peak of all of them."""
    peaks = []
    for count in (3, 7):
        share = Share(num_groups=1, num_micro_batches=count)
        plan = plan_of(dense(), pp=2, shard=2, sharding="gradients", shares=(share,))
        peaks.append([one.peak_bytes for one in prove(plan).roles])
    few, many = peaks
    assert few == many


def test_a_second_micro_batch_is_priced_too() -> None:
    plan = plan_of(mixture(), shard=2, ep=2, sharding="weights", shares=(Share(num_micro_batches=40),))
    (one,) = prove(plan).roles
    assert one.num_micro_batches == 2
    assert one.whole_step == collectives(
        plan.model, Job.of(plan), 0, dtype="float32", chunk_tokens=32, router_losses=True
    )
    rows = {(e.kind, e.num_bytes): e.times for e in one.issued if e.group == "ep"}
    assert rows == {(e.kind, e.num_bytes): e.times // 20 for e in one.whole_step if e.group == "ep"}


def test_what_cannot_be_combined_is_told_as_a_sentence() -> None:
    with pytest.raises(ConfigError, match="not cut evenly by cp 4"):
        prove(plan_of(dense(), cp=4, context_exchange="ring", sequence_tokens=36))
    with pytest.raises(ConfigError, match="which, tokens tell"):
        prove(plan_of(SPARSE))
    assert not torch.distributed.is_initialized()
