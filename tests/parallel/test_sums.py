"""Sums between replica groups go along with the backward pass, in one order on all ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from colossus.parallel.mesh import Mesh
from colossus.parallel.rank_model import Objective, RankModel
from colossus.parallel.record import CollectiveRecorder
from colossus.spec.job import Job, Share
from colossus.spec.model import ModelSpec
from tests.parallel.layouts import batch, dense, job, mixture, part_of
from tests.parallel.ranks import run_ranks


class Course(CollectiveRecorder):
    """Exchanges one after the other."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.kinds: list[tuple[str, str, int]] = []

    def _count(self, kind: Any, process_group: str, num_bytes: int) -> None:
        self.kinds.append((kind, self.mesh.axis(process_group) or "group", num_bytes))


def course(model: ModelSpec, job: Job, num_steps: int) -> list[list[tuple[str, str, int]]]:
    """Of each step, what this rank exchanged for its gradients."""
    rank_model = RankModel(model, job, Mesh(job.layout), dtype=torch.float32, chunk_tokens=32)
    rank_model.materialise(seed=3)
    part, steps = part_of(batch(model, job), job, dist.get_rank()), []
    for _ in range(num_steps):
        with Course(rank_model.mesh) as watch:
            rank_model.accumulate(part, Objective(job.step_tokens))
        rank_model.clear_gradients()
        steps.append(watch.kinds)
    return steps


@pytest.mark.parametrize(
    "sharding",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("optimizer", "gradients")), "weights"],
)
def test_layers_are_summed_while_those_before_are_still_computed(sharding: str) -> None:
    model = dense(num_layers=4)
    layout = {"replica": 2, "shard": 2, "sharding": sharding}
    for steps in run_ranks(course, 4, model, job(model, **layout), 2):
        for kinds in steps:
            last = max(i for i, (kind, *_) in enumerate(kinds) if kind == "reduce-scatter")
            summed = [i for i, (_, group, _) in enumerate(kinds) if group == "replica"]
            assert len(summed) == model.num_layers + 1  # and what stands around the layers
            # The last scatter is of what stands around the layers, the one before of the first layer.
            assert [i < last for i in summed] == [True] * model.num_layers + [False]


UNEQUAL = (
    Share(num_groups=1, micro_batch_sequences=1, num_micro_batches=4),
    Share(num_groups=1, micro_batch_sequences=2, num_micro_batches=2, recompute="full"),
)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (dense(num_layers=3), {"shares": UNEQUAL}),
        (dense(num_layers=3), {"tp": 2, "shares": UNEQUAL}),
        (mixture(num_layers=3), {"shard": 2, "ep": 2, "sharding": "weights", "shares": UNEQUAL}),
        (dense(num_layers=4), {"pp": 2, "schedule": "zb-h1"}),
    ],
    ids=["unequal", "tensors", "experts", "put off"],
)
def test_all_groups_have_the_same_sums_in_the_same_order(model: ModelSpec, settings: dict[str, Any]) -> None:
    """Else they would wait for each other, or add up what does not belong together."""
    one = job(model, replica=2, **settings)
    ranks = one.layout.num_ranks
    between = [
        [[kind for kind in step if kind[1] == "replica"] for step in steps]
        for steps in run_ranks(course, ranks, model, one, 2)
    ]
    for rank in range(ranks // 2):
        assert between[rank] == between[rank + ranks // 2]
        assert between[rank][0] == between[rank][1] != []


def after_one_given_up(model: ModelSpec, job: Job) -> list[float]:
    """A step's gradients after one that ended in the middle of its last backward pass: by how much they are off."""
    rank_model = RankModel(model, job, Mesh(job.layout), dtype=torch.float32, chunk_tokens=32)
    rank_model.materialise(seed=3)
    part, first = part_of(batch(model, job), job, dist.get_rank()), rank_model.parts[0].model.layers[0]

    def step() -> dict[str, torch.Tensor]:
        rank_model.accumulate(part, Objective(job.step_tokens))
        gradients = {name: gradient.clone() for name, gradient in rank_model.gradients().items()}
        rank_model.clear_gradients()
        return gradients

    def give_up(*_: object) -> None:
        if rank_model.parts[0].is_complete:
            raise RuntimeError("out of memory, say")

    expected = step()
    handle = first.register_full_backward_hook(give_up)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        step()
    handle.remove()
    rank_model.clear_gradients()
    found = step()
    return [float((found[name] - one).abs().max()) for name, one in expected.items()]


def test_a_step_after_one_that_was_given_up_is_as_if_that_had_not_been() -> None:
    model = dense(num_layers=3)
    for off in run_ranks(after_one_given_up, 2, model, job(model, replica=2)):
        assert max(off) == 0
