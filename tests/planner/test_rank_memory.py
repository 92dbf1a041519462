"""Memory per rank against formulas, published peaks, published out-of-memory verdicts, and what must hold always; and
on the machine at hand, against what training takes."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus import zoo
from colossus.errors import ConfigError
from colossus.planner.estimate.execution import RECOMPUTE, SHARDING, Execution
from colossus.planner.estimate.memory import Held, MemoryParts, fits, memory_parts, overflow, usable_bytes
from colossus.planner.estimate.shape import ModelShape
from colossus.planner.one_rank.memory import step_memory
from colossus.planner.one_rank.plan import plan_one_rank
from colossus.spec.config import to_toml
from colossus.spec.data import DataConfig, Source, TrainedTokenizer
from colossus.spec.duration import Duration
from colossus.spec.model import (
    AttentionSpec,
    FirstLayers,
    LatentAttentionSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    RouterGroups,
    RouterSpec,
    SharedMlpSpec,
)
from colossus.spec.rank import Machine
from colossus.spec.run import AdamW, Batch, Fixed, Muon, RunConfig
from tests.helpers import VARIETIES

GIB = 2**30
A100, H100 = 79.25 * GIB, 79.18 * GIB


def execution(**numbers: float | str) -> Execution:
    """One rank, fused kernels, unless said otherwise; recompute and sharding by name; one replica group."""
    values: dict[str, float | str] = dict.fromkeys((field.name for field in fields(Execution)), 1.0)
    values |= {
        "sequence": 4096, "sequence_parallel": 1, "recompute": "none", "sharding": "none", "gradient_bytes": 4,
        "overlap_tensor": 0, "overlap_experts": 0, "one_copy_per_node": 0,
        "keeps_gathered": 0, "muon": 0, "state_bytes": 4,
    } | numbers  # fmt: skip
    values["recompute"] = RECOMPUTE.index(str(values["recompute"]))
    values["sharding"] = SHARDING.index(str(values["sharding"]))
    values["shard"] = numbers.get("shard", values["data"])
    return Execution(**{name: np.asarray(float(value)) for name, value in values.items()})


def shape_of(name: str, **changes: object) -> ModelShape:
    return ModelShape.of(zoo.find(name).model_copy(update=changes))


def llama(layers: int, hidden: int, heads: int, mlp: int) -> ModelShape:
    """The first LLaMA's shapes with the vocabulary of arXiv:2311.05610."""
    return ModelShape.of(
        ModelSpec(
            name="llama", vocab_size=128_000, context_tokens=8192, num_layers=layers, hidden_size=hidden,
            attention=AttentionSpec(num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads),
            mlp=MlpSpec(intermediate_size=mlp),
        )
    )  # fmt: skip


def test_activations_of_a_gpt_layer_are_megatrons_formula_without_dropout() -> None:
    # arXiv:2205.05198 counts s·b·h·(34 + 5·a·s/h) bytes. Of these 2 + 3·a·s/h are dropout: two masks of one byte
    # per element (34 to 32), and a mask and a second copy of the scores (5 to 2).
    shape = shape_of("gpt3-175b")
    layers, hidden, heads, sequence = 96, 12_288, 96, 2048
    parts = memory_parts(shape, execution(sequence=sequence, flash=0))
    assert parts.activations_bytes == pytest.approx(layers * sequence * hidden * 32)
    assert parts.attention_bytes == pytest.approx(layers * sequence * hidden * 2 * heads * sequence / hidden)


def test_mixed_precision_adam_takes_16_to_18_bytes_per_weight_on_one_rank() -> None:
    shape = shape_of("llama3-8b")
    weights = 8.03e9
    for gradient_bytes, expected in ((2, 16), (4, 18)):
        parts = memory_parts(shape, execution(gradient_bytes=gradient_bytes))
        held = parts.weights_bytes + parts.gradients_bytes + parts.optimizer_bytes
        assert held / weights == pytest.approx(expected, rel=0.005)
    full = memory_parts(shape, execution(sharding="weights", data=64, shard=64))
    held = full.weights_bytes + full.gradients_bytes + full.optimizer_bytes
    assert held / weights == pytest.approx(16 / 64, rel=0.005)


SIMUMAX = {"sharding": "optimizer", "micro_batches": 4}
TITAN = {"sharding": "weights", "sequence": 8192}


@pytest.mark.parametrize(
    ("model", "layers", "numbers", "measure", "published_gib"),
    [
        # SimuMax, docs/b200/b200_release_v1.2_summary.json: largest allocated.
        ("llama3-70b", 12, SIMUMAX | {"tp": 8}, "allocated", 28.3),
        ("llama3-70b", 12, SIMUMAX | {"pp": 2, "data": 4}, "allocated", 66.5),
        ("llama3-70b", 12, SIMUMAX | {"tp": 2, "cp": 4, "sequence": 131_072}, "allocated", 112.7),
        ("llama3-70b", 12, SIMUMAX | {"cp": 8, "sequence": 32_768}, "allocated", 104.5),
        ("llama3.1-405b", 4, SIMUMAX | {"pp": 2, "data": 4}, "allocated", 87.1),
        ("llama3.1-405b", 4, SIMUMAX | {"tp": 8}, "allocated", 38.6),
        # MLPerf Training v5.1, Llama 3.1 8B on NeMo (gradients in 16 bits): largest allocated.
        ("llama3-8b", 32, {"sharding": "optimizer", "data": 64, "gradient_bytes": 2, "sequence": 8192},
         "allocated", 71.2),
        ("llama3-8b", 32, {"sharding": "optimizer", "tp": 2, "data": 64, "gradient_bytes": 2, "sequence": 8192},
         "allocated", 35.7),
        # torchtitan, benchmarks/llama3_h100_202412: largest reserved.
        ("llama3-8b", 32, TITAN | {"data": 128, "shard": 128, "micro_batch": 2, "recompute": "alternate"},
         "reserved", 62.0),
        ("llama3-8b", 32, TITAN | {"data": 8, "shard": 8, "sequence": 32_768, "recompute": "full"},
         "reserved", 83.9),
        ("llama3.1-405b", 126, TITAN | {"tp": 8, "pp": 8, "data": 8, "shard": 8, "sequence": 32_768,
                                        "micro_batches": 8, "recompute": "full"}, "reserved", 75.3),
    ],
)  # fmt: skip
def test_published_peaks(
    model: str, layers: int, numbers: dict[str, float | str], measure: str, published_gib: float
) -> None:
    parts = memory_parts(shape_of(model, num_layers=layers), execution(**numbers))
    assert getattr(parts, f"{measure}_bytes") / GIB == pytest.approx(published_gib, rel=0.06)


@pytest.mark.parametrize(
    ("numbers", "ran"),
    [
        # arXiv:2311.05610 (its published sheets), LLaMA 13B, FlashAttention-2 and a fused RMSNorm, A100 80 GB.
        ({"pp": 2, "data": 16, "micro_batch": 1, "micro_batches": 128}, True),
        ({"data": 64, "micro_batch": 2}, False),
        ({"pp": 2, "data": 16, "micro_batch": 2, "micro_batches": 64}, True),
        ({"pp": 2, "data": 16, "micro_batch": 8, "micro_batches": 16}, False),
        ({"tp": 2, "data": 16, "micro_batch": 2}, True),
        ({"tp": 2, "data": 16, "micro_batch": 8}, False),
        ({"data": 64, "micro_batch": 1, "fused": 0}, False),
        ({"data": 64, "micro_batch": 2, "fused": 0, "recompute": "full"}, True),
        ({"tp": 4, "pp": 2, "data": 16, "sequence": 8192, "micro_batches": 32}, True),
        ({"tp": 2, "pp": 4, "data": 16, "sequence": 8192, "micro_batch": 2, "micro_batches": 16}, False),
        ({"tp": 4, "pp": 4, "data": 8, "sequence": 8192, "micro_batch": 4, "micro_batches": 16,
          "recompute": "full"}, False),
    ],
)  # fmt: skip
def test_published_verdicts(numbers: dict[str, float | str], ran: bool) -> None:
    usual: dict[str, float | str] = {
        "sequence": 2048, "sharding": "optimizer", "gradient_bytes": 2, "few_launches": 0, "sequence_parallel": 0,
    }  # fmt: skip
    x = execution(**usual | numbers)
    held = Held.of_stacks(x, ["aleph-scaling"])
    assert bool(fits(llama(40, 5120, 40, 13_824), x, A100, held).all()) == ran


def test_llama_405b_fits_h100s_as_meta_trained_it_and_not_on_an_eighth_of_the_pipeline() -> None:
    # arXiv:2407.21783, table 4: tensor 8, pipeline 16, data 64, sequence 8,192; optimizer and gradients sharded,
    # weights whole between micro-batches. It says that nothing is recomputed but that tensors are freed which
    # "will not be used"; kept in full, activations alone would take 68 GiB, so some must come back cheaply.
    shape = shape_of("llama3.1-405b")
    usual: dict[str, float | str] = {
        "tp": 8, "data": 64, "shard": 64, "sequence": 8192, "micro_batches": 32, "sharding": "gradients",
    }  # fmt: skip
    assert fits(shape, execution(**usual, pp=16, recompute="alternate"), H100)
    assert not fits(shape, execution(**usual, pp=2, recompute="alternate"), H100)


SHAPES = ("llama3-8b", "llama3.1-405b", "gpt3-175b", "deepseek-v3")
NUMBERS = st.fixed_dictionaries(
    {
        "tp": st.sampled_from([1, 2, 4]),
        "pp": st.sampled_from([1, 2, 4]),
        "chunks": st.sampled_from([1, 2]),
        "cp": st.sampled_from([1, 2]),
        "data": st.sampled_from([8, 16]),
        "shard": st.sampled_from([2, 4]),
        "ep": st.sampled_from([1, 8]),
        "micro_batch": st.sampled_from([1, 4]),
        "micro_batches": st.sampled_from([1, 3, 16]),
        "sharding": st.sampled_from(SHARDING),
        "recompute": st.sampled_from(RECOMPUTE),
        "flash": st.sampled_from([0, 1]),
        "fused": st.sampled_from([0, 1]),
        "few_launches": st.sampled_from([0, 1]),
        "sequence_parallel": st.sampled_from([0, 1]),
        "gradient_bytes": st.sampled_from([2, 4]),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), NUMBERS)
def test_what_must_always_hold(model: str, numbers: dict[str, float | str]) -> None:
    shape = shape_of(model)
    base = execution(**numbers)
    parts = memory_parts(shape, base)
    total = sum(float(getattr(parts, field.name)) for field in fields(MemoryParts))
    assert float(parts.total_bytes) == pytest.approx(total)
    assert all(float(getattr(parts, field.name)) >= 0 for field in fields(MemoryParts))

    def allocated(**changes: float) -> float:
        changed = replace(base, **{name: np.asarray(float(value)) for name, value in changes.items()})
        return float(memory_parts(shape, changed).allocated_bytes)

    now, slack = allocated(), 1.0 + 1e-9
    assert allocated(shard=float(base.shard) * 2) <= now * slack
    assert allocated(tp=float(base.tp) * 2) <= now * slack
    assert allocated(micro_batch=float(base.micro_batch) * 2) >= now / slack
    assert allocated(flash=1) <= now * slack
    assert allocated(fused=1) <= now * slack
    none, selective, alternate, full = (allocated(recompute=index) for index in range(4))
    assert full <= alternate * slack
    assert alternate <= selective * slack
    assert selective <= none * slack
    stages = [float(memory_parts(shape, base, stage=name).allocated_bytes) for name in ("first", "last")]
    assert max(stages) <= now * slack or float(base.pp) == 1


def test_many_at_once_are_as_one_by_one() -> None:
    shape = shape_of("deepseek-v3")
    rows = [
        execution(tp=tp, pp=pp, ep=8, data=64, shard=64, micro_batches=16, sharding=sharding)
        for tp in (1, 2) for pp in (1, 2, 8) for sharding in SHARDING
    ]  # fmt: skip
    together = memory_parts(shape, Execution.stack(rows))
    alone = [memory_parts(shape, row) for row in rows]
    for field in fields(MemoryParts):
        assert getattr(together, field.name).shape == (len(rows),)
        np.testing.assert_allclose(
            getattr(together, field.name), [float(getattr(part, field.name)) for part in alone]
        )


def test_interleaving_holds_more_micro_batches() -> None:
    # arXiv:2205.05198: 1 + (p - 1)/(p·v) times as much on the first stage.
    shape = shape_of("gpt3-175b")
    first = {
        chunks: memory_parts(shape, execution(pp=8, chunks=chunks, micro_batches=64), stage="first")
        for chunks in (1, 3)
    }
    waiting = 2.0 * 4096 * 12_288
    kept = {
        chunks: float(parts.activations_bytes) - waiting * (8 if chunks == 1 else 8 + 7 / 3)
        for chunks, parts in first.items()
    }
    assert kept[3] / kept[1] == pytest.approx(1 + 7 / (8 * 3))


def test_overflow_names_the_largest_parts() -> None:
    x = execution()
    parts = memory_parts(shape_of("llama3-8b"), x)
    sentence = overflow(parts, H100)
    assert float(parts.needed_bytes) > float(usable_bytes(H100))
    assert sentence.startswith(
        f"needs {float(parts.needed_bytes) / GIB:.1f} GiB of 75.2 usable (79.2 in all): "
    )
    assert sentence.split(": ")[1].startswith("optimizer 89.7, gradients 29.9, ")


def test_unknown_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match="no stage 'second'"):
        memory_parts(shape_of("llama3-8b"), execution(), stage="second")  # type: ignore[arg-type]


# --- one rank, on the machine at hand ---


def one_machine(memory_bytes: int = 2**60) -> Machine:
    return Machine(
        chip="a CPU", kind="cpu", num_threads=1, memory_bytes=memory_bytes, baseline_bytes=300 * 2**20,
        matmul_flops={"float32": 1e11, "bfloat16": 2e11}, compiled_before=False,
    )  # fmt: skip


def training(model: ModelSpec, **changes: Any) -> RunConfig:
    """Four sequences a step of a model that has a row for every token of its tokenizer."""
    model = model.model_copy(update={"vocab_size": max(model.vocab_size, 512)})
    parts: dict[str, Any] = {
        "name": "run",
        "model": model,
        "data": DataConfig(tokenizer=TrainedTokenizer(vocab_size=512)),
        "batch": Batch(sequences=4, sequence_tokens=min(model.context_tokens, 4096)),
    }
    return RunConfig(**{**parts, **changes})


@pytest.mark.parametrize("optimizer", [AdamW(), Muon()], ids=["adamw", "muon"])
@pytest.mark.parametrize("spec", VARIETIES.values(), ids=VARIETIES)
def test_every_variety_gets_a_plan(spec: ModelSpec, optimizer: AdamW | Muon) -> None:
    config = training(spec, optimizer=optimizer, batch=Batch(sequences=64, sequence_tokens=16))
    plan = plan_one_rank(config, one_machine())
    assert plan.micro_batch_sequences == 64
    whole, half = (
        step_memory(config, one_machine(), plan.dtype, n, plan.loss_chunk_tokens).total_bytes
        for n in (64, 32)
    )
    assert half < whole
    # 90 % of a machine may be filled: a little more than half the micro-batch needs lets that be taken, and no more.
    plan = plan_one_rank(config, one_machine(int((half + 1000) / 0.9)))
    assert (plan.micro_batch_sequences, plan.estimate.memory.total_bytes) == (32, half)


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_of_the_zoo_gets_a_plan_on_a_machine_that_is_large_enough(name: str) -> None:
    config = training(zoo.find(name), optimizer=AdamW())
    memory = plan_one_rank(config, one_machine()).estimate.memory
    # Two moments of every weight; of sparse tables a number for each row; of balancing biases nothing.
    expected = 0
    for parameter in config.model.parameters():
        per_weight = {"sparse_embedding": 0, "balance": 0}.get(parameter.role, 8)
        expected += per_weight * parameter.num_elements
        expected += 4 * parameter.shape[0] if parameter.role == "sparse_embedding" else 0
    assert memory.optimizer_bytes == expected
    # Weights and moments are there twice: a copy is written to the checkpoint.
    assert memory.total_bytes > 2 * (4 * config.model.num_params() + expected)


def small(name: str, **parts: Any) -> ModelSpec:
    whole = {"name": name, "vocab_size": 2048, "context_tokens": 256, "num_layers": 4, "hidden_size": 256}
    return ModelSpec(**{**whole, **parts})


GROUPED = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=32)
SMALL = {
    "llama": small("llama", attention=GROUPED, mlp=MlpSpec(intermediate_size=704)),
    "grok": small(
        "grok",
        attention=GROUPED.model_copy(update={"score_soft_cap": 30.0}),
        mlp=MoeSpec(num_experts=8, top_k=2, intermediate_size=512, activation="geglu"),
        norm_placement="sandwich",
        logit_soft_cap=30.0,
    ),
    "deepseek": small(
        "deepseek",
        attention=LatentAttentionSpec(
            num_heads=8,
            q_lora_rank=96,
            kv_lora_rank=64,
            nope_head_dim=32,
            rope_head_dim=16,
            value_head_dim=32,
        ),
        first_layers=FirstLayers(num_layers=1, mlp=MlpSpec(intermediate_size=704)),
        mlp=MoeSpec(
            num_experts=16,
            top_k=4,
            intermediate_size=176,
            shared=SharedMlpSpec(intermediate_size=176),
            router=RouterSpec(
                scoring="sigmoid", balancing_bias=True, groups=RouterGroups(num_groups=4, top_groups=2)
            ),
        ),
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in SMALL]
)
def test_what_training_takes_is_what_was_predicted(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Three steps of `colossus train` in a process of its own, with a checkpoint: the peak of its resident memory."""
    runs = tmp_path_factory.getbasetemp() / "memory"  # one corpus for all
    runs.mkdir(exist_ok=True)
    text = Path(json.__file__).parent
    config = training(
        SMALL[name],
        name=name,
        data=DataConfig(sources=(Source(path=str(text)),), tokenizer=TrainedTokenizer(vocab_size=512)),
        batch=Batch(sequences=8, sequence_tokens=256),
        budget=Duration.parse("3 steps"),
        optimizer=AdamW(),
        fixed=Fixed(dtype="float32", compile=False),
    )
    path = runs / f"{name}.toml"
    path.write_text(to_toml(config))
    command = ["train", str(path), "--runs", str(runs), "--json", "--no-sample", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "colossus.cli", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(zoo.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["predicted_memory_bytes"] == pytest.approx(summary["peak_rss_bytes"], rel=0.15)
