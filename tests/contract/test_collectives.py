"""What a step exchanges is what was priced: by kind, group and bytes, on every rank."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from colossus.models import RouterLosses
from colossus.parallel.dry_run import exchange_after_backward
from colossus.parallel.mesh import Mesh
from colossus.parallel.rank_model import Objective, RankModel
from colossus.parallel.record import CollectiveRecorder
from colossus.planner.estimate import layers, network, step
from colossus.planner.estimate.collectives import Exchange, collectives
from colossus.planner.estimate.shape import ModelShape
from colossus.spec.job import Job, Share
from colossus.spec.model import Dtype, ModelSpec
from tests.parallel.layouts import (
    DEEPSEEK_LIKE,
    GPT_LIKE,
    GPT_OSS_LIKE,
    GROK_LIKE,
    OLMO_LIKE,
    batch,
    dense,
    job,
    mixture,
    part_of,
)
from tests.parallel.ranks import run_ranks
from tests.planner.test_step import constants, execution, hardware

CHUNK_TOKENS = 24
"""No divisor of a micro-batch's tokens: the last chunk is a smaller one."""


def recorded(model: ModelSpec, job: Job, dtype: torch.dtype, router_losses: bool) -> tuple[Exchange, ...]:
    """Of a real step, on this rank."""
    mesh = Mesh(job.layout, job.expert_tp)
    rank_model = RankModel(model, job, mesh, dtype=dtype, chunk_tokens=CHUNK_TOKENS)
    rank_model.materialise(seed=3)
    some = torch.tensor(0.01 / job.step_tokens)
    objective = Objective(job.step_tokens, 0.0, RouterLosses(some, some) if router_losses else None)
    here = part_of(batch(model, job), job, dist.get_rank())
    with CollectiveRecorder(mesh) as recorder:
        loss = rank_model.accumulate(here, objective)
        exchange_after_backward(rank_model, loss)
    return recorder.exchanges()


def check(
    model: ModelSpec, job: Job, *, dtype: Dtype = "float32", router_losses: bool = True
) -> list[tuple[Exchange, ...]]:
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    issued = run_ranks(recorded, job.layout.num_ranks, model, job, kind, router_losses)
    total: Counter[str] = Counter()
    for rank, seen in enumerate(issued):
        wanted = collectives(
            model, job, rank, dtype=dtype, chunk_tokens=CHUNK_TOKENS, router_losses=router_losses
        )
        assert _without_tokens(seen) == _without_tokens(wanted), f"rank {rank}"
        # Tokens choose their experts: one rank sends more than another, and all of them what was priced.
        for sign, exchanges in ((1, seen), (-1, wanted)):
            for one in exchanges:
                if one.group == "ep":
                    total["bytes"] += sign * one.total_bytes
                    total["count"] += sign * one.times
    assert not any(total.values()), total
    return issued


def _without_tokens(exchanges: tuple[Exchange, ...]) -> list[Exchange]:
    return [one for one in exchanges if one.group != "ep"]


Case = tuple[ModelSpec, dict[str, Any]]
UNEQUAL = (
    Share(num_groups=1, micro_batch_sequences=1, num_micro_batches=3),
    Share(num_groups=1, micro_batch_sequences=2, num_micro_batches=2, recompute="full"),
)
FULL = (Share(micro_batch_sequences=2, num_micro_batches=2, recompute="full"),)
SELECTIVE = (Share(micro_batch_sequences=2, num_micro_batches=2, recompute="selective"),)
ALTERNATE = (Share(micro_batch_sequences=1, num_micro_batches=2, recompute="alternate"),)
TWO: dict[str, Case] = {
    "replica, unequal groups": (dense(), {"replica": 2, "shares": UNEQUAL}),
    "optimizer": (dense(), {"shard": 2, "sharding": "optimizer"}),
    "gradients": (dense(), {"shard": 2, "sharding": "gradients"}),
    "weights": (dense(), {"shard": 2, "sharding": "weights"}),
    "weights, full recompute": (DEEPSEEK_LIKE, {"shard": 2, "sharding": "weights", "shares": FULL}),
    "shard, nothing sharded": (dense(), {"shard": 2}),
    "weights, rows that do not come out even": (dense(vocab_size=97), {"shard": 2, "sharding": "weights"}),
    "tp": (dense(), {"tp": 2}),
    "tp, biases, full": (GPT_LIKE, {"tp": 2, "shares": FULL}),
    "tp, norms over all heads, full": (OLMO_LIKE, {"tp": 2, "shares": FULL}),
    "tp, latent, alternate": (DEEPSEEK_LIKE, {"tp": 2, "shares": ALTERNATE}),
    "tp, vocabulary that does not come out even": (dense(vocab_size=97), {"tp": 2}),
    "ring, full": (dense(), {"cp": 2, "context_exchange": "ring", "shares": FULL}),
    "ring, selective": (dense(), {"cp": 2, "context_exchange": "ring", "shares": SELECTIVE}),
    "all-gather, selective": (dense(), {"cp": 2, "context_exchange": "all-gather", "shares": SELECTIVE}),
    "all-to-all, selective": (dense(), {"cp": 2, "context_exchange": "all-to-all", "shares": SELECTIVE}),
    "all-to-all, alternate": (dense(), {"cp": 2, "context_exchange": "all-to-all", "shares": ALTERNATE}),
    "ring, latent, sharded, experts": (
        DEEPSEEK_LIKE, {"cp": 2, "context_exchange": "ring", "sharding": "weights", "ep": 2}
    ),
    "pp": (dense(), {"pp": 2}),
    "interleaved": (dense(), {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}),
    "zb-h1, tied": (GPT_LIKE, {"pp": 2, "schedule": "zb-h1"}),
    "dualpipev": (dense(), {"pp": 2, "schedule": "dualpipev", "virtual_stages": 2}),
    "uneven stages, tied": (dense(tied_embeddings=True), {"pp": 2, "stage_layers": (1, 3)}),
    "ep": (mixture(), {"shard": 2, "ep": 2}),
    "ep, full": (mixture(), {"shard": 2, "ep": 2, "shares": FULL}),
    "ep, weights": (DEEPSEEK_LIKE, {"shard": 2, "ep": 2, "sharding": "weights"}),
    "experts sharded, full": (GPT_OSS_LIKE, {"shard": 2, "sharding": "weights", "shares": FULL}),
    "experts sharded, alternate": (GPT_OSS_LIKE, {"shard": 2, "sharding": "weights", "shares": ALTERNATE}),
    "gathered once, alternate": (GROK_LIKE, {"shard": 2, "sharding": "gradients", "shares": ALTERNATE}),
    "mixture, tp, ep": (GROK_LIKE, {"tp": 2, "ep": 2, "shares": FULL}),
    "mixture, expert_tp": (GPT_OSS_LIKE, {"tp": 2, "expert_tp": 2}),
    "mixture, expert_tp, full": (GPT_OSS_LIKE, {"tp": 2, "expert_tp": 2, "shares": FULL}),
    "mixture, tp alone": (mixture(), {"tp": 2, "sharding": "weights"}),
}  # fmt: skip
FOUR: dict[str, Case] = {
    "fsdp + tp": (dense(), {"shard": 2, "tp": 2, "sharding": "weights"}),
    "tp 4, keys on two ranks": (dense(), {"tp": 4}),
    "pp + optimizer, interleaved": (
        dense(), {"pp": 2, "shard": 2, "sharding": "optimizer", "schedule": "interleaved", "virtual_stages": 2}
    ),
    "zb-h1 + fsdp": (dense(), {"pp": 2, "shard": 2, "sharding": "weights", "schedule": "zb-h1"}),
    "tp + pp, tied": (GPT_LIKE, {"tp": 2, "pp": 2}),
    "cp + tp": (OLMO_LIKE, {"cp": 2, "tp": 2, "context_exchange": "ring"}),
    "ep + fsdp": (DEEPSEEK_LIKE, {"shard": 4, "ep": 2, "sharding": "weights"}),
    "expert_tp + ep": (mixture(), {"shard": 2, "tp": 2, "expert_tp": 2, "ep": 2, "sharding": "weights"}),
    "replica + fsdp": (dense(), {"replica": 2, "shard": 2, "sharding": "weights"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TWO)
def test_on_two_ranks(name: str) -> None:
    check(TWO[name][0], job(TWO[name][0], **TWO[name][1]))


@pytest.mark.parametrize("name", FOUR)
def test_on_four_ranks(name: str) -> None:
    check(FOUR[name][0], job(FOUR[name][0], **FOUR[name][1]))


@pytest.mark.parametrize("router_losses", [False, True])
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (mixture(), {"shard": 2, "ep": 2, "sharding": "weights"}),
        (GROK_LIKE, {"tp": 2, "ep": 2, "shares": FULL}),
        (DEEPSEEK_LIKE, {"tp": 2, "expert_tp": 2, "shares": FULL}),
        (mixture(), {"tp": 2, "expert_tp": 2, "shares": FULL}),
        (GROK_LIKE, {"shard": 2, "sharding": "weights", "shares": ALTERNATE}),
        (
            DEEPSEEK_LIKE,
            {"pp": 2, "shard": 2, "sharding": "gradients", "schedule": "zb-h1", "shares": ALTERNATE},
        ),
    ],
    ids=["ep", "grok", "deepseek", "expert_tp", "alternate", "zb-h1, alternate"],
)
def test_in_bfloat16(model: ModelSpec, settings: dict[str, Any], router_losses: bool) -> None:
    check(model, job(model, **settings), dtype="bfloat16", router_losses=router_losses)


@pytest.mark.parametrize("num_micro_batches", [2, 3])
def test_weight_gradients_that_all_come_last_in_bfloat16(num_micro_batches: int) -> None:
    """On the last rank of zb-h1 they wait for so many micro-batches that none is there when norms' are summed."""
    shares = (Share(num_micro_batches=num_micro_batches),)
    settings = {"pp": 2, "shard": 2, "sharding": "weights", "schedule": "zb-h1", "shares": shares}
    check(dense(), job(dense(), **settings), dtype="bfloat16")


# --- the seconds that the search puts on bytes ---


def _bytes_of(
    axis: str, model: ModelSpec, job: Job, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> float:
    """What the planner's formulas of an axis hand to its network in one pass or micro-batch of a layer."""
    share, layout = job.shares[0], job.layout
    shape = ModelShape.of(model)
    x = execution(
        sequence=job.sequence_tokens, micro_batch=share.micro_batch_sequences, tp=layout.tp, cp=layout.cp,
        ep=layout.ep, expert_tp=job.expert_tp, overlap_tensor=0, overlap_experts=0, **changes,
    )  # fmt: skip
    handed: list[float] = []

    def seconds(size_bytes: Any, *_: Any, **__: Any) -> Any:
        handed.append(float(size_bytes))
        return np.asarray(size_bytes, dtype=float)

    for name in ("ring_s", "send_s", "all_to_all_s"):
        monkeypatch.setattr(network, name, seconds)
    tokens = np.asarray(share.micro_batch_sequences * job.sequence_tokens / layout.cp)
    chip, fitted = hardware(), constants()
    match axis:
        case "tp":
            return float(layers._tensor(shape, x, tokens, chip, fitted))
        case "ep":
            return float(layers._dispatch(shape, x, tokens, chip, fitted))
        case "pp":
            x = replace(x, pp=np.asarray(2.0))
            step._pipeline_s(shape, x, chip, fitted)
            return handed[0]
        case _:  # keys and values of a rank; then those gathered; then all that is traded, there and back
            none = (np.zeros(()), np.zeros(()))
            layers._exchanges(shape, x, tokens, none, np.zeros(()), chip, fitted)
            return {"ring": handed[0], "all-gather": handed[1], "all-to-all": handed[2] + handed[3]}[axis]


def _issued(model: ModelSpec, job: Job, group: str, rank: int = 0) -> list[Exchange]:
    priced = collectives(model, job, rank, dtype="bfloat16", chunk_tokens=CHUNK_TOKENS)
    return [one for one in priced if one.group == group]


def test_seconds_of_each_axis_are_of_the_bytes_that_are_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass of one layer, in bfloat16. Known to differ, and left so, as published runs are of other software: in 8
    bits the search has tensor-parallel gathers in 8 bits, which ours makes in 16; gradients go round a ring in float32
    here and in 16 bits there; gathered keys and values are kept here for the backward pass and gathered again there;
    ranks that share an expert gather tokens before they travel here, and after it there; recompute here leaves out a
    scatter at a layer's end."""
    one = (Share(num_micro_batches=1),)
    flat = dense(num_layers=1, attention=GROK_LIKE.attention.model_copy(update={"window": None}))
    made = job(flat, tp=2, shares=one)
    size = 32 * flat.hidden_size * 2  # a micro-batch's hidden states
    around = [e for e in _issued(flat, made, "tp") if e.kind in ("all-gather", "reduce-scatter")]
    # Beside two passes of the layer: the embedding (float32, as nothing is sharded) and the loss, forward and backward.
    total = sum(e.total_bytes for e in around) - 2 * 2 * size - 2 * size
    assert total == 2 * _bytes_of("tp", flat, made, monkeypatch)

    mixed = mixture(num_layers=1)
    made = job(mixed, shard=2, ep=2, shares=one)
    rows = sum(e.total_bytes for e in _issued(mixed, made, "ep") if e.num_bytes > 64)
    assert rows == 2 * _bytes_of("ep", mixed, made, monkeypatch)

    made = job(dense(), pp=2, tp=2, shares=one)
    (message,) = {e.num_bytes for e in _issued(dense(), made, "pp")}
    assert message == _bytes_of("pp", dense(), made, monkeypatch)

    shapes = {"ring": "send", "all-gather": "all-gather", "all-to-all": "all-to-all"}
    for exchange, kind in shapes.items():
        made = job(flat, cp=2, context_exchange=exchange, shares=one)
        sizes = sorted(e.num_bytes for e in _issued(flat, made, "cp") if e.kind == kind)
        forward = sum(sizes) if exchange == "all-to-all" else sizes[0]
        assert forward == _bytes_of(exchange, flat, made, monkeypatch), exchange


def test_seconds_of_sharding_are_of_the_weights_that_are_gathered() -> None:
    """The search knows a layer's matrices; norms, biases and routers are the rest."""
    for model, ep in ((dense(num_layers=1), 1), (mixture(num_layers=1), 2)):
        made = job(model, shard=4, ep=ep, sharding="weights", shares=(Share(num_micro_batches=1),))
        gathered = [
            e for e in collectives(model, made, 0, dtype="bfloat16", chunk_tokens=CHUNK_TOKENS)
            if e.kind == "all-gather" and e.group in ("shards", "expert_shards") and e.times == 2
        ]  # fmt: skip
        x = execution(ep=ep, expert_tp=1)
        weights = float(layers.layer_weights(ModelShape.of(model), x))
        assert sum(e.num_bytes for e in gathered) == pytest.approx(2 * weights, rel=0.12)
