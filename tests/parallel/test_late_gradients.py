"""Weight gradients that are put off come to the same sums as those made at once, in bfloat16 too, where sharding adds
micro-batches up in float32."""

import pytest
import torch
import torch.distributed as dist

from colossus.parallel.mesh import Mesh
from colossus.parallel.rank_model import Objective, RankModel
from colossus.spec.job import Job, Share
from colossus.spec.model import ModelSpec
from tests.parallel.layouts import batch, dense, job, part_of
from tests.parallel.ranks import run_ranks


def gradients(model: ModelSpec, job: Job) -> dict[str, torch.Tensor]:
    rank_model = RankModel(model, job, Mesh(job.layout), dtype=torch.bfloat16, chunk_tokens=32)
    rank_model.materialise(seed=3)
    rank_model.accumulate(part_of(batch(model, job), job, dist.get_rank()), Objective(job.step_tokens))
    return {name: gradient.clone() for name, gradient in rank_model.gradients().items()}


@pytest.mark.parametrize("num_micro_batches", [2, 3, 6])
def test_they_are_those_of_a_schedule_that_puts_nothing_off(num_micro_batches: int) -> None:
    share = (Share(num_micro_batches=num_micro_batches),)
    late, at_once = (
        run_ranks(
            gradients,
            4,
            dense(),
            job(dense(), pp=2, shard=2, sharding="weights", schedule=name, shares=share),
        )
        for name in ("zb-h1", "1f1b")
    )
    for one, other in zip(late, at_once, strict=True):
        assert one.keys() == other.keys()
        for name, gradient in one.items():
            assert gradient.dtype == torch.float32
            difference = (gradient - other[name]).norm() / other[name].norm()
            assert difference < 0.01, f"{name}: {difference:.2e}"
