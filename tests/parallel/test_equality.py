"""Any layout computes what one process computes: losses and every parameter's gradient."""

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.common import aot_autograd

from colossus.models import RouterLosses, build, chunked_cross_entropy
from colossus.parallel import recompute
from colossus.parallel.mesh import Mesh
from colossus.parallel.rank_model import Objective, RankModel
from colossus.spec.job import Job, Share
from colossus.spec.model import ModelSpec
from colossus.spec.plan import Recompute
from tests.parallel.layouts import (
    DEEPSEEK_LIKE,
    GPT_LIKE,
    GPT_OSS_LIKE,
    GROK_LIKE,
    OLMO_LIKE,
    SPARSE,
    batch,
    dense,
    job,
    mixture,
    part_of,
)
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
    gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    return loss.item(), {name: g.to_dense() if g.is_sparse else g for name, g in gradients.items()}


def one_step(
    model: ModelSpec, job: Job, compiled: bool = False
) -> tuple[float, dict[str, tuple[Any, torch.Tensor]]]:
    """The same on this rank of many: its loss sum, and its boxes of the gradients."""
    mesh = Mesh(job.layout, job.expert_tp)
    rank_model = RankModel(model, job, mesh, dtype=torch.float32, chunk_tokens=32, compiled=compiled)
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


def check(model: ModelSpec, job: Job, tolerance: float = 2e-5, *, compiled: bool = False) -> None:
    results = run_ranks(one_step, job.layout.num_ranks, model, job, compiled)
    loss, gradients = alone(model, job)
    assert sum(counted for counted, _ in results) == pytest.approx(loss, rel=1e-5)
    seen: dict[str, torch.Tensor] = {
        name: torch.zeros_like(g, dtype=torch.bool) for name, g in gradients.items()
    }
    for rank, (_, boxes) in enumerate(results):
        for name, ((offsets, shape), gradient) in boxes.items():
            here = tuple(slice(o, o + s) for o, s in zip(offsets, shape, strict=True))
            wanted = gradients[name]
            assert tuple(gradient.shape) == shape, (rank, name)
            scale = wanted.abs().max()
            error = ((gradient - wanted[here]).abs().max() / scale).item() if gradient.numel() else 0.0
            assert error < tolerance, f"rank {rank}, {name}: off by {error:.2e} of the largest"
            seen[name][here] = True
    assert all(one.all() for one in seen.values())


UNEQUAL = (
    Share(num_groups=1, micro_batch_sequences=1, num_micro_batches=3),
    Share(num_groups=1, micro_batch_sequences=2, num_micro_batches=2, recompute="full"),
)
UNEQUAL_PIPELINES = tuple(share.model_copy(update={"num_micro_batches": 4}) for share in UNEQUAL)
Case = tuple[ModelSpec, dict[str, Any]]
TWO: dict[str, Case] = {
    "one": (dense(), {}),
    "replica": (dense(), {"replica": 2}),
    "unequal groups": (dense(), {"replica": 2, "shares": UNEQUAL}),
    "unequal groups of a mixture": (mixture(), {"replica": 2, "shares": UNEQUAL}),
    "optimizer": (dense(), {"shard": 2, "sharding": "optimizer"}),
    "gradients": (dense(), {"shard": 2, "sharding": "gradients"}),
    "weights": (dense(), {"shard": 2, "sharding": "weights"}),
    "shard, nothing sharded": (dense(), {"shard": 2}),
    "weights, lookups": (SPARSE, {"shard": 2, "sharding": "weights"}),
    "tp": (dense(), {"tp": 2}),
    "tp, biases": (GPT_LIKE, {"tp": 2}),
    "tp, norms over all heads": (OLMO_LIKE, {"tp": 2}),
    "tp, keys shared, lookups": (SPARSE, {"tp": 2}),
    "tp, latent": (DEEPSEEK_LIKE, {"tp": 2}),
    "tp, plain queries, latent": (
        dense(attention=DEEPSEEK_LIKE.attention.model_copy(update={"q_lora_rank": None})), {"tp": 2}
    ),
    "tp, vocabulary that does not come out even": (dense(vocab_size=97), {"tp": 2}),
    "ring": (dense(), {"cp": 2, "context_exchange": "ring"}),
    "all-gather": (dense(), {"cp": 2, "context_exchange": "all-gather"}),
    "all-to-all": (dense(), {"cp": 2, "context_exchange": "all-to-all"}),
    "ring, windows, soft cap": (GROK_LIKE, {"cp": 2, "context_exchange": "ring"}),
    "ring, sharded, latent": (DEEPSEEK_LIKE, {"cp": 2, "context_exchange": "ring", "sharding": "weights", "ep": 2}),
    "all-gather, sinks, positions": (GPT_LIKE, {"cp": 2, "context_exchange": "all-gather"}),
    "ring, lookups": (SPARSE, {"cp": 2, "context_exchange": "ring"}),
    "pp": (dense(), {"pp": 2}),
    "gpipe": (dense(), {"pp": 2, "schedule": "gpipe"}),
    "interleaved": (dense(), {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}),
    "zb-h1": (dense(), {"pp": 2, "schedule": "zb-h1"}),
    "zb-h1, biases, tied": (GPT_LIKE, {"pp": 2, "schedule": "zb-h1"}),
    "zb-h1, mixture": (GROK_LIKE, {"pp": 2, "schedule": "zb-h1"}),
    "zbv": (dense(), {"pp": 2, "schedule": "zbv", "virtual_stages": 2}),
    "dualpipev": (dense(), {"pp": 2, "schedule": "dualpipev", "virtual_stages": 2}),
    "uneven stages, tied": (dense(tied_embeddings=True), {"pp": 2, "stage_layers": (1, 3)}),
    "pp, lookups": (SPARSE, {"pp": 2}),
    "ep": (mixture(), {"shard": 2, "ep": 2}),
    "ep, weights": (DEEPSEEK_LIKE, {"shard": 2, "ep": 2, "sharding": "weights"}),
    "experts sharded": (GPT_OSS_LIKE, {"shard": 2, "sharding": "weights"}),
    "mixture, tp, ep": (GROK_LIKE, {"tp": 2, "ep": 2}),
    "mixture, expert_tp": (GPT_OSS_LIKE, {"tp": 2, "expert_tp": 2}),
    "mixture, tp alone": (mixture(), {"tp": 2, "sharding": "weights"}),
}  # fmt: skip
FOUR: dict[str, Case] = {
    "fsdp + tp": (dense(), {"shard": 2, "tp": 2, "sharding": "weights"}),
    "tp 4, keys on two ranks": (dense(), {"tp": 4}),
    "pp + fsdp": (dense(), {"pp": 2, "shard": 2, "sharding": "weights"}),
    "pp + optimizer, interleaved": (
        dense(), {"pp": 2, "shard": 2, "sharding": "optimizer", "schedule": "interleaved", "virtual_stages": 2}
    ),
    "zb-h1 + fsdp": (dense(), {"pp": 2, "shard": 2, "sharding": "weights", "schedule": "zb-h1"}),
    "dualpipev + fsdp": (
        dense(), {"pp": 2, "shard": 2, "sharding": "gradients", "schedule": "dualpipev", "virtual_stages": 2}
    ),
    "tp + pp, tied": (GPT_LIKE, {"tp": 2, "pp": 2}),
    "cp + tp": (OLMO_LIKE, {"cp": 2, "tp": 2, "context_exchange": "ring"}),
    "cp 4": (SPARSE, {"cp": 4, "context_exchange": "ring"}),
    "ep + fsdp": (DEEPSEEK_LIKE, {"shard": 4, "ep": 2, "sharding": "weights"}),
    "ep + tp": (GROK_LIKE, {"shard": 2, "tp": 2, "ep": 4, "sharding": "optimizer"}),
    "expert_tp + ep": (mixture(), {"shard": 2, "tp": 2, "expert_tp": 2, "ep": 2, "sharding": "weights"}),
    "replica + fsdp": (dense(), {"replica": 2, "shard": 2, "sharding": "weights"}),
    "replica + pp, unequal": (dense(), {"replica": 2, "pp": 2, "shares": UNEQUAL_PIPELINES}),
}  # fmt: skip
EIGHT: dict[str, Case] = {
    "ep + tp + pp": (GROK_LIKE, {"pp": 2, "shard": 2, "tp": 2, "ep": 4, "sharding": "optimizer"}),
    "replica + pp + fsdp + tp": (dense(tied_embeddings=True), {"replica": 2, "pp": 2, "tp": 2, "shard": 1}),
    "cp + tp + fsdp": (
        DEEPSEEK_LIKE, {"shard": 2, "cp": 2, "tp": 2, "ep": 8, "sharding": "weights", "context_exchange": "all-gather"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TWO)
def test_on_two_ranks(name: str) -> None:
    check(TWO[name][0], job(TWO[name][0], **TWO[name][1]))


@pytest.mark.parametrize("name", FOUR)
def test_on_four_ranks(name: str) -> None:
    check(FOUR[name][0], job(FOUR[name][0], **FOUR[name][1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGHT)
def test_on_eight_ranks(name: str) -> None:
    check(EIGHT[name][0], job(EIGHT[name][0], **EIGHT[name][1]))


@pytest.mark.parametrize("recompute", ["selective", "alternate", "full"])
@pytest.mark.parametrize("model", [GROK_LIKE, GPT_LIKE], ids=lambda model: model.name)
def test_what_is_computed_again_is_the_same(model: ModelSpec, recompute: Any) -> None:
    share = Share(num_micro_batches=2, recompute=recompute)
    check(model, job(model, tp=2, ep=2 if model is GROK_LIKE else 1, shares=(share,)))


@pytest.mark.parametrize(
    "settings",
    [
        {"tp": 2},
        {"tp": 2, "float8": "tensorwise"},
        {"shard": 2, "sharding": "weights"},
        {"shard": 2, "sharding": "weights", "float8": "tensorwise"},
        {"pp": 2, "schedule": "zb-h1"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_fp8_under_any_layout(settings: dict[str, Any]) -> None:
    """The same where matmuls are; where tp splits them, there are other scales: no less exact, but not the same."""
    model, float8 = dense(), settings.get("float8", "rowwise")
    rank_sequences = 4 // settings.get("shard", 1)
    one = job(model, precision="fp8", float8=float8, shares=(Share(num_micro_batches=4),))
    many = job(model, precision="fp8", shares=(Share(num_micro_batches=rank_sequences),), **settings)
    ((_, whole),) = run_ranks(one_step, 1, model, one)
    _, exact = alone(model, one)
    for _, boxes in run_ranks(one_step, 2, model, many):
        for name, ((offsets, shape), gradient) in boxes.items():
            here = tuple(slice(o, o + s) for o, s in zip(offsets, shape, strict=True))
            wanted = whole[name][1][here]
            of_fp8 = (wanted - exact[name][here]).norm()
            assert of_fp8 > 1e-3 * wanted.norm(), f"{name} is as exact as float32"
            assert (gradient - exact[name][here]).norm() < 1.3 * of_fp8, name
            if "tp" not in settings:
                assert (gradient - wanted).abs().max() < 2e-5 * whole[name][1].abs().max(), name


def test_gradients_between_replica_groups_may_travel_in_bfloat16() -> None:
    model = dense()
    check(model, job(model, replica=2, replica_sum="bfloat16"), tolerance=2**-7)
    with pytest.raises(AssertionError, match="off by"):
        check(model, job(model, replica=2, replica_sum="bfloat16"))


WEIGHTS = {"shard": 2, "sharding": "weights"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "settings", "recompute"),
    [
        (dense(num_layers=2), {"tp": 2}, "none"),
        (dense(num_layers=2), {"tp": 2}, "alternate"),
        (dense(num_layers=2), WEIGHTS, "none"),
        (dense(num_layers=2), WEIGHTS, "full"),
        (dense(num_layers=2), WEIGHTS, "alternate"),
        (dense(num_layers=2), {"cp": 2, "context_exchange": "ring"}, "selective"),
        (GROK_LIKE, {"shard": 2, "ep": 2, **WEIGHTS}, "full"),
        (GROK_LIKE, {"tp": 2}, "selective"),
        (GROK_LIKE, WEIGHTS, "alternate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_compiled_layers_compute_the_same(
    model: ModelSpec, settings: dict[str, Any], recompute: Recompute
) -> None:
    """Gradients that a compiled region drops in silence are what this looks for."""
    share = Share(num_micro_batches=2, recompute=recompute)
    check(model, job(model, shares=(share,), **settings), compiled=True)


def graphs_compiled(model: ModelSpec, job: Job) -> tuple[int, bool]:
    """In three steps and an evaluation: how many graphs, and whether the compiler has given up on a function."""
    torch.compiler.reset()
    graphs, given_up = [], []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    backend = aot_autograd(fw_compiler=count, bw_compiler=lambda graph, _: graph.forward)
    before, recompute._compiled = (
        recompute._compiled,
        lambda f: torch.compile(f, backend=backend, dynamic=False),
    )
    logger, handler = logging.getLogger("torch._dynamo.convert_frame"), logging.Handler()
    handler.emit = given_up.append
    logger.addHandler(handler)
    try:
        rank_model = RankModel(model, job, Mesh(job.layout, job.expert_tp), dtype=torch.float32,
                               chunk_tokens=32, compiled=True)  # fmt: skip
        rank_model.materialise(seed=3)
        for step in range(3):
            part = part_of(batch(model, job, step), job, dist.get_rank())
            rank_model.accumulate(part, Objective(job.step_tokens))
            rank_model.clear_gradients()
        rank_model.evaluate(part)
    finally:
        logger.removeHandler(handler)
        recompute._compiled = before
    return len(graphs), any("limit" in record.getMessage() for record in given_up)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "settings", "most"),
    [
        (dense(num_layers=10), {"tp": 2}, 2),
        (dense(num_layers=10), {"shard": 2, "sharding": "weights"}, 2),
        (mixture(num_layers=10), {"shard": 2, "ep": 2, "sharding": "weights"}, 16),
    ],
    ids=["tp", "weights", "experts"],
)
def test_layers_that_are_alike_are_compiled_once(model: ModelSpec, settings: Any, most: int) -> None:
    """With gradients and without. Of one function the compiler makes 8 graphs, and then none for any layer."""
    for graphs, gave_up in run_ranks(graphs_compiled, 2, model, job(model, **settings)):
        assert not gave_up
        assert graphs <= most
