"""What the sharding table says of a layout, and what ranks are built as: all models, up to 200,000 ranks."""

import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from colossus import zoo
from colossus.parallel.apply import apply, local_tensor, table_of
from colossus.parallel.dry_run import fake_world
from colossus.parallel.mesh import Mesh
from colossus.parallel.rank_model import Objective, RankModel
from colossus.spec.job import Job, Share
from colossus.spec.layout import GROUPS, Layout, mates
from colossus.spec.model import ModelSpec, MoeSpec
from colossus.spec.sharding import sharding_table
from tests.parallel.layouts import DEEPSEEK_LIKE, GROK_LIKE, OLMO_LIKE, batch, dense, job, mixture, part_of

LAYOUTS: dict[str, tuple[Layout, int]] = {
    "one": (Layout(), 1),
    "tp": (Layout(tp=2), 1),
    "fsdp": (Layout(replica=3, shard=7), 1),
    "cp + tp": (Layout(shard=2, cp=2, tp=4), 1),
    "ep + expert_tp": (Layout(replica=2, shard=4, tp=2, ep=4), 2),
    "200,000": (Layout(replica=390, pp=1, shard=64, cp=1, tp=8, ep=8), 1),
}
"""With how many ranks share each expert."""


def _can_be_split(model: ModelSpec, layout: Layout, expert_tp: int) -> bool:
    """Whether it has enough heads and experts."""
    attention = model.attention
    if attention.num_heads % layout.tp:
        return False
    experts = {group.mlp.num_experts for group in model.layer_groups() if isinstance(group.mlp, MoeSpec)}
    return (
        all(count % layout.ep == 0 for count in experts) and layout.stage_ranks % (layout.ep * expert_tp) == 0
    )


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (name, layout)
        for name in zoo.names()
        for layout, (axes, expert_tp) in LAYOUTS.items()
        if _can_be_split(zoo.find(name), axes, expert_tp)
    ],
)
def test_boxes_of_a_group_are_the_whole_model(name: str, layout: str) -> None:
    """Counted over the ranks of one replica group, each box once however many ranks hold it."""
    model, (axes, expert_tp) = zoo.find(name), LAYOUTS[layout]
    table = sharding_table(model, axes, expert_tp)
    ranks = range(axes.num_ranks - axes.group_ranks, axes.num_ranks)  # the last group
    counted = 0
    seen: dict[Any, int] = {}
    for parameter, times in _parameters(model):
        key = (parameter.name.rpartition("layers.")[2].split(".", 1)[-1], parameter.shape)
        if key not in seen:
            boxes = {table.box(parameter.name, rank) for rank in ranks}
            seen[key] = sum(math.prod(box.shape) for box in boxes)
        counted += times * seen[key]
    assert counted == model.num_params()


def _parameters(model: ModelSpec) -> Any:
    for parameter in (*model.input_parameters(), *model.output_parameters()):
        yield parameter, 1
    for group in model.layer_groups():
        for parameter in group.parameters:
            full = next(
                p for p in model.parameters() if p.name == f"layers.{group.first_layer}.{parameter.name}"
            )
            yield full, group.num_layers


@pytest.mark.parametrize(
    ("layout", "expert_tp"),
    [
        *LAYOUTS.values(),
        (Layout(replica=5, pp=3, shard=2, cp=2, tp=2, ep=4), 2),
        (Layout(replica=282, pp=22, shard=2, cp=4, tp=4, ep=8), 4),
    ],
    ids=str,
)
def test_coordinates_and_mates_agree(layout: Layout, expert_tp: int) -> None:
    ranks = {0, layout.num_ranks - 1, layout.num_ranks // 2, layout.num_ranks * 2 // 3}
    for rank in ranks:
        assert layout.rank(layout.coordinates(rank)) == rank
        for group in GROUPS:
            here = mates(layout, expert_tp, rank, group)
            assert here.ranks[here.place] == rank
            assert len(set(here.ranks)) == here.size
            for place, other in enumerate(here.ranks[:40]):
                assert mates(layout, expert_tp, other, group) == (place, here.ranks)
        whole = math.prod(mates(layout, expert_tp, rank, group).size for group in ("pp", "shards", "tp"))
        assert whole == layout.group_ranks == mates(layout, expert_tp, rank, "group").size
        inside = ("ep", "expert_tp", "expert_shards")
        assert math.prod(mates(layout, expert_tp, rank, g).size for g in inside) == layout.stage_ranks


@pytest.mark.parametrize(
    ("name", "axes", "expert_tp", "sharding"),
    [
        ("llama3.1-405b", {"replica": 64, "pp": 16, "shard": 2, "cp": 1, "tp": 8}, 1, "weights"),
        ("grok-1", {"replica": 195, "pp": 8, "shard": 8, "cp": 2, "tp": 8, "ep": 8}, 1, "gradients"),
        ("grok-2", {"replica": 390, "pp": 16, "shard": 4, "tp": 8, "ep": 4}, 8, "weights"),
        ("deepseek-v3", {"replica": 16, "pp": 16, "shard": 8, "ep": 8}, 1, "optimizer"),
        ("gpt2", {"replica": 2, "tp": 4, "shard": 4}, 1, "none"),
    ],
)
def test_ranks_are_built_as_the_table_says(
    name: str, axes: dict[str, int], expert_tp: int, sharding: Any
) -> None:
    """Local shapes in a fake world of the true size, on the first, a middle and the last rank."""
    model, layout = zoo.find(name), Layout(**axes)
    each, rest = divmod(model.num_layers, layout.pp)
    plain = {
        "stage_layers": tuple(each + (place < rest) for place in range(layout.pp)),
        "schedule": "none" if layout.pp == 1 else "1f1b",
        "shares": (Share(num_groups=layout.replica, num_micro_batches=32),),
        "context_exchange": "ring" if layout.cp > 1 else None,
    }
    made = Job(layout=layout, expert_tp=expert_tp, sharding=sharding, sequence_tokens=1024, **plain)
    table = table_of(model, made)
    for rank in (0, layout.num_ranks // 2 + 5, layout.num_ranks - 1):
        with fake_world(layout.num_ranks, rank):
            mesh = Mesh(layout, expert_tp)
            assert mesh.here == layout.coordinates(rank)
            parts = apply(model, made, mesh, dtype=torch.bfloat16)
            for part in parts:
                assert part.stage.rank == mesh.here.pp
                for parameter_name, parameter in part.parameters():
                    box = table.box(parameter_name, rank)
                    assert tuple(local_tensor(parameter).shape) == box.shape, parameter_name


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (dense(), {"tp": 2}),
        (OLMO_LIKE, {"tp": 4, "replica": 1024}),
        (dense(), {"cp": 2, "context_exchange": "all-to-all"}),
        (mixture(), {"shard": 4, "ep": 4}),
        (GROK_LIKE, {"tp": 2, "shard": 2, "ep": 2, "expert_tp": 2}),
        (DEEPSEEK_LIKE, {"shard": 4, "ep": 2, "sharding": "weights"}),
    ],
    ids=["tp", "tp 4 of 4,096", "cp", "ep", "expert_tp", "fsdp"],
)
def test_flops_of_a_rank_are_its_share(model: ModelSpec, settings: dict[str, Any]) -> None:
    """As torch counts them in a fake step: three passes over this rank's part of every matmul of its samples."""
    made = job(model, **settings)
    layout, share = made.layout, made.shares[0]
    with fake_world(layout.num_ranks, 0):
        mesh = Mesh(layout, made.expert_tp)
        rank_model = RankModel(model, made, mesh, dtype=torch.float32, chunk_tokens=32)
        with FakeTensorMode(allow_non_fake_inputs=True):
            rank_model.materialise(None)
            with FlopCounterMode(display=False) as counter:
                rank_model.accumulate(part_of(batch(model, made), made, 0), Objective(made.step_tokens))
    tokens = made.sequence_tokens
    whole = 3 * model.forward_flops(share.rank_sequences, tokens) / (layout.cp * layout.tp)
    assert counter.get_total_flops() == pytest.approx(whole, rel=1e-9)
