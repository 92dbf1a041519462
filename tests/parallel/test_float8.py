"""FP8 under layouts that split matmuls over ranks: the scales, and so the numbers, of one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colossus.models import RouterLosses
from colossus.models.float8 import ROWWISE, TENSORWISE, Float8Recipe, use_float8
from colossus.parallel.float8 import largest, splits_of
from colossus.parallel.mesh import Mesh
from colossus.parallel.rank_model import Objective, RankModel
from colossus.spec.job import Job
from colossus.spec.model import AttentionSpec, LatentAttentionSpec, MlpSpec, ModelSpec, MoeSpec
from tests.parallel.layouts import batch, dense, job, mixture, part_of
from tests.parallel.ranks import run_ranks

ATTENTION = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16)
LATENT = LatentAttentionSpec(
    num_heads=2, q_lora_rank=16, kv_lora_rank=16, nope_head_dim=16, rope_head_dim=16, value_head_dim=16
)
MLP = MlpSpec(intermediate_size=64)
MODELS = {
    "grouped": (dense(attention=ATTENTION, mlp=MLP), {"tp": 2}),
    "latent": (dense(attention=LATENT, mlp=MLP), {"tp": 2}),
    "experts": (
        mixture(attention=ATTENTION, mlp=MoeSpec(num_experts=4, top_k=2, intermediate_size=64)),
        {"tp": 2, "expert_tp": 2},
    ),
}


def one_step(
    model: ModelSpec, job: Job, recipe: Float8Recipe, knowing: bool
) -> tuple[list[str], float, dict[str, tuple[Any, Tensor]]]:
    """What runs in FP8, this rank's loss sum, and its boxes of the gradients."""
    mesh = Mesh(job.layout, job.expert_tp)
    rank_model = RankModel(model, job, mesh, dtype=torch.float32, chunk_tokens=32)
    recipe = recipe.model_copy(update={"emulate": True})
    names = []
    for part in rank_model.parts:
        splits = {"splits": splits_of(rank_model.table, mesh)} if knowing else {}
        names += use_float8(part.model, recipe, device="cpu", **splits).converted
    rank_model.materialise(seed=3)
    objective = Objective(job.step_tokens, 0.0, RouterLosses(torch.tensor(0.0), torch.tensor(0.0)))
    loss = rank_model.accumulate(part_of(batch(model, job), job, dist.get_rank()), objective)
    boxes = {
        name: (rank_model.table.box(name, mesh.rank), parameter.grad.detach().clone())
        for name, parameter in rank_model.parameters.items()
        if parameter.grad is not None
    }
    return names, loss.item(), boxes


def differences(
    model: ModelSpec, layout: dict[str, Any], recipe: Float8Recipe, knowing: bool
) -> dict[str, float]:
    """By name, how far gradients under the layout are from one process's, relative to their norm."""
    split = job(model, **layout)
    one = job(model, shares=split.shares)
    ((alone, _, whole),) = run_ranks(one_step, 1, model, one, recipe, False)
    results = run_ranks(one_step, split.layout.num_ranks, model, split, recipe, knowing)
    made: dict[str, float] = {}
    assert {name for names, _, _ in results for name in names} == set(alone)
    for _, _, boxes in results:
        for name, (box, gradient) in boxes.items():
            here = tuple(
                slice(first, first + size) for first, size in zip(box.offsets, box.shape, strict=True)
            )
            expected = whole[name][1][here]
            difference = ((gradient - expected).norm() / whole[name][1].norm()).item()
            made[name] = max(made.get(name, 0.0), difference)
    return made


@pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE], ids=["tensorwise", "rowwise"])
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_compute_what_one_does(name: str, recipe: Float8Recipe) -> None:
    apart = differences(*MODELS[name], recipe, knowing=True)
    # Sums in another order may round a number or two otherwise, which is far more than the sums' own difference.
    assert max(apart.values()) < 2e-3, apart
    if recipe is TENSORWISE:  # and each by its own scales would not
        assert max(differences(*MODELS[name], recipe, knowing=False).values()) > 1e-2


@pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE], ids=["tensorwise", "rowwise"])
@pytest.mark.parametrize("model", [MODELS["grouped"][0], MODELS["experts"][0]], ids=["dense", "experts"])
def test_weight_gradients_that_are_put_off_are_made_in_fp8_too(
    model: ModelSpec, recipe: Float8Recipe
) -> None:
    apart = differences(model, {"pp": 2, "schedule": "zb-h1"}, recipe, knowing=True)
    assert max(apart.values()) < 2e-3, apart


def _largest_here(values: list[list[float]]) -> list[float]:
    mesh = Mesh(job(dense(), tp=2).layout)
    return largest(torch.tensor(values[dist.get_rank()], dtype=torch.bfloat16), mesh.team("tp").name).tolist()


def test_the_largest_of_all_ranks() -> None:
    nan, inf = float("nan"), float("inf")
    for made in run_ranks(_largest_here, 2, [[1.5, 0.0, nan, 3.0, inf], [2.0, 0.0, 1.0, nan, 1.0]]):
        assert made[:2] == [2.0, 0.0]
        assert made[4] == inf
        assert made[2] != made[2]
        assert made[3] != made[3]
