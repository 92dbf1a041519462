"""What the planner says a run will hold, part by part."""

from typing import Any

import pytest

from colossus.errors import ConfigError
from colossus.planner import plan_one_rank, step_memory
from colossus.planner.one_rank.memory import FRAGMENTATION, LIBRARY_BYTES, SAVING_BYTES
from colossus.spec.model import Dtype, NgramSpec
from colossus.spec.rank import Machine, Memory
from colossus.spec.run import AdamW, Batch, Muon, RunConfig
from tests.spec.configs import small_config

MIB = 2**20


def machine(memory_bytes: int = 2**34, faster: Dtype = "float32") -> Machine:
    flops: dict[Dtype, float] = {"float32": 1e11, "bfloat16": 1e11, faster: 2e11}
    return Machine(
        chip="a CPU", kind="cpu", num_threads=1, memory_bytes=memory_bytes, baseline_bytes=300 * MIB,
        matmul_flops=flops, compiled_before=False,
    )  # fmt: skip


def memory(config: RunConfig, micro_batch: int = 4, dtype: Dtype = "float32") -> Memory:
    return step_memory(config, machine(), dtype, micro_batch, chunk=64)


def with_model(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def test_what_stays_is_counted_exactly() -> None:
    adamw, muon = small_config(optimizer=AdamW()), small_config(optimizer=Muon())
    params = adamw.model.num_params()
    matrices = sum(p.num_elements for p in adamw.model.parameters() if p.role == "matrix")
    frequencies = 8 * 16 // 2  # bytes, pairs of channels; of all layers
    assert memory(adamw).weight_bytes == 4 * params + frequencies
    assert memory(adamw).optimizer_bytes == 8 * params
    assert memory(muon).optimizer_bytes == 8 * params - 4 * matrices
    assert memory(adamw).checkpoint_bytes == 12 * params + SAVING_BYTES


def test_a_sparse_table_costs_its_rows_and_a_number_for_each() -> None:
    plain = small_config(optimizer=AdamW())
    tables = with_model(plain, ngrams=NgramSpec(orders=(2, 3), num_rows=1000))
    assert memory(tables).weight_bytes - memory(plain).weight_bytes == 4 * 2000 * 32
    assert memory(tables).optimizer_bytes - memory(plain).optimizer_bytes == 4 * 2000


def test_the_total_is_the_sum_of_its_parts() -> None:
    parts = memory(small_config()).model_dump()
    assert memory(small_config()).total_bytes == sum(parts.values())
    comes_and_goes = parts["gradient_bytes"] + parts["activation_bytes"] + parts["loss_bytes"]
    comes_and_goes += parts["workspace_bytes"] - LIBRARY_BYTES
    assert parts["fragmentation_bytes"] == int(FRAGMENTATION * comes_and_goes)


def test_the_peak_is_where_most_is_held() -> None:
    many_tokens = small_config(batch=Batch(sequences=64, sequence_tokens=64))
    assert memory(many_tokens, 64).activation_bytes > 0
    assert memory(many_tokens, 64).gradient_bytes == 0  # at the start of the backward pass there are none yet
    assert memory(many_tokens, 32).gradient_bytes > 0  # but those of the micro-batch before
    few_tokens = with_model(small_config(batch=Batch(sequences=1, sequence_tokens=1)), hidden_size=256)
    assert memory(few_tokens, 1).gradient_bytes > memory(few_tokens, 1).activation_bytes


def test_half_the_micro_batch_takes_half_the_activations() -> None:
    config = small_config(batch=Batch(sequences=64, sequence_tokens=64))
    whole, half = memory(config, 64).activation_bytes, memory(config, 32).activation_bytes
    rotation = 2 * 64 * 16 * 4  # cosine and sine, positions, channels, bytes: the same for all sequences
    assert whole - rotation == 2 * (half - rotation)


def test_the_largest_micro_batch_that_fits_is_taken() -> None:
    config = small_config(batch=Batch(sequences=48, sequence_tokens=64))
    chunk = plan_one_rank(config, machine()).loss_chunk_tokens
    sizes = {n: step_memory(config, machine(), "float32", n, chunk).total_bytes for n in (48, 24, 16, 12, 8)}
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    plan = plan_one_rank(config, machine(memory_bytes=int((sizes[12] + 1000) / 0.9)))
    assert (plan.micro_batch_sequences, plan.num_micro_batches) == (12, 4)
    assert plan.estimate.memory.total_bytes == sizes[12]
    assert "12 of 48 at once need" in plan.reasons["micro_batch_sequences"]


def test_what_does_not_fit_is_refused_with_its_parts() -> None:
    said = "does not fit this machine: a micro-batch of 1 × 64 tokens needs .* and a plan may fill 57"
    with pytest.raises(ConfigError, match=said):
        plan_one_rank(small_config(), machine(memory_bytes=64 * MIB))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmuls_run_in_what_is_faster(dtype: Dtype) -> None:
    plan = plan_one_rank(small_config(), machine(faster=dtype))
    assert plan.dtype == dtype
    assert plan.reasons["dtype"].startswith(f"{dtype} matmuls are the fastest here")
