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

import torch

from colossus.spec.config import to_toml
from colossus.spec.data import DataConfig, Source, TrainedTokenizer
from colossus.spec.duration import Duration
from colossus.spec.model import Activation, AttentionSpec, Dtype, MlpSpec, ModelSpec, NgramSpec, RecallSpec
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
