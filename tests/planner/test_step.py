"""The step estimate keeps physics' bounds, whatever the layout, and agrees with published measurements of its parts."""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus import zoo
from colossus.hardware import catalog
from colossus.planner.estimate import network
from colossus.planner.estimate.columns import soft_max
from colossus.planner.estimate.compute import linear_s, matmul_s
from colossus.planner.estimate.constants import Constants, kernels_of, shipped
from colossus.planner.estimate.execution import FASTEST_EXCHANGE, Execution, Hardware
from colossus.planner.estimate.layers import LAYER_COLUMNS, fastest_exchange, layer_times, unique_layers
from colossus.planner.estimate.shape import ModelShape
from colossus.planner.estimate.step import StepParts, stage_layers, stage_weights, step_parts, step_parts_of
from colossus.spec.fleet import Precision

MODELS = ("llama3-8b", "llama3.1-405b", "grok1-314b", "deepseek-v3-671b", "gpt3-175b")
RATES = ("peak_flops", "wide_flops", "memory_bandwidth", "scale_up_bandwidth", "nic_bandwidth")


def constants(
    generation: str = "hopper", precision: str = "bfloat16", stack: str = "megatron-core"
) -> Constants:
    return Constants.gather(shipped(), [generation], [precision], [stack], ["cudnn"]).take(np.array(0))


def execution(**changes: Any) -> Execution:
    """One sequence of 4,096 tokens on one rank, with all that can be fused and overlapped."""
    numbers: dict[str, Any] = {
        field.name: 1.0 for field in fields(Execution)
    } | {"sequence": 4096, "sharding": 0, "recompute": 0, "gradient_bytes": 4, "exchange": 0,
        "muon": 0, "state_bytes": 4}  # fmt: skip
    return Execution(**{name: np.asarray(value, dtype=float) for name, value in (numbers | changes).items()})


def hardware(node: str = "hgx-h100", precision: Precision = "bfloat16") -> Hardware:
    return Hardware.of(catalog.node(node), precision)


@st.composite
def candidates(draw: st.DrawFn) -> tuple[ModelShape, Execution, Hardware, Constants]:
    shape = ModelShape.of(zoo.find(draw(st.sampled_from(MODELS))))
    precision: Precision = draw(st.sampled_from(["bfloat16", "fp8"]))
    tp, pp, cp, data = (2 ** draw(st.integers(0, top)) for top in (3, 4, 3, 6))
    chunks = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    ep = 2 ** draw(st.integers(0, 3)) if float(shape.experts) else 1
    shard = 2 ** draw(st.integers(0, int(math.log2(data))))
    flags = {
        name: draw(st.sampled_from([0, 1]))
        for name in (
            "sequence_parallel", "flash", "fused", "few_launches", "overlap_data", "overlap_tensor",
            "overlap_experts", "one_copy_per_node", "whole_groups",
        )
    }  # fmt: skip
    x = execution(
        tp=tp, pp=pp, cp=cp, data=data, chunks=chunks, ep=ep, shard=shard,
        expert_tp=draw(st.sampled_from([1, tp])),
        sharding=draw(st.integers(0, 3)),
        recompute=draw(st.integers(0, 3)),
        micro_batch=draw(st.sampled_from([1, 2, 4])),
        micro_batches=draw(st.integers(1, 64)),
        sequence=draw(st.sampled_from([1024, 4096, 8192, 32768])),
        **flags,
    )  # fmt: skip
    return shape, x, hardware("hgx-h100", precision), constants(precision=precision)


def active_weights(shape: ModelShape) -> float:
    per_expert_layer = shape.shared_weights + shape.top_k * shape.expert_weights
    layers = shape.layers * shape.attention_weights + shape.dense_layers * shape.mlp_weights
    return float(layers + shape.expert_layers * per_expert_layer + shape.embedding_weights)


@settings(max_examples=150, deadline=None)
@given(candidates())
def test_never_faster_than_flops_and_bytes_allow(
    candidate: tuple[ModelShape, Execution, Hardware, Constants],
) -> None:
    shape, x, chip, _ = candidate
    total_s = float(step_parts(*candidate).total_s)
    tokens = x.micro_batch * x.sequence * x.micro_batches * x.data
    ranks = x.tp * x.pp * x.cp * x.data
    assert total_s >= 6.0 * active_weights(shape) * float(tokens / (ranks * chip.peak_flops))
    # Each micro-batch reads the weights of a stage forward and backward.
    most, _, _ = stage_layers(shape.layers, x.pp, x.chunks)
    read_bytes = (2.0 - chip.narrow) * (most - 2) * shape.attention_weights / x.tp * 2.0
    assert total_s >= float(x.micro_batches * read_bytes / chip.memory_bandwidth)
    for field in fields(StepParts):
        assert float(getattr(step_parts(*candidate), field.name)) >= -1e-12, field.name


@settings(max_examples=150, deadline=None)
@given(candidates(), st.sampled_from(RATES), st.floats(1.001, 8.0))
def test_faster_hardware_never_hurts_and_nothing_jumps(
    candidate: tuple[ModelShape, Execution, Hardware, Constants], rate: str, factor: float
) -> None:
    shape, x, chip, c = candidate
    before = float(step_parts(shape, x, chip, c).total_s)

    def with_rate_times(scale: float) -> float:
        faster = replace(chip, **{rate: getattr(chip, rate) * scale})
        return float(step_parts(shape, x, faster, c).total_s)

    assert with_rate_times(factor) <= before * (1 + 1e-9)
    assert with_rate_times(factor) >= before / factor * (1 - 1e-9)
    assert with_rate_times(1 + 1e-7) == pytest.approx(before, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(candidates())
def test_h200_is_never_slower_than_h100(candidate: tuple[ModelShape, Execution, Hardware, Constants]) -> None:
    shape, x, chip, c = candidate
    more = hardware("hgx-h200", "fp8" if float(chip.narrow) else "bfloat16")
    assert float(step_parts(shape, x, more, c).total_s) <= float(step_parts(shape, x, chip, c).total_s) * (
        1 + 1e-12
    )


def many(length: int) -> Execution:
    random = np.random.default_rng(3)

    def power(top: int) -> Any:
        return 2.0 ** random.integers(0, top + 1, length)

    data = power(5)
    return execution(
        tp=power(3), pp=power(3), cp=power(1), data=data, shard=data, ep=power(3), micro_batch=power(2),
        micro_batches=power(5), sharding=random.integers(0, 4, length), recompute=random.integers(0, 4, length),
    )  # fmt: skip


@pytest.mark.parametrize("model", ["grok1-314b", "llama3-8b"])
def test_rows_do_not_touch_each_other_and_layers_can_be_shared(model: str) -> None:
    shape, chip, c = ModelShape.of(zoo.find(model)), hardware(), constants()
    x = many(500)
    whole = step_parts(shape, x, chip, c)
    order = np.random.default_rng(0).permutation(500)
    np.testing.assert_allclose(
        step_parts(shape, x.take(order), chip, c).total_s, whole.total_s[order], rtol=1e-13
    )
    alone = [float(step_parts(shape, x.take(np.array(i)), chip, c).total_s) for i in range(20)]
    np.testing.assert_allclose(alone, whole.total_s[:20], rtol=1e-13)

    rows, places = unique_layers(x)
    assert len(rows) < 400
    for name in LAYER_COLUMNS:
        column = np.broadcast_to(getattr(x, name), 500)
        np.testing.assert_array_equal(column[rows][places], column)
    shared = layer_times(shape, x.take(rows), chip, c).take(places)
    parts = step_parts_of(shared, shape, x, chip, c)
    for field in fields(StepParts):
        np.testing.assert_allclose(
            getattr(parts, field.name), getattr(whole, field.name), rtol=1e-12, atol=1e-15
        )


def test_a_matmul_by_hand() -> None:
    """Whole waves of whole tiles: FLOPs over the rate, with the exposed part of writing, beside bytes, softly."""
    chip, c = hardware(), constants()
    rows, columns, inner = 128.0 * 132, 256.0 * 4, 8192.0
    written = 2.0 * rows * columns / (3.35e12 * float(c.memory))
    read = 2.0 * inner * (rows + columns) / (3.35e12 * float(c.memory))
    product = 2.0 * rows * columns * inner / (989.4e12 * float(c.matmul))
    expected = ((product + float(c.output_exposed) * written) ** 4 + (read + written) ** 4) ** 0.25 + float(
        c.kernel_s
    )
    assert float(matmul_s(rows, columns, inner, chip, c)) == pytest.approx(expected, rel=2e-3)
    # One row more needs one more wave of 132, of which 4 tiles are busy.
    longer = float(matmul_s(rows + 1, columns, inner, chip, c)) - float(c.kernel_s)
    assert 1.05 < longer / (expected - float(c.kernel_s)) < 1.3


def test_weight_gradients_of_few_tokens_are_slow() -> None:
    """Adding to sums in 4 bytes passes memory however few the tokens: a quarter of them takes over a quarter."""
    chip, c = hardware(), constants()

    def backward_s(tokens: float) -> float:
        return float(linear_s(tokens, 8192.0, 8192.0, chip, c, gradient_bytes=8.0)[1])

    assert backward_s(2048) > 1.08 * backward_s(8192) / 4


def test_soft_max_is_between_the_longer_and_the_sum() -> None:
    a, b = np.array([1.0, 3.0, 0.0]), np.array([1.0, 4.0, 2.0])
    found = soft_max(a, b)
    np.testing.assert_array_less(found, a + b + 1e-12)
    np.testing.assert_array_less(np.maximum(a, b) - 1e-12, found)
    assert found[0] == pytest.approx(2**0.25)


@pytest.mark.parametrize(
    ("node", "generation", "nodes", "published_gb_s"),
    [
        ("hgx-h200", "hopper", 1, 361.4),  # all-gather of 16 GiB on 8 H200, stas00/ml-engineering
        ("hgx-h100", "hopper", 1, 370.0),  # rings without NVLS, NVIDIA/nccl-tests issue 212
        ("dgx-a100", "ampere", 1, 234.9),  # all-reduce of 16 GiB on 8 A100, stas00/ml-engineering
        (
            "hgx-h100",
            "hopper",
            4,
            320.0,
        ),  # all-reduce of 4-8 GB on 4 × 8 H100 with 8 × 400G, NVIDIA/nccl issue 1221
    ],
)
def test_rings_reach_published_bus_bandwidths(
    node: str, generation: str, nodes: int, published_gb_s: float
) -> None:
    chip, c = hardware(node), constants(generation)
    ranks = np.asarray(8.0 * nodes)
    size_bytes = np.asarray(8 * 2.0**30)
    seconds = float(network.ring_s(size_bytes, ranks, np.ones(()), chip, c))
    bus_gb_s = float(size_bytes) * (float(ranks) - 1) / float(ranks) / seconds / 1e9
    assert bus_gb_s == pytest.approx(published_gb_s, rel=0.2)


def test_who_leaves_the_node_pays_for_it() -> None:
    chip, c = hardware(), constants()
    size = np.asarray(1e9)

    def ring(ranks: float, stride: float) -> float:
        return float(network.ring_s(size, np.asarray(ranks), np.asarray(stride), chip, c))

    assert ring(1, 1) == 0.0
    # Members side by side in a node share the way out: eight NICs carry what one must where ranks lie 8 apart.
    assert ring(16, 8) / ring(16, 1) == pytest.approx(8.0, rel=0.3)
    inside = float(network.send_s(size, np.asarray(4.0), np.asarray(2.0), chip, c))
    outside = float(network.send_s(size, np.asarray(4.0), np.asarray(4.0), chip, c))
    assert outside > 5 * inside


def test_one_copy_per_node_saves_what_goes_there_twice() -> None:
    chip, c = hardware(), constants()
    size, ranks, copies = np.asarray(1e9), np.asarray(16.0), np.asarray(8.0)

    def seconds(one_copy: float) -> float:
        way = network.all_to_all_s(
            size, ranks, np.ones(()), chip, c, copies=copies, one_copy=np.asarray(one_copy)
        )
        return float(way)

    # Two nodes, eight copies: half of them leave; together they are wanted in 2·(1 − 2⁻⁸) nodes, not in 8.
    assert seconds(1) / seconds(0) == pytest.approx(2 * (1 - 2**-8) / 8, rel=0.02)


def test_stages_share_layers_with_head_and_embedding() -> None:
    assert [float(n) for n in stage_layers(np.asarray(126.0), np.asarray(16.0), np.asarray(1.0))] == [
        8.0,
        7.0,
        7.0,
    ]
    assert [float(n) for n in stage_layers(np.asarray(96.0), np.asarray(8.0), np.asarray(12.0))] == [
        12.0,
        12.0,
        12.0,
    ]


def test_stage_weights_add_up_to_the_model() -> None:
    for name in MODELS:
        shape = ModelShape.of(zoo.find(name))
        dense, experts = stage_weights(shape, execution(tp=1))
        counted = zoo.find(name).num_params()
        assert float(dense + experts) == pytest.approx(counted, rel=0.02), name


def test_interleaving_divides_the_bubble_and_costs_messages() -> None:
    shape, chip, c = ModelShape.of(zoo.find("gpt3-175b")), hardware(), constants()
    plain = step_parts(shape, execution(tp=4, pp=8, data=4, micro_batches=16, sequence=2048), chip, c)
    cut = step_parts(shape, execution(tp=4, pp=8, data=4, micro_batches=16, sequence=2048, chunks=4), chip, c)
    assert float(cut.bubble_s) == pytest.approx(float(plain.bubble_s) / 4)
    assert float(plain.bubble_s) == pytest.approx(
        7 / 16 * float(plain.matmul_s + plain.head_s) * 1.25, rel=0.25
    )
    assert float(cut.pipeline_s) > 0


def test_pipelines_stand_within_a_replica_group_and_replicas_around_them() -> None:
    """Two stages of two tensor-parallel ranks fit a node of 8, where they are not told apart by 16 other copies; their
    copies' sums then leave the node, and other ranks' do not change."""
    shape = ModelShape.of(zoo.find("llama3-8b"))

    def parts(whole_groups: int, **layout: float) -> StepParts:
        x = execution(whole_groups=whole_groups, micro_batches=8, overlap_data=0, **layout)
        return step_parts(shape, x, hardware(), constants())

    within, apart = (parts(whole, tp=2, pp=2, data=16, shard=1) for whole in (1, 0))
    assert within.pipeline_s < 0.5 * apart.pipeline_s
    within, apart = (parts(whole, tp=2, pp=2, data=4, shard=1, sharding=2) for whole in (1, 0))
    assert within.data_s > 1.5 * apart.data_s
    for layout in ({"tp": 8, "data": 16}, {"tp": 4, "pp": 4, "data": 8, "shard": 8, "sharding": 3}):
        within, apart = (parts(whole, **layout) for whole in (1, 0))
        assert float(within.total_s) == pytest.approx(float(apart.total_s))


def test_owners_of_an_optimizer_scatter_among_themselves_and_sum_over_replicas() -> None:
    """ZeRO-1 over all of 64 ranks, and within nodes of 8, by hand: 4-byte gradients there, 2-byte weights back."""
    shape, chip, c = ModelShape.of(zoo.find("llama3-8b")), hardware(), constants()
    layout = {"data": 64, "sharding": 1, "few_launches": 0, "overlap_data": 0}
    within, over_all = (step_parts(shape, execution(**layout, shard=shard), chip, c) for shard in (8, 64))
    assert float(within.optimizer_s) == pytest.approx(8 * float(over_all.optimizer_s))
    weights = float(stage_weights(shape, execution())[0])
    node_s, network_s = 3 * float(c.scale_up_latency_s), 3 * float(c.nic_latency_s)
    nic = float(chip.nic_bandwidth * c.nic)
    handed_on_s = float(c.bucket_s) * weights / 1e9 * 7 * math.sqrt(8 / 16)
    expected_s = 6 * weights * 63 / 64 / (8 * nic) + 2 * (node_s + network_s) + handed_on_s
    assert float(over_all.data_s) == pytest.approx(expected_s, rel=1e-9)
    in_node_s = 6 * weights * 7 / 8 / float(chip.scale_up_bandwidth * c.scale_up) + 2 * node_s
    replicas_s = 2 * 4 * weights / 8 * 7 / 8 / nic + network_s
    assert float(within.data_s) == pytest.approx(in_node_s + replicas_s, rel=1e-9)


def test_full_recompute_adds_a_forward_pass() -> None:
    shape, chip, c = ModelShape.of(zoo.find("llama3-8b")), hardware(), constants()
    none, full = (step_parts(shape, execution(recompute=r), chip, c) for r in (0, 3))
    assert 0.24 < float(full.recompute_s / none.matmul_s) < 0.55
    assert float(full.matmul_s) == float(none.matmul_s)


def test_software_on_one_library_of_layers_shares_its_factor() -> None:
    assert kernels_of()["nemo"] == kernels_of()["megatron-core"] == "transformer-engine"
    assert float(constants(stack="nemo").stack) == float(constants(stack="megatron-core").stack)


@pytest.mark.parametrize(
    ("model", "precision", "layout", "chips", "measured_s"),
    [
        # NVIDIA NeMo and Megatron-Bridge performance summaries (github.com/NVIDIA/NeMo, NVIDIA-NeMo/Megatron-Bridge)
        (
            "llama3.1-405b",
            "fp8",
            {"tp": 8, "pp": 8, "chunks": 8, "cp": 2, "data": 8, "micro_batches": 192},
            1024,
            37.5,
        ),
        ("llama3.1-70b", "fp8", {"tp": 4, "pp": 8, "chunks": 5, "data": 2, "micro_batches": 128}, 64, 20.0),
        # Expected results of NVIDIA/dgxc-benchmarking 24.11
        ("llama3-8b", "bfloat16", {"cp": 2, "data": 4, "micro_batches": 32}, 8, 13.0),
    ],
)
def test_published_steps_on_h100(
    model: str, precision: Precision, layout: dict[str, int], chips: int, measured_s: float
) -> None:
    x = execution(**layout, shard=layout["data"], sharding=1, sequence=8192, gradient_bytes=2)
    assert float(x.tp * x.pp * x.cp * x.data) == chips
    shape = ModelShape.of(zoo.find(model))
    found = step_parts(
        shape, x, hardware("hgx-h100", precision), constants(precision=precision, stack="nemo")
    )
    assert float(found.total_s) == pytest.approx(measured_s, rel=0.12)


def test_context_parallel_ranks_exchange_by_whatever_takes_least() -> None:
    shape, chip, c = ModelShape.of(zoo.find("llama3.1-405b")), hardware(), constants()
    x = execution(sequence=131_072.0, tp=8.0, cp=8.0, data=1.0, shard=1.0)
    seconds = {
        index: float(layer_times(shape, replace(x, exchange=np.asarray(float(index))), chip, c).context_s)
        for index in range(4)
    }
    assert len({round(seconds[i], 12) for i in range(3)}) == 3
    assert seconds[int(FASTEST_EXCHANGE)] == min(seconds[0], seconds[1], seconds[2])
    assert seconds[int(fastest_exchange(shape, x, chip, c))] == seconds[int(FASTEST_EXCHANGE)]


def test_all_to_all_needs_a_head_for_every_rank() -> None:
    x = execution(tp=8.0, cp=32.0, data=1.0, shard=1.0, exchange=2.0)
    times = layer_times(
        ModelShape.of(zoo.find("llama3.1-405b")), x, hardware(), constants()
    )  # 128 heads for 256 ranks
    assert np.isinf(times.context_s)


def test_switches_that_add_shorten_sums_and_nothing_else() -> None:
    chip, c, one = hardware(), constants(), np.ones(())
    adding = replace(chip, domain_reduces=one)
    eight = np.asarray(8.0)
    plain = network.all_reduce_s(np.asarray(2.0**34), eight, one, chip, c)
    assert float(plain / network.all_reduce_s(np.asarray(2.0**34), eight, one, adding, c)) == pytest.approx(
        1.3
    )
    assert plain == network.ring_s(np.asarray(2.0**35), eight, one, chip, c)
    beyond = np.asarray(64.0)  # two tiers: the domain's switches cannot
    assert network.all_reduce_s(np.asarray(2.0**34), beyond, one, adding, c) == network.all_reduce_s(
        np.asarray(2.0**34), beyond, one, chip, c
    )
