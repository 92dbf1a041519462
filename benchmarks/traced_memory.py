"""Peak memory of a rank: what the planner counts from the specification beside what a real step holds.

Ranks of many layouts, up to the largest fleets, do a step on tensors without data, in worlds of their true size
(parallel/dry_run.py); every storage is counted while it lives (parallel/memory.py). The count knows nothing of that.
Attention takes the ways of a CPU in both, for that is where the step runs.

    python -m benchmarks.traced_memory [--only WORD …] [--json FILE]
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossus.parallel.dry_run import _run, fake_world
from colossus.planner.estimate.rank_memory import How, rank_memory
from colossus.planner.one_rank.plan import loss_chunk_tokens
from colossus.spec.job import Job, Share
from colossus.spec.layout import Coordinates, Layout
from colossus.spec.model import ModelSpec
from colossus.spec.plan import Recompute
from colossus.spec.run import AdamW
from colossus.zoo import find

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    model: ModelSpec
    job: Job
    stage: int = 0

    @property
    def rank(self) -> int:
        """In the middle of the world, where it is large."""
        layout = self.job.layout
        here = Coordinates(layout.replica // 2, self.stage, layout.shard // 2, layout.cp // 2, layout.tp // 2)
        return layout.rank(here)


def case(
    name: str,
    model: str,
    *,
    layers: int | None = None,
    stage: int = 0,
    rows: int = 1,
    batches: int | None = None,
    recompute: Recompute = "none",
    tokens: int = 4096,
    **settings: Any,
) -> Case:
    """`layers`: fewer than the model has, of the same kinds."""
    spec = find(model)
    spec = spec if layers is None else spec.model_copy(update={"num_layers": layers})
    layout = Layout(**{name: settings.pop(name) for name in list(settings) if name in Layout.model_fields})
    pp = layout.pp
    each, rest = divmod(spec.num_layers, pp)
    chunks = settings.get("virtual_stages", 1)
    share = Share(
        num_groups=layout.replica,
        micro_batch_sequences=rows,
        num_micro_batches=batches or (2 if pp == 1 else 2 * pp if chunks > 1 else pp + 1),
        recompute=recompute,
    )
    job = Job(
        layout=layout,
        stage_layers=settings.pop("stage_layers", tuple(each + (place < rest) for place in range(pp))),
        sequence_tokens=tokens,
        precision="bfloat16",
        shares=(share,),
        **{"schedule": "none" if pp == 1 else "1f1b", **settings},
    )
    return Case(name, spec, job, stage)


def cases() -> Iterator[Case]:
    sharded = {"sharding": "weights"}
    # --- the largest ---
    yield case("Llama 405B, 16,384 H100", "llama3.1-405b", layers=64, replica=8, pp=16, shard=16, tp=8,
               sharding="optimizer", tokens=8192)  # fmt: skip
    yield case("Llama 405B, 16,384 H100, last stage", "llama3.1-405b", layers=64, stage=15, replica=8, pp=16,
               shard=16, tp=8, sharding="optimizer", tokens=8192)  # fmt: skip
    yield case("Llama 405B, full depth, interleaved", "llama3.1-405b", replica=8, pp=16, shard=16, tp=8,
               sharding="optimizer", schedule="interleaved", virtual_stages=4, tokens=8192, stage=3)  # fmt: skip
    yield case("Llama 405B, 131,072 tokens", "llama3.1-405b", layers=32, replica=1, pp=16, shard=8, cp=16, tp=8,
               sharding="optimizer", tokens=131_072, recompute="full", context_exchange="all-gather")  # fmt: skip
    yield case("Grok-1, 512", "grok-1", layers=16, pp=8, shard=8, tp=8, ep=8, sharding="optimizer", tokens=8192,
               recompute="selective")  # fmt: skip
    yield case("Grok-1, colossus-200k", "grok-1", layers=16, replica=390, pp=8, shard=8, tp=8, ep=8,
               sharding="optimizer", tokens=8192, recompute="full")  # fmt: skip
    yield case("Grok-2, 512", "grok-2", layers=16, pp=8, shard=8, tp=8, ep=8, sharding="optimizer", tokens=8192,
               recompute="full", stage=7)  # fmt: skip
    yield case("Grok-2, colossus-200k", "grok-2", layers=16, replica=390, pp=8, shard=8, tp=8, expert_tp=8,
               sharding="optimizer", tokens=8192, recompute="full")  # fmt: skip
    yield case("DeepSeek-V3, 2,048 H800", "deepseek-v3", layers=16, pp=16, shard=128, ep=64, sharding="optimizer",
               schedule="dualpipev", virtual_stages=2, stage_layers=(1,) * 16, batches=33, stage=5)  # fmt: skip
    yield case("DeepSeek-V3, first stage", "deepseek-v3", layers=16, pp=8, shard=128, ep=64, sharding="optimizer",
               recompute="full")  # fmt: skip
    # --- sharding ---
    for sharding in ("none", "optimizer", "gradients", "weights"):
        layout = {"replica": 8} if sharding == "none" else {"replica": 2, "shard": 64}
        yield case(f"Llama 8B, {sharding}", "llama3.1-8b", layers=8, **layout, sharding=sharding, tokens=2048)
    yield case(
        "Llama 8B, full depth, weights", "llama3.1-8b", shard=64, **sharded, tokens=8192, recompute="full"
    )
    yield case("Llama 70B, weights, tp", "llama3.1-70b", layers=8, shard=32, tp=8, **sharded, rows=2)
    yield case("Qwen3 0.6B, weights", "qwen3-0.6b", layers=8, shard=8, **sharded, rows=4, tokens=1024)
    yield case(
        "Llama 1B, three micro-batches", "llama3.2-1b", layers=6, shard=8, sharding="gradients", batches=3
    )
    # --- what is recomputed ---
    for recompute in ("none", "selective", "alternate", "full"):
        yield case(
            f"OLMo 7B, {recompute}", "olmo2-7b", layers=4, shard=16, tp=4, **sharded, recompute=recompute
        )
    yield case("Qwen3 8B, alternate, pp", "qwen3-8b", layers=8, pp=4, tp=2, recompute="alternate")
    yield case(
        "gpt-oss 20B, selective", "gpt-oss-20b", layers=4, shard=8, ep=4, **sharded, recompute="selective"
    )
    # --- schedules ---
    for schedule in ("gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev"):
        chunks = 2 if schedule in ("interleaved", "zbv", "dualpipev") else 1
        for stage in (0, 3):
            yield case(f"Llama 8B, {schedule}, stage {stage}", "llama3.1-8b", layers=8, pp=4, shard=2, stage=stage,
                       sharding="optimizer", schedule=schedule, virtual_stages=chunks, tokens=2048)  # fmt: skip
    yield case("Nemotron 15B, zb-h1, tp", "nemotron4-15b", layers=8, pp=4, tp=4, schedule="zb-h1", stage=1)
    # --- context ---
    for exchange in ("ring", "all-gather", "all-to-all"):
        yield case(f"Llama 8B, 32,768 tokens, {exchange}", "llama3.1-8b", layers=4, shard=8, cp=4, tp=2, **sharded,
                   context_exchange=exchange, tokens=32_768)  # fmt: skip
    yield case("Qwen3 14B, ring, full", "qwen3-14b", layers=4, shard=8, cp=8, tp=2, sharding="optimizer",
               context_exchange="ring", tokens=32_768, recompute="full")  # fmt: skip
    # --- experts ---
    yield case("Mixtral 8x7B, ep", "mixtral-8x7b", layers=4, shard=8, ep=8, **sharded)
    yield case(
        "Mixtral 8x7B, tp, expert_tp", "mixtral-8x7b", layers=4, shard=8, tp=8, expert_tp=8, ep=4, **sharded
    )
    yield case("Qwen3 30B-A3B", "qwen3-30b-a3b", layers=6, shard=16, ep=4, **sharded, recompute="full")
    yield case(
        "Qwen3 235B-A22B, pp",
        "qwen3-235b-a22b",
        layers=8,
        pp=4,
        shard=8,
        tp=4,
        ep=8,
        sharding="optimizer",
        stage=1,
    )
    yield case("DeepSeek-V3, weights", "deepseek-v3", layers=5, shard=256, ep=32, **sharded, recompute="full")
    yield case("DBRX, tp", "dbrx", layers=4, shard=8, tp=4, ep=4, sharding="optimizer")
    # --- one process, and two ---
    yield case("GPT-2", "gpt2", tokens=1024, rows=4)
    yield case("GPT-2, replicas", "gpt2-medium", layers=12, tokens=1024, rows=2, replica=4)
    yield case("GPT-3 13B, tp", "gpt3-13b", layers=4, tp=8, tokens=2048, rows=2)


def compare(one: Case) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by kind: traced, and counted."""
    tokens = one.job.share(one.rank).micro_batch_sequences * one.job.sequence_tokens // one.job.layout.cp
    chunk = loss_chunk_tokens(one.model, tokens, "cuda", tp=one.job.layout.tp)
    with fake_world(one.job.layout.num_ranks, one.rank):
        traced = _run(one.model, one.job, "bfloat16", chunk, AdamW()).memory_bytes
    how = How(dtype="bfloat16", chunk_tokens=chunk, optimizer=AdamW(), on_cpu=True, router_losses=True)
    return traced, dict(rank_memory(one.model, one.job, one.rank, how))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for one in cases():
        if arguments.only and not any(word in one.name for word in arguments.only):
            continue
        started = time.perf_counter()
        traced, counted = compare(one)
        all_traced, all_counted = sum(traced.values()), sum(counted.values())
        error = all_counted / all_traced - 1
        rows.append(
            {
                "name": one.name,
                "ranks": one.job.layout.num_ranks,
                "traced": traced,
                "counted": counted,
                "error": error,
            }
        )
        print(
            f"| {one.name} | {one.job.layout.num_ranks:,} | {one.rank:,} | {all_traced / GIB:.2f} | "
            f"{all_counted / GIB:.2f} | {100 * error:+.1f} % | {time.perf_counter() - started:.0f} |",
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1))
    errors = [abs(row["error"]) for row in rows]
    print(
        f"{len(rows)} ranks: median error {100 * statistics.median(errors):.1f} %, worst {100 * max(errors):.1f} %"
    )


if __name__ == "__main__":
    main()
