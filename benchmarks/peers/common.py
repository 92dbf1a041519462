"""What the three peer scripts share: the job they are given, the clock, the evaluation and the matmul peak.

A peer script is run as ``python nanogpt_style.py JOB`` where JOB is a JSON object (or the path of a file
holding one) with the fields of :class:`Job`. The last line of its standard output is one JSON object.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# Inductor's worker processes would burn CPU time that process_time() does not see: compile in this process.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

WARMUP_STEPS = 2  # steps left out of every steady-state figure


@dataclass(frozen=True)
class Job:
    """One training run of one peer."""

    train: str  # .npy file of uint16 token ids, documents joined by the end-of-text token
    heldout: str  # the same for the held-out text
    heldout_bytes: int  # UTF-8 bytes of the held-out text
    vocab: int  # tokens
    layers: int = 3
    width: int = 128
    heads: int = 2
    context: int = 256  # tokens
    batch: int = 4  # sequences per optimizer step
    lr: float = 3e-3
    min_lr_ratio: float = 0.0  # last learning rate / peak learning rate
    warmup_fraction: float = 0.05  # of all steps
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    steps: int = 100
    seed: int = 0
    precision: str = "fp32"  # or "bf16": autocast over fp32 weights
    compile: bool = False
    tied: bool = True  # output head shares the embedding's weights
    fused: bool = False  # torch's fused AdamW, where the peer lets one choose it
    family: str = "llama"  # transformers only: "llama" or "gpt2"
    evaluate: bool = True
    measure_peak: bool = False

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return max(1, round(self.steps * self.warmup_fraction))

    @property
    def tokens_per_step(self) -> int:
        """Training tokens per optimizer step."""
        return self.batch * self.context

    @classmethod
    def from_argv(cls) -> Job:
        """Read the job from the command line; leave with a plain message if it is not usable."""
        if len(sys.argv) != 2:
            sys.exit(f"usage: python {Path(sys.argv[0]).name} JOB   (a JSON object, or a file holding one)")
        text = sys.argv[1]
        if not text.lstrip().startswith("{"):
            try:
                text = Path(text).read_text("utf-8")
            except OSError as error:
                sys.exit(f"cannot read the job file {text}: {error.strerror}")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            sys.exit(f"the job is not JSON: {error}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            sys.exit(f"the job has unknown fields: {', '.join(unknown)} (known: {', '.join(sorted(known))})")
        if missing := sorted({"train", "heldout", "heldout_bytes", "vocab"} - set(values)):
            sys.exit(f"the job lacks: {', '.join(missing)}")
        job = cls(**values)
        if job.precision not in ("fp32", "bf16"):
            sys.exit(f"precision is {job.precision!r}; it has to be 'fp32' or 'bf16'")
        if job.width % job.heads:
            sys.exit(f"width {job.width} does not divide into {job.heads} heads")
        if job.steps < 1:
            sys.exit(f"steps is {job.steps}; at least one is needed")
        return job


def cosine_scale(step: int, job: Job) -> float:
    """Learning rate of ``step`` (from 0) as a share of the peak: linear warm-up, then a cosine to the end."""
    if step < job.warmup_steps:
        return (step + 1) / job.warmup_steps
    done = (step - job.warmup_steps) / max(1, job.steps - job.warmup_steps)
    return job.min_lr_ratio + (1 - job.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class StepClock:
    """CPU seconds of this process at the start of each step and at the end of training."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.end: float | None = None

    def tick(self) -> None:
        """Mark the start of a step."""
        self.starts.append(time.process_time())

    def stop(self) -> None:
        """Mark the end of training; what follows (evaluation, saving) is not counted."""
        self.end = time.process_time()

    def figures(self, job: Job) -> dict[str, float]:
        """Start-up, steady step time and rates, in CPU seconds since the process began."""
        assert self.end is not None, "the clock was never stopped"
        marks = [*self.starts[: job.steps], self.end]
        durations = [b - a for a, b in itertools.pairwise(marks)]
        # The last stretch also holds whatever the trainer does on the way out: leave it out too.
        steady = durations[WARMUP_STEPS:-1] or durations
        step_s = statistics.median(steady)
        return {
            "train_cpu_s": self.end,
            "first_step_at_cpu_s": marks[0],
            # What is not steady stepping: imports, building, warm compile, first steps, the way out.
            "overhead_cpu_s": self.end - step_s * job.steps,
            "step_cpu_s": step_s,
            "quiet_step_cpu_s": sorted(steady)[
                len(steady) // 5
            ],  # where neighbours disturb, the faster steps
            "steady_tokens_per_cpu_s": job.tokens_per_step / step_s,
            "best_tokens_per_cpu_s": job.tokens_per_step / min(steady),  # the quietest step
            "tokens_per_cpu_s": job.tokens_per_step * job.steps / self.end,
        }


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what a trainer prints to standard error, so that standard output holds only the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def evaluate(logits_of: Callable[[Any], Any], job: Job) -> dict[str, float]:
    """Bits per UTF-8 byte over the whole held-out text, in non-overlapping windows of the context length.

    Every token but the very first is predicted, the end-of-text tokens between documents too.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    ids = torch.from_numpy(np.load(job.heldout).astype(np.int64))
    inputs, targets = ids[:-1], ids[1:]
    full = len(inputs) // job.context * job.context
    batches = list(
        zip(
            inputs[:full].view(-1, job.context).split(8),
            targets[:full].view(-1, job.context).split(8),
            strict=True,
        )
    )
    if full < len(inputs):
        batches.append((inputs[full:][None], targets[full:][None]))
    nats = 0.0
    with torch.inference_mode():
        for x, y in batches:
            logits = logits_of(x).float()
            nats += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return {
        "bpb": nats / math.log(2) / job.heldout_bytes,
        "heldout_nats_per_token": nats / len(targets),
        "heldout_tokens": len(targets),
    }


def matmul_peak(seconds: float = 0.4) -> dict[str, float]:
    """Best matmul rate of this process in FLOP per CPU second, for fp32 and bf16, over a few shapes."""
    import torch

    best = {"fp32": 0.0, "bf16": 0.0}
    for m, k, n in ((1024, 1024, 1024), (2048, 320, 1280), (2048, 1280, 320), (2048, 320, 4096)):
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            a, b = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype).t()
            a @ b
            for _ in range(2):
                count, start = 0, time.process_time()
                while (spent := time.process_time() - start) < seconds / 2:
                    a @ b
                    count += 1
                best[name] = max(best[name], 2.0 * m * k * n * count / spent)
    return best


def matmul_params(model: Any, tied: bool) -> int:
    """Parameters that take part in matrix products: all matrices but a lookup-only embedding.

    6 x this number is the training FLOP per token without attention's own products.
    """
    import torch.nn as nn

    modules = list(model.modules())
    tables = [m.weight for m in modules if isinstance(m, nn.Embedding)]
    products = [m.weight for m in modules if type(m).__name__ in ("Linear", "Conv1D")]
    if tied and not any(w is table for w in products for table in tables):
        raise ValueError("the job says tied, but no output layer shares the embedding's weights")
    return sum(w.numel() for w in products)


def report(
    job: Job,
    clock: StepClock,
    model: Any,
    logits_of: Callable[[Any], Any],
    *,
    train_loss: float | None = None,
    versions: dict[str, str] | None = None,
) -> None:
    """Evaluate, then print the run's JSON object on standard output."""
    import torch

    figures: dict[str, Any] = clock.figures(job)
    if job.evaluate:
        with quiet_stdout():
            figures |= evaluate(logits_of, job)
    params = matmul_params(model, job.tied)
    # Causal attention: two products with context/2 keys on average, three times that with the backward.
    attention = 6 * job.layers * job.width * job.context
    figures["flop_per_token_6n"] = 6 * params
    figures["flop_per_token_with_attention"] = 6 * params + attention
    figures["flops_6n"] = 6 * params * figures["steady_tokens_per_cpu_s"]
    if job.measure_peak:
        peak = matmul_peak()
        figures["matmul_peak_flops"] = peak
        figures["mfu_of_fp32_peak"] = figures["flops_6n"] / peak["fp32"]
        figures["mfu_of_own_precision_peak"] = figures["flops_6n"] / peak[job.precision]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures |= {
        "steps": job.steps,
        "tokens": job.steps * job.tokens_per_step,
        "params": sum(p.numel() for p in model.parameters()),
        "matmul_params": params,
        "children_cpu_s": children.ru_utime + children.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "threads": torch.get_num_threads(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, **(versions or {})},
        "train_loss": train_loss,
        "job": asdict(job),
    }
    print(json.dumps(figures), flush=True)
