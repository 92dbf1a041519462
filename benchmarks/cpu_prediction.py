"""How well a step's time is predicted on the machine at hand, from rates measured on it.

    colossus doctor --calibrate --out here.toml
    python benchmarks/cpu_prediction.py here.toml
    python benchmarks/cpu_prediction.py here.toml --layouts     on two processes, by `colossus train --plan`

Steps of the real trainer (micro-batches, gradient norm, AdamW) on one process, over model sizes, micro-batches,
sequences, vocabularies and dtypes that the calibration has not seen, against the planner's estimate of the same step.
A step is timed by the CPU time of its threads, the least of several, as other programs may share the machine.

With --layouts, each model is trained on two processes under each layout of LAYOUTS, the plan made by the planner with
the layout fixed. Ranks wait for each other, so their steps are timed on the wall, the median of several: only on a
machine with nothing else to do are these comparable. Regret is what the layout that was predicted to be the fastest
takes longer than the one that is, per token.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import colossus
from colossus.data import Batch
from colossus.errors import ConfigError
from colossus.events import StepDone, read_events
from colossus.hardware import parse_fleet
from colossus.models import build
from colossus.optim import gradient_norm, optimizers_of
from colossus.planner.estimate.measured import LEAST_CHUNK_TOKENS, LOSS_CACHE_BYTES
from colossus.planner.estimate.shape import ModelShape
from colossus.planner.estimate.step import StepParts, step_parts
from colossus.planner.plan import make_plan
from colossus.planner.search.bounds import Problem, execution
from colossus.planner.search.space import PRECISIONS, Layouts, Options
from colossus.spec.fleet import Fleet
from colossus.spec.goal import Goal
from colossus.spec.layout import Layout
from colossus.spec.model import AttentionSpec, Dtype, MlpSpec, ModelSpec
from colossus.spec.plan import Plan
from colossus.spec.rank import Machine, Memory, RankEstimate, RankPlan
from colossus.spec.run import OPTIMIZERS, AdamW, OptimizerKind
from colossus.trainer.machine import prepare_process
from colossus.trainer.precision import use_float32_library
from colossus.trainer.step import accumulate_gradients

REPEATS = 4


@dataclass(frozen=True)
class Case:
    model: ModelSpec
    dtype: Dtype
    sequence: int
    micro_batch: int
    num_micro_batches: int


def model(layers: int, hidden: int, heads: int, kv_heads: int, activation: str, vocab: int) -> ModelSpec:
    return ModelSpec(
        name=f"{layers}x{hidden}",
        vocab_size=vocab,
        context_tokens=1024,
        num_layers=layers,
        hidden_size=hidden,
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=hidden // heads,
            qk_norm=activation == "squared_relu",
        ),
        mlp=MlpSpec(
            intermediate_size=round(hidden * (8 / 3 if activation == "swiglu" else 4) / 32) * 32,
            activation=activation,
        ),
    )


MODELS = (
    model(6, 128, 2, 2, "gelu", 2048),
    model(4, 256, 4, 2, "swiglu", 4096),
    model(6, 384, 6, 6, "squared_relu", 8192),
    model(4, 512, 8, 4, "swiglu", 16384),
    model(4, 768, 12, 12, "swiglu", 4096),
)
SHAPES = ((128, 8, 1), (256, 4, 1), (512, 2, 2), (1024, 1, 1))
"""(sequence, micro-batch, micro-batches)."""


def cases() -> Iterator[Case]:
    for spec in MODELS:
        for sequence, micro_batch, count in SHAPES:
            for dtype in ("float32", "bfloat16"):
                yield Case(spec, dtype, sequence, micro_batch, count)


def predicted(case: Case, fleet: Fleet, layout: Layout | None = None) -> StepParts:
    """The planner's estimate of the case's step, on the fleet's first pool."""
    layout = layout or Layout()
    one = np.ones(1)
    rows = Layouts(
        tp=one * layout.tp, pp=one * layout.pp, chunks=one, cp=one * layout.cp, ep=one * layout.ep, expert_tp=one,
        shard=one * layout.shard, sharding=0 * one, schedule=0 * one,
        precision=one * PRECISIONS.index(case.dtype), part=one,
    )  # fmt: skip
    problem = Problem(
        shape=ModelShape.of(case.model), pools=fleet.pools, sequence=case.sequence, sequences=case.micro_batch,
        layouts=rows, options=Options(one, one), fabric=fleet.fabric, chip_rates=[0.0],
    )  # fmt: skip
    x = execution(
        problem, rows, one * case.micro_batch, 0 * one, one * layout.replica, one * case.num_micro_batches
    )
    hardware, constants = problem.hardware(fleet.pools[0], rows.precision)
    return step_parts(problem.shape, x, hardware, constants)


def measured_s(case: Case, threads: int) -> float:
    """The least CPU time per thread of a step."""
    spec = case.model
    decoder = build(spec, seed=0)
    optimizers = optimizers_of(decoder, spec, AdamW(learning_rate=1e-3))
    sequences = case.micro_batch * case.num_micro_batches
    random = np.random.default_rng(0)
    rows = random.integers(spec.vocab_size, size=(sequences, case.sequence + 1))
    batch = Batch(
        rows[:, :-1].copy(),
        rows[:, 1:].copy(),
        np.zeros((sequences, case.sequence), np.int32),
        np.arange(sequences),
    )
    chunk = max(LEAST_CHUNK_TOKENS, min(sequences * case.sequence, LOSS_CACHE_BYTES // (4 * spec.vocab_size)))
    plan = _rank_plan(case, threads, chunk)
    times = []
    for _ in range(1 + REPEATS):
        started = time.process_time()
        accumulate_gradients(decoder, batch, plan)
        gradient_norm(decoder)
        for optimizer in optimizers:
            optimizer.step()
        for parameter in decoder.parameters():
            parameter.grad = None
        times.append((time.process_time() - started) / threads)
    return min(times[1:])


def _rank_plan(case: Case, threads: int, chunk: int) -> RankPlan:
    machine = Machine(
        chip="cpu", kind="cpu", num_threads=threads, memory_bytes=1, baseline_bytes=0,
        matmul_flops={case.dtype: 1.0}, compiled_before=False,
    )  # fmt: skip
    memory = Memory(
        baseline_bytes=0,
        weight_bytes=0,
        gradient_bytes=0,
        optimizer_bytes=0,
        activation_bytes=0,
        loss_bytes=0,
    )
    return RankPlan(
        layout=Layout(), machine=machine, micro_batch_sequences=case.micro_batch,
        num_micro_batches=case.num_micro_batches, sequence_tokens=case.sequence, dtype=case.dtype, compile=False,
        loss_chunk_tokens=chunk, estimate=RankEstimate(memory=memory, flops_per_step=1.0, step_time_s=1.0),
        reasons={},
    )  # fmt: skip


LAYOUTS: dict[str, dict[str, int | str]] = {
    "replica 2": {"tp": 1, "pp": 1, "cp": 1, "shard": 1},
    "shard 2": {"tp": 1, "pp": 1, "cp": 1, "shard": 2, "sharding": "weights"},
    "tp 2": {"tp": 2, "pp": 1, "cp": 1, "shard": 1},
    "pp 2": {"tp": 1, "pp": 2, "cp": 1, "shard": 1},
    "cp 2": {"tp": 1, "pp": 1, "cp": 2, "shard": 1},
}
"""What `colossus plan --fix` would say."""
LAYOUT_MODELS = (1, 2, 3, 4)
"""Of MODELS."""
LAYOUT_STEPS, LAYOUT_SEQUENCES, LAYOUT_TOKENS = 6, 8, 1024
WARM_UP_STEPS = 2
TEXT = Path(colossus.__file__).parent / "spec"
"""What is trained on: little, so that the closing evaluation is short."""


def layout_rows(fleet: Fleet, dtype: Dtype, optimizer: OptimizerKind) -> Iterator[dict[str, Any]]:
    """Each model under each layout: predicted and measured seconds of a step. A layout that the planner does not
    offer or the trainer does not run is told on stderr and left out."""
    for spec in (MODELS[i] for i in LAYOUT_MODELS):
        for name, fixed in LAYOUTS.items():
            goal = Goal(
                tokens=10**6,
                max_global_batch_sequences=LAYOUT_SEQUENCES,
                fixed={
                    **fixed, "micro_batch": 2, "precision": dtype, "recompute": "none", "optimizer": optimizer,
                },
            )  # fmt: skip
            try:
                plan = make_plan(spec, fleet, goal, sequence_tokens=LAYOUT_TOKENS).plan
                took = trained_s(plan)
            except (ConfigError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", None) or str(error)
                print(f"{spec.name}, {name}: left out: {said.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            guess = plan.estimate.step_time_s.likely
            yield {
                "model": spec.name,
                "layout": name,
                "dtype": dtype,
                "tokens": plan.step_tokens,
                "measured_s": took,
                "predicted_s": guess,
                "error": guess / took - 1,
                "parts_s": plan.estimate.step_parts_s,
            }


def trained_s(plan: Plan) -> float:
    """The median wall time of a step that `colossus train --plan` takes."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "plan.json"
        path.write_text(plan.to_json(), encoding="utf-8")
        command = [sys.executable, "-m", "colossus.cli", "train", "--plan", str(path), "--threads", "1"]
        command += ["--steps", str(LAYOUT_STEPS), "--json", "--no-sample", "--runs", scratch]
        command += ["--data", str(TEXT)]
        if plan.optimizer == "muon":  # as many as are priced; the default recipe has fewer
            command += ["--set", "optimizer.newton_schulz_steps=5"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        run = Path(json.loads(done.stdout)["run_dir"])
        steps = [event for event in read_events(run / "events.jsonl") if isinstance(event, StepDone)]
    return statistics.median(step.step_time_s for step in steps[WARM_UP_STEPS:])


def regret(rows: Sequence[dict[str, Any]]) -> float:
    """How much longer a token takes under the layout predicted to be the fastest than under the one that is."""
    chosen = min(rows, key=lambda row: row["predicted_s"] / row["tokens"])
    best = min(row["measured_s"] / row["tokens"] for row in rows)
    return float(chosen["measured_s"] / chosen["tokens"] / best - 1)


def print_layouts(fleet: Fleet, dtype: Dtype, optimizer: OptimizerKind) -> list[dict[str, Any]]:
    rows = []
    for row in layout_rows(fleet, dtype, optimizer):
        rows.append(row)
        print(
            f"{row['model']:>8} {row['dtype']:>9} {row['layout']:>10} {row['measured_s'] * 1e3:12.1f} "
            f"{row['predicted_s'] * 1e3:10.1f} {row['error']:+7.1%}",
            flush=True,
        )
    for name in dict.fromkeys(row["model"] for row in rows):
        print(f"{name}: regret {regret([row for row in rows if row['model'] == name]):.1%}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fleet", type=Path, help="what `colossus doctor --calibrate` wrote")
    parser.add_argument("--layouts", action="store_true", help="two processes, by the real command")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="with --layouts")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="with --layouts")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    try:
        fleet = parse_fleet(str(args.fleet))
    except ConfigError as error:
        parser.error(str(error))
    rates = fleet.pools[0].chip.measured
    assert rates is not None, "this fleet has not been measured"
    prepare_process(rates.num_threads)
    use_float32_library(rates.float32_library)
    if args.layouts:
        conclude(print_layouts(fleet, args.dtype, args.optimizer), args.json)
        return
    rows = []
    print(
        f"{'model':>8} {'dtype':>9} {'sequence':>8} {'batch':>6} {'measured ms':>12} {'predicted':>10} {'error':>7}"
    )
    for case in cases():
        parts = predicted(case, fleet)
        guess, took = float(parts.total_s[0]), measured_s(case, rates.num_threads)
        error = guess / took - 1
        batch = f"{case.num_micro_batches}x{case.micro_batch}"
        print(
            f"{case.model.name:>8} {case.dtype:>9} {case.sequence:>8} {batch:>6} {took * 1e3:12.1f} {guess * 1e3:10.1f}"
            f" {error:+7.1%}",
            flush=True,
        )
        rows.append(
            {"model": case.model.name, "dtype": case.dtype, "sequence": case.sequence, "batch": batch,
             "tokens": case.sequence * case.micro_batch * case.num_micro_batches, "measured_s": took,
             "predicted_s": guess, "error": error,
             "parts_s": {n: float(getattr(parts, n)[0]) for n in StepParts.__slots__}}
        )  # fmt: skip
    conclude(rows, args.json)


def conclude(rows: list[dict[str, Any]], path: Path | None) -> None:
    errors = [abs(row["error"]) for row in rows]
    print(
        f"{len(rows)} configurations: median error {statistics.median(errors):.1%}, "
        f"mean {statistics.mean(errors):.1%}, "
        f"worst {max(errors):.1%}, bias {statistics.median(row['error'] for row in rows):+.1%}"
    )
    if path:
        path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
