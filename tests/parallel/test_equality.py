"""Any layout computes what one process computes: losses and every parameter's gradient."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from colossus.models import RouterLosses, build, chunked_cross_entropy
from colossus.parallel.mesh import Mesh
from colossus.parallel.rank_model import Objective, RankModel
from colossus.spec.job import Job
from colossus.spec.model import ModelSpec
from tests.parallel.layouts import batch, dense, job, mixture, part_of
from tests.parallel.ranks import run_ranks

BALANCE, ROUTER_Z, Z_LOSS = 0.02, 0.003, 0.001


def alone(model: ModelSpec, job: Job) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss sum and gradients of one step on one process, in the plain way, in float64."""
    decoder = build(model, seed=3).double()
    whole = batch(model, job)
    tokens, targets, documents = (torch.from_numpy(a) for a in (whole.tokens, whole.targets, whole.documents))
    num_tokens = tokens.numel()
    losses = RouterLosses(torch.tensor(BALANCE / num_tokens), torch.tensor(ROUTER_Z / num_tokens))
    hidden = decoder(tokens, documents, dtype=torch.float64, router_losses=losses).flatten(0, 1)
    objective, loss = chunked_cross_entropy(
        hidden, decoder.head_weight, targets.flatten(), chunk_tokens=32,
        multiplier=model.logit_multiplier, soft_cap=model.logit_soft_cap, z_loss=Z_LOSS,
    )  # fmt: skip
    (objective / num_tokens).backward()
    return loss.item(), {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


def one_step(model: ModelSpec, job: Job) -> tuple[float, dict[str, tuple[Any, torch.Tensor]]]:
    """The same on this rank of many: its loss sum, and its boxes of the gradients."""
    mesh = Mesh(job.layout, job.expert_tp)
    rank_model = RankModel(model, job, mesh, dtype=torch.float32, chunk_tokens=32)
    rank_model.materialise(seed=3)
    num_tokens = job.step_tokens
    losses = RouterLosses(torch.tensor(BALANCE / num_tokens), torch.tensor(ROUTER_Z / num_tokens))
    objective = Objective(num_tokens, Z_LOSS, losses)
    loss = rank_model.accumulate(part_of(batch(model, job), job, dist.get_rank()), objective)
    boxes = {}
    for name, parameter in rank_model.parameters.items():
        if parameter.grad is not None:
            gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            boxes[name] = (rank_model.table.box(name, mesh.rank), gradient.detach().clone())
    counted = loss.item() if mesh.mates("tp").place == 0 else 0.0
    return counted, boxes


def check(model: ModelSpec, job: Job, tolerance: float = 2e-5) -> None:
    results = run_ranks(one_step, job.layout.num_ranks, model, job)
    loss, gradients = alone(model, job)
    assert sum(counted for counted, _ in results) == pytest.approx(loss, rel=1e-5)
    seen: dict[str, torch.Tensor] = {
        name: torch.zeros_like(g, dtype=torch.bool) for name, g in gradients.items()
    }
    for rank, (_, boxes) in enumerate(results):
        for name, ((offsets, shape), gradient) in boxes.items():
            here = tuple(slice(o, o + s) for o, s in zip(offsets, shape, strict=True))
            wanted = gradients[name].to_dense() if gradients[name].is_sparse else gradients[name]
            assert tuple(gradient.shape) == shape, (rank, name)
            scale = wanted.abs().max()
            error = ((gradient - wanted[here]).abs().max() / scale).item() if gradient.numel() else 0.0
            assert error < tolerance, f"rank {rank}, {name}: off by {error:.2e} of the largest"
            seen[name][here] = True
    assert all(one.all() for one in seen.values())


CASES = {
    "one": (dense(), {}),
    "replica": (dense(), {"replica": 2}),
    "replicas, unequal": (dense(), {"replica": 2}),
    "optimizer": (dense(), {"shard": 2, "sharding": "optimizer"}),
    "gradients": (dense(), {"shard": 2, "sharding": "gradients"}),
    "weights": (dense(), {"shard": 2, "sharding": "weights"}),
    "tp": (dense(), {"tp": 2}),
    "pp": (dense(), {"pp": 2}),
    "gpipe": (dense(), {"pp": 2, "schedule": "gpipe"}),
    "interleaved": (dense(), {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}),
    "zb-h1": (dense(), {"pp": 2, "schedule": "zb-h1"}),
    "zbv": (dense(), {"pp": 2, "schedule": "zbv", "virtual_stages": 2}),
    "dualpipev": (dense(), {"pp": 2, "schedule": "dualpipev", "virtual_stages": 2}),
    "uneven stages, tied": (dense(tied_embeddings=True), {"pp": 2, "stage_layers": (1, 3)}),
    "ep": (mixture(), {"shard": 2, "ep": 2}),
    "mixture, tp": (mixture(), {"tp": 2, "ep": 2}),
    "mixture, expert_tp": (mixture(), {"tp": 2, "expert_tp": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_one_process(name: str) -> None:
    model, settings = CASES[name]
    check(model, job(model, **settings))
