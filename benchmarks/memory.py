"""The memory that a plan predicts, and the memory that training takes.

    python benchmarks/memory.py [--threads 1] [--only NAME]

Prints Markdown. Each configuration is trained for six steps by `colossus train` in a process of its own; measured is
the peak of that process's resident memory, of the whole run: start-up, steps, checkpoint, evaluation and curves.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from colossus.spec.config import to_toml
from colossus.spec.data import DataConfig, Source, TrainedTokenizer
from colossus.spec.duration import Duration
from colossus.spec.model import (
    Activation,
    AttentionSpec,
    Dtype,
    FirstLayers,
    LatentAttentionSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NgramSpec,
    RecallSpec,
    RouterGroups,
    RouterSpec,
    SharedMlpSpec,
    WindowSpec,
)
from colossus.spec.rank import Memory
from colossus.spec.run import AdamW, Batch, Fixed, Muon, RunConfig
from colossus.units import format_bytes
from recipes import RECIPES

ROOT = Path(__file__).parents[1]
TEXT = DataConfig(
    sources=(Source(path=str(Path(asyncio.__file__).parent)),), tokenizer=TrainedTokenizer(vocab_size=1024)
)


def configuration(
    name: str,
    layers: int,
    hidden: int,
    vocab: int,
    sequences: int,
    tokens: int,
    dtype: Dtype,
    optimizer: AdamW | Muon,
    *,
    activation: Activation = "swiglu",
    kv_heads: int | None = None,
    tables: bool = False,
    micro_batch: int | None = None,
) -> RunConfig:
    heads = hidden // 64
    model = ModelSpec(
        name=name,
        vocab_size=vocab,
        context_tokens=tokens,
        num_layers=layers,
        hidden_size=hidden,
        attention=AttentionSpec(num_heads=heads, num_kv_heads=kv_heads or heads, head_dim=64),
        mlp=MlpSpec(intermediate_size=4 * hidden, activation=activation),
        ngrams=NgramSpec(num_rows=16_384) if tables else None,
        recall=RecallSpec() if tables else None,
    )
    return RunConfig(
        name=name,
        model=model,
        batch=Batch(sequences=sequences, sequence_tokens=tokens),
        data=TEXT,
        optimizer=optimizer,
        fixed=Fixed(dtype=dtype, micro_batch_sequences=micro_batch, compile=False),
    )


def family(
    name: str, dtype: Dtype, optimizer: AdamW | Muon, *, sequences: int = 8, tokens: int = 256, **parts: Any
) -> RunConfig:
    """Four layers of width 256 of one of the zoo's families."""
    whole = {"name": name, "vocab_size": 2048, "context_tokens": tokens, "num_layers": 4, "hidden_size": 256}
    return RunConfig(
        name=name,
        model=ModelSpec(**{**whole, **parts}),
        batch=Batch(sequences=sequences, sequence_tokens=tokens),
        data=TEXT,
        optimizer=optimizer,
        fixed=Fixed(dtype=dtype, compile=False),
    )


GROUPED = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=32)
LLAMA = {"attention": GROUPED, "mlp": MlpSpec(intermediate_size=704)}
GROK = {
    "attention": GROUPED.model_copy(update={"score_soft_cap": 30.0}),
    "mlp": MoeSpec(num_experts=8, top_k=2, intermediate_size=512, activation="geglu"),
    "norm_placement": "sandwich",
    "logit_soft_cap": 30.0,
}
GPT_OSS = {
    "attention": GROUPED.model_copy(
        update={"sinks": True, "bias": "all", "window": WindowSpec(tokens=64, full_every=2)}
    ),
    "mlp": MoeSpec(
        num_experts=8,
        top_k=2,
        intermediate_size=256,
        activation="clamped_swiglu",
        bias=True,
        router=RouterSpec(bias=True),
    ),
}
DEEPSEEK = {
    "attention": LatentAttentionSpec(
        num_heads=8, q_lora_rank=96, kv_lora_rank=64, nope_head_dim=32, rope_head_dim=16, value_head_dim=32
    ),
    "first_layers": FirstLayers(num_layers=1, mlp=MlpSpec(intermediate_size=704)),
    "mlp": MoeSpec(
        num_experts=16,
        top_k=4,
        intermediate_size=176,
        shared=SharedMlpSpec(intermediate_size=176),
        router=RouterSpec(
            scoring="sigmoid", balancing_bias=True, groups=RouterGroups(num_groups=4, top_groups=2)
        ),
    ),
}

CONFIGURATIONS = [
    *(recipe() for recipe in RECIPES.values()),
    configuration("small", 2, 128, 1024, 8, 256, "bfloat16", Muon(), activation="squared_relu"),
    configuration("gated", 4, 256, 2048, 8, 256, "float32", AdamW()),
    configuration("gated-bf16", 4, 256, 2048, 8, 256, "bfloat16", AdamW()),
    configuration("tables", 4, 256, 2048, 8, 256, "float32", Muon(), activation="gelu", tables=True),
    configuration("activations", 6, 256, 2048, 16, 256, "bfloat16", Muon(), activation="squared_relu"),
    configuration("activations-fp32", 6, 256, 2048, 16, 256, "float32", AdamW()),
    configuration("micro-batches", 6, 256, 2048, 16, 256, "float32", AdamW(), micro_batch=4),
    configuration("long", 4, 256, 2048, 2, 1024, "bfloat16", AdamW(), kv_heads=2),
    configuration("wide", 2, 768, 8192, 4, 128, "float32", Muon()),
    configuration(
        "wide-bf16", 4, 512, 8192, 2, 128, "bfloat16", Muon(), activation="squared_relu", tables=True
    ),
    family("llama", "float32", AdamW(), **LLAMA),
    family("grok", "float32", AdamW(), **GROK),
    family("grok-long", "float32", AdamW(), sequences=2, tokens=1024, **GROK),
    family("gpt-oss-bf16", "bfloat16", AdamW(), **GPT_OSS),
    family("deepseek", "float32", AdamW(), **DEEPSEEK),
    family("deepseek-bf16", "bfloat16", Muon(), **DEEPSEEK),
    family("deepseek-long", "float32", AdamW(), sequences=2, tokens=1024, **DEEPSEEK),
]


def measure(config: RunConfig, runs: Path, threads: int) -> tuple[Memory, int]:
    """What the plan of a run of `config` predicts, and the peak of its resident memory."""
    config = config.model_copy(update={"data": TEXT, "budget": Duration.parse("6 steps")})
    path = runs / f"{config.name}.toml"
    path.write_text(to_toml(config))
    arguments = ["train", str(path), "--runs", str(runs), "--json", "--no-sample", "--threads", str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", "colossus.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        sys.exit(done.stderr)
    from colossus.observe.run_directory import RunDirectory

    plan = RunDirectory.open(f"{config.name}-001", runs).config().plan
    assert plan is not None
    return plan.estimate.memory, json.loads(done.stdout)["peak_rss_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", action="append")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {arguments.threads} thread(s)\n")
    parts = [name.removesuffix("_bytes") for name in Memory.model_fields]
    print("| configuration | predicted | measured | error | " + " | ".join(parts) + " |")
    print("|---|" + "---:|" * (3 + len(parts)))
    with tempfile.TemporaryDirectory() as directory:
        for config in CONFIGURATIONS:
            if arguments.only and config.name not in arguments.only:
                continue
            memory, measured = measure(config, Path(directory), arguments.threads)
            error = memory.total_bytes / measured - 1
            sizes = " | ".join(f"{size / 2**20:.0f}" for size in memory.model_dump().values())
            print(
                f"| {config.name} | {format_bytes(memory.total_bytes)} | {format_bytes(measured)} | {error:+.1%} "
                f"| {sizes} |",
                flush=True,
            )
    print("\nParts in MiB.")


if __name__ == "__main__":
    main()
