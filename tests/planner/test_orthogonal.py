"""Muon as the planner sees it: the matrices are the model's own, and their time and memory what follows from them."""

from dataclasses import replace

import numpy as np
import pytest

from colossus import zoo
from colossus.cli.prove import what_for
from colossus.errors import ConfigError
from colossus.hardware import parse_fleet
from colossus.parallel.dry_run import dtype_of, prove
from colossus.planner.estimate.constants import Constants, shipped
from colossus.planner.estimate.execution import Execution, Hardware
from colossus.planner.estimate.measured import rates
from colossus.planner.estimate.orthogonal import matrix_weights, orthogonal_s
from colossus.planner.estimate.rank_memory import How, rank_memory
from colossus.planner.estimate.shape import ModelShape
from colossus.planner.one_rank.plan import loss_chunk_tokens
from colossus.planner.plan import make_plan
from colossus.spec.fleet import Precision
from colossus.spec.goal import Goal
from colossus.spec.job import Job, Share
from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec
from colossus.spec.run import OPTIMIZERS
from tests.parallel.plans import plan_of
from tests.planner import measured as known
from tests.planner.test_step import execution as of

MODELS = [
    "llama-3.1-8b",
    "gpt2",
    "qwen3-8b",
    "mixtral-8x7b",
    "deepseek-v3",
    "grok-1",
    "grok-2",
    "gpt-oss-20b",
]
SECONDS_PER_FLOP = 1e-12


def numbers(model: str, **axes: float) -> tuple[ModelShape, Execution]:
    return ModelShape.of(zoo.find(model)), of(muon=1.0, **axes)


def hardware() -> Hardware:
    """A chip that multiplies at one rate, whatever the shapes, and exchanges at no cost worth speaking of."""
    curves = rates(known.made_up())
    curves = replace(curves, laws=dict.fromkeys(curves.laws, (SECONDS_PER_FLOP, 0.0, 0.0)))
    return replace(Hardware.of(parse_fleet("h100:8").pools[0].node, "bfloat16"), measured=curves)


def constants() -> Constants:
    return Constants.gather(shipped(), ["hopper"], ["bfloat16"], ["megatron-core"], ["cudnn"])


def products_s(model: str, **axes: float) -> float:
    shape, x = numbers(model, **axes)
    products, _ = orthogonal_s(shape, x, shape.layers / x.pp, hardware(), constants())
    return float(np.asarray(products).reshape(-1)[0])


def flops_of(model: str) -> list[float]:
    """Of orthogonalising each matrix: five times m·n·m, m·m·m and m·m·n, twice."""
    found = []
    for parameter in zoo.find(model).parameters():
        if parameter.role == "matrix":
            *stack, rows, columns = parameter.shape
            small, large = sorted((rows, columns))
            found += [5 * 2 * (2 * small**2 * large + small**3)] * (stack[0] if stack else 1)
    return found


@pytest.mark.parametrize("model", MODELS)
def test_its_matrices_are_those_of_the_model(model: str) -> None:
    shape, x = numbers(model)
    dense, experts = (float(np.asarray(a).reshape(-1)[0]) for a in matrix_weights(shape, x))
    matrices = [p for p in zoo.find(model).parameters() if p.role == "matrix"]
    layers = zoo.find(model).num_layers
    for found, is_expert in ((dense, False), (experts, True)):
        expected = sum(p.num_elements for p in matrices if p.expert is is_expert)
        # A shape counts a latent key's rotary part as if it came from the latent, too.
        assert found * layers == pytest.approx(expected, rel=0.03 if model == "deepseek-v3" else 1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_products_take_the_flops_of_five_steps(model: str) -> None:
    assert products_s(model) == pytest.approx(sum(flops_of(model)) * SECONDS_PER_FLOP, rel=0.01)


def test_ranks_share_them_and_none_is_split() -> None:
    alone = products_s("llama-3.1-8b")
    assert products_s("llama-3.1-8b", shard=4.0, data=4.0) == pytest.approx(alone / 4)
    assert products_s("llama-3.1-8b", tp=8.0) == pytest.approx(alone / 8)
    largest = max(flops_of("llama-3.1-8b")) * SECONDS_PER_FLOP
    assert products_s("llama-3.1-8b", shard=4096.0, data=4096.0) == pytest.approx(largest)


def test_a_plan_with_muon_has_a_longer_step_and_less_state() -> None:
    model, fleet = zoo.find("llama-3.1-8b"), parse_fleet("h100:16")
    fixed = {"tp": 1, "pp": 1, "shard": 16, "sharding": "weights", "micro_batch": 1, "recompute": "full"}
    made = {
        optimizer: make_plan(model, fleet, Goal(tokens=10**11, fixed={**fixed, "optimizer": optimizer})).plan
        for optimizer in ("adamw", "muon")
    }
    assert [plan.optimizer for plan in made.values()] == ["adamw", "muon"]
    parts = {name: plan.estimate.step_parts_s["optimizer"] for name, plan in made.items()}
    assert parts["muon"] > 1.2 * parts["adamw"]
    held = {name: plan.pools[0].memory_bytes["optimizer"] for name, plan in made.items()}
    tables = 2 * model.vocab_size * model.hidden_size
    assert held["adamw"] == pytest.approx(8 * model.num_params() / 16, rel=0.01)
    assert held["muon"] == pytest.approx((4 * model.num_params() + 4 * tables) / 16, rel=0.01)


def test_state_in_sixteen_bits_takes_half() -> None:
    model, fleet = zoo.find("llama-3.1-8b"), parse_fleet("h100:16")
    held = [
        make_plan(model, fleet, Goal(tokens=10**11, fixed={"shard": 16, "tp": 1, "pp": 1, **fixed}))
        .plan.pools[0]
        .memory_bytes["optimizer"]
        for fixed in ({}, {"optimizer_state": "bfloat16"})
    ]
    assert held[0] == 2 * held[1]


def test_another_optimizer_cannot_be_planned() -> None:
    with pytest.raises(ConfigError, match="--fix optimizer=lion cannot be"):
        make_plan(zoo.find("gpt2"), parse_fleet("h100:8"), Goal(tokens=10**9, fixed={"optimizer": "lion"}))


SHALLOW = ModelSpec(
    name="shallow", vocab_size=512, context_tokens=64, num_layers=4, hidden_size=512,
    attention=AttentionSpec(num_heads=8, num_kv_heads=4, head_dim=64), mlp=MlpSpec(intermediate_size=1536),
)  # fmt: skip
"""So few tokens that the optimizer's step is what takes most memory."""


@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("float32", {"shard": 4, "sharding": "weights"}),
        ("float32", {"shard": 2, "tp": 2, "sharding": "weights"}),
        ("float32", {"tp": 4}),
        ("bfloat16", {"shard": 4, "sharding": "optimizer"}),
        ("float32", {"pp": 2, "shard": 2, "tp": 2, "sharding": "gradients"}),
    ],
    ids=["fsdp", "fsdp, tp", "tp", "zero 1, bfloat16", "pp, fsdp, tp"],
)
def test_memory_of_a_round_is_what_is_seen(precision: Precision, settings: dict[str, object]) -> None:
    share = Share(num_micro_batches=2)
    plan = plan_of(
        SHALLOW, optimizer="muon", sequence_tokens=64, shares=(share,), precision=precision, **settings
    )
    for one in prove(plan).roles:
        here = share.model_copy(update={"num_micro_batches": one.num_micro_batches})
        how = How(
            dtype=dtype_of(plan),
            chunk_tokens=loss_chunk_tokens(SHALLOW, 64, "cuda", tp=plan.layout.tp),
            optimizer=OPTIMIZERS["muon"],
            router_losses=True,
        )
        counted = rank_memory(
            SHALLOW, Job.of(plan).model_copy(update={"shares": (here,)}), one.role.rank, how
        )
        assert sum(counted.values()) == pytest.approx(one.peak_bytes, rel=0.1)
        assert all(
            what_for(e.group, e.kind) == "whole matrices for Muon"
            for e in one.issued
            if e.kind == "all-to-all"
        )
