"""Our steady training throughput on the model that benchmarks/first_light.py gives to every peer.

    python benchmarks/ours_throughput.py --dtype float32 --eager

8 layers × 320 wide, 5 heads of 64, GELU MLP of 1280, vocabulary 4096, untied; batch 8 × 256; AdamW. It is the real
trainer, by the command a user would type, with one thread; pin it to a core with taskset. Prints one JSON object:
tokens per CPU-second (median over steps, optimizer included), and the matmul peak of the same process and core.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from colossus.events import StepDone, read_events
from colossus.spec.config import to_toml
from colossus.spec.data import DataConfig, TrainedTokenizer
from colossus.spec.duration import Duration
from colossus.spec.model import AttentionSpec, Dtype, MlpSpec, ModelSpec
from colossus.spec.run import AdamW, Batch, Evaluation, Fixed, RunConfig

COMMON = ModelSpec(
    name="common",
    vocab_size=4096,
    context_tokens=256,
    num_layers=8,
    hidden_size=320,
    attention=AttentionSpec(num_heads=5, num_kv_heads=5, head_dim=64),
    mlp=MlpSpec(intermediate_size=1280, activation="gelu"),
)
WARM_UP_STEPS = 3


def config(dtype: Dtype, compiled: bool, steps: int) -> RunConfig:
    return RunConfig(
        name="throughput",
        model=COMMON,
        data=DataConfig(tokenizer=TrainedTokenizer(vocab_size=4096)),
        batch=Batch(sequences=8, sequence_tokens=256),
        budget=Duration(amount=float(steps), unit="steps"),
        optimizer=AdamW(learning_rate=1e-3),
        evaluation=Evaluation(every=Duration.parse("1 hour"), max_tokens=None),
        fixed=Fixed(dtype=dtype, compile=compiled),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--runs", type=Path, help="where the run and its corpus go; default: a temporary directory"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = args.runs or Path(scratch)
        toml = Path(scratch) / "common.toml"
        toml.write_text(to_toml(config(args.dtype, not args.eager, args.steps)), encoding="utf-8")
        command = [sys.executable, "-m", "colossus.cli", "train", str(toml)]
        command += ["--threads", "1", "--json", "--no-sample", "--runs", str(runs)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        run = Path(json.loads(out)["run_dir"])
        steps = [event for event in read_events(run / "events.jsonl") if isinstance(event, StepDone)]
        from colossus.observe.run_directory import RunDirectory

        plan = RunDirectory(run).config().plan
    assert plan is not None
    cpu_s = [b.cpu_seconds - a.cpu_seconds for a, b in pairwise(steps)][WARM_UP_STEPS:]
    rates = [plan.step_tokens / seconds for seconds in cpu_s]
    rate = statistics.median(rates)
    peak = plan.machine.matmul_flops[args.dtype]
    print(
        json.dumps(
            {
                "dtype": args.dtype,
                "compiled": not args.eager,
                "float32_library": plan.machine.float32_library,
                "tokens_per_cpu_s": rate,
                "lowest": min(rates),
                "highest": max(rates),
                "steps": len(rates),
                "peak_flops": peak,
                "mfu": rate * COMMON.flops_per_token(256) / peak,
                "six_n_share_of_peak": rate * 6 * COMMON.num_matmul_params() / peak,
                "num_params": COMMON.num_params(),
            }
        )
    )


if __name__ == "__main__":
    main()
