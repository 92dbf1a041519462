"""Training steps on one GPU: tokens/s, MFU, memory and compile time, beside what the planner predicts.

    python benchmarks/gpu.py --out DIR [--minutes 9] [--only llama-1b …]
    python benchmarks/gpu.py --out DIR --device cpu --tiny        does the same on toy models: does this script work?

Needs this repository, torch, numpy and pydantic; transformers is measured beside ours where it is installed. Writes
DIR/gpu.json and DIR/gpu.md anew after each case, so that what has been measured is kept when time ends.

Each case is a process of its own: it cannot use up another's memory, and is ended when its time is over. It takes
steps as the trainer's ranks do (`RankModel` in a world of one rank: micro-batches, norm, clipping, optimizer, the
loop's waits for the loss and the norm), on random tokens that come from the host each step. Weights are drawn on the
device. The state's precision and the micro-batch are the first of a list that fits by the planner's account; a case of
which none fits is skipped, with the numbers.

MFU counts model FLOPs, over the chip's dense bfloat16 peak in `mfu_of_bf16`, over that of the precision that matmuls
run in in `mfu`.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
_NEEDED = ("torch", "numpy", "pydantic")
_MISSING = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
if _MISSING:
    sys.exit(
        f"error: this Python ({sys.executable}) has no {' and no '.join(_MISSING)}; the benchmark needs "
        f"{', '.join(_NEEDED)} and nothing else. benchmarks/gpu.md says how to bring pydantic to a machine without a "
        "network."
    )

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from colossus.data import Batch  # noqa: E402
from colossus.hardware import chip as chip_named  # noqa: E402
from colossus.hardware import parse_fleet  # noqa: E402
from colossus.models import RouterLosses  # noqa: E402
from colossus.models.attend import attend, attention_bias, who_sees  # noqa: E402
from colossus.optim import build_optimizers, scale_gradients  # noqa: E402
from colossus.parallel.mesh import Mesh  # noqa: E402
from colossus.parallel.optimize import MatrixRounds, gradient_norm  # noqa: E402
from colossus.parallel.rank_model import Objective, RankModel  # noqa: E402
from colossus.planner.estimate.constants import Constants, shipped  # noqa: E402
from colossus.planner.estimate.execution import RECOMPUTE, Execution, Hardware  # noqa: E402
from colossus.planner.estimate.memory import memory_constants  # noqa: E402
from colossus.planner.estimate.rank_memory import How, rank_memory  # noqa: E402
from colossus.planner.estimate.shape import ModelShape  # noqa: E402
from colossus.planner.estimate.step import step_parts  # noqa: E402
from colossus.planner.one_rank.plan import loss_chunk_tokens  # noqa: E402
from colossus.planner.search.bounds import ATTENTION, SOFTWARE  # noqa: E402
from colossus.spec.fleet import Precision  # noqa: E402
from colossus.spec.job import Job, Share  # noqa: E402
from colossus.spec.model import (  # noqa: E402
    BYTES_PER_ELEMENT,
    AttentionSpec,
    Dtype,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    RouterSpec,
    WindowSpec,
)
from colossus.spec.plan import Recompute  # noqa: E402
from colossus.spec.run import AdamW  # noqa: E402
from colossus.zoo import find  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP_STEPS = 2
MOST_STEPS = 12
TIMED_S = 25.0
"""Timed steps of a case end after so long, but for two."""
LEAST_LEFT_S = 45.0
"""A case is not begun with less."""
MARGIN = 0.05
"""Share of the memory that is left free: on a GPU the account has not been checked yet."""
START_S = 25.0
"""Of a case's process before its first step: imports, the device's context, weights."""


# --- what is measured ---


@dataclass(frozen=True)
class Size:
    """What of a case may be changed so that it fits."""

    sequence_tokens: int
    micro_batch_sequences: int
    num_micro_batches: int
    optimizer_state: Dtype = "float32"
    recompute: Recompute = "none"


@dataclass(frozen=True)
class Case:
    model: str
    precision: Precision = "bfloat16"
    compiled: bool = True
    software: str = "colossus"

    @property
    def name(self) -> str:
        how = "compiled" if self.compiled else "eager"
        return "-".join([self.model, self.precision, how] + [self.software] * (self.software != "colossus"))


CASES = (
    Case("attention", compiled=False),
    Case("llama-1b", compiled=False),
    Case("llama-1b"),
    Case("llama-1b", "fp8"),
    Case("llama-1b", compiled=False, software="transformers"),
    Case("llama-8b"),
    Case("llama-8b", "fp8"),
    Case("grok-small"),
    Case("grok-small", compiled=False),
    Case("grok-small", "fp8"),
    Case("llama-3b"),
    Case("llama-8b", compiled=False),
    Case("llama-1b", "fp8", compiled=False),
)
"""The most telling first: time may end."""


def model_of(name: str, tiny: bool) -> ModelSpec:
    match name:
        case "llama-1b":
            model = find("llama3.2-1b")
        case "llama-3b":
            model = find("llama3.2-3b")
        case "llama-8b":
            model = find("llama3-8b")
        case _:
            model = GROK_SMALL
    if not tiny:
        return model
    attention, mlp = model.attention, model.mlp
    assert isinstance(attention, AttentionSpec)
    small = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    if attention.window is not None:
        small["window"] = attention.window.model_copy(update={"tokens": 24})  # type: ignore[assignment]
    return model.model_copy(
        update={
            "vocab_size": 256, "context_tokens": 128, "num_layers": 2, "hidden_size": 64,
            "attention": attention.model_copy(update=small), "mlp": mlp.model_copy(update={"intermediate_size": 96}),
        }
    )  # fmt: skip


GROK_SMALL = ModelSpec(
    name="grok-small",
    vocab_size=131_072,
    context_tokens=8192,
    num_layers=12,
    hidden_size=2048,
    attention=AttentionSpec(
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        score_soft_cap=30.0,
        window=WindowSpec(tokens=1024, full_every=4),
    ),
    mlp=MoeSpec(
        num_experts=8,
        top_k=2,
        intermediate_size=4096,
        activation="geglu",
        router=RouterSpec(scoring="softmax", renormalized=False),
    ),
    norm_placement="sandwich",
    embedding_multiplier=2048**0.5,
    tied_embeddings=True,
    logit_soft_cap=30.0,
    zero_init_outputs=False,
)
"""2.8 billion weights, a third of them active: soft-capped attention, windows, eight experts, norms on both sides."""


def sizes_of(name: str, tiny: bool) -> tuple[Size, ...]:
    """In order of preference."""
    if tiny:
        return (Size(64, 2, 2),)
    sequence = 4096
    sizes = [
        Size(sequence, micro_batch, 2, state, recompute)
        for state in ("float32", "bfloat16")
        for recompute in ("none", "selective", "full")
        for micro_batch in ((4, 2, 1) if name != "llama-8b" else (2, 1))
    ]
    return tuple(sizes)


def job_of(model: ModelSpec, precision: Precision, size: Size) -> Job:
    share = Share(
        micro_batch_sequences=size.micro_batch_sequences,
        num_micro_batches=size.num_micro_batches,
        recompute=size.recompute,
    )
    return Job(
        stage_layers=(model.num_layers,),
        sequence_tokens=size.sequence_tokens,
        precision=precision,
        optimizer_state=size.optimizer_state,
        shares=(share,),
    )


def chunk_tokens_of(model: ModelSpec, size: Size, kind: str) -> int:
    return loss_chunk_tokens(model, size.micro_batch_sequences * size.sequence_tokens, kind)


# --- what is predicted ---


def catalog_name(device_name: str) -> str | None:
    """The catalog's name of what CUDA calls a chip; None where the catalog has none."""
    words = device_name.upper().replace("-", " ").split()
    if "H200" in words:
        return "h200"
    if "H100" in words:
        return "h100-pcie" if "PCIE" in words else "h100-nvl" if "NVL" in words else "h100-sxm"
    if "A100" in words:
        size = "40" if "40GB" in words else "80"
        return f"a100-pcie-{size}" if "PCIE" in words and size == "80" else f"a100-{size}"
    for name in ("B200", "B300", "GB200", "GB300", "H800", "H20", "L40S"):
        if name in words:
            return name.lower()
    return None


def predicted_bytes(model: ModelSpec, precision: Precision, size: Size, kind: str) -> dict[str, int]:
    """At the peak of a step, by what holds it."""
    how = How(
        dtype="float32" if precision == "float32" else "bfloat16",
        chunk_tokens=chunk_tokens_of(model, size, kind),
        optimizer=AdamW(),
        state_bytes=BYTES_PER_ELEMENT[size.optimizer_state],
        router_losses=isinstance(model.mlp, MoeSpec),
        on_cpu=kind == "cpu",
    )
    parts = {
        str(part): held for part, held in rank_memory(model, job_of(model, precision, size), 0, how).items()
    }
    return {**parts, "context": int(memory_constants()["context_bytes"])}


def predicted_step_s(
    model: ModelSpec, precision: Precision, size: Size, chip_name: str, compiled: bool
) -> dict[str, float]:
    """Seconds of a step on one of these chips, by part, as the planner estimates it of our own software."""
    pool = parse_fleet(f"{chip_name}:8").pools[0]  # one node: of which one chip is asked about
    one, fused = np.ones(1), np.full(1, float(compiled))
    x = Execution(
        sequence=one * size.sequence_tokens, micro_batch=one * size.micro_batch_sequences,
        micro_batches=one * size.num_micro_batches, tp=one, pp=one, chunks=one, cp=one, data=one, shard=one,
        sharding=0 * one, ep=one, expert_tp=one, recompute=one * RECOMPUTE.index(size.recompute), sequence_parallel=one,
        flash=one, fused=fused, few_launches=fused, score_traffic=one, overlap_data=one, overlap_tensor=one,
        overlap_experts=one, one_copy_per_node=one, gradient_bytes=4.0 * one,
    )  # fmt: skip
    constants = Constants.gather(shipped(), [pool.chip.generation], [precision], [SOFTWARE], [ATTENTION])
    parts = step_parts(ModelShape.of(model, expert_load=1.0), x, Hardware.of(pool.node, precision), constants)
    return {
        name.removesuffix("_s"): float(getattr(parts, name)[0])
        for name in type(parts).__dataclass_fields__
        if float(getattr(parts, name)[0]) > 0
    }


# --- steps ---


class Stopwatch:
    """Steps taken and timed, each to where the device has finished it."""

    def __init__(self, kind: str, report: Callable[..., None], deadline: float) -> None:
        self._kind, self._report, self._deadline = kind, report, deadline

    def run(self, step: Callable[[], float], tokens: int) -> None:
        first_s = self._timed(step)[0]
        self._report(first_step_s=first_s)
        warm_s = [self._timed(step)[0] for _ in range(WARM_UP_STEPS - 1)]
        # What the first step took beside a step's work: compiling, and libraries that come up.
        self._report(compile_s=max(0.0, first_s - warm_s[-1]))
        if self._kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times: list[float] = []
        until = min(time.monotonic() + TIMED_S, self._deadline)
        while len(times) < MOST_STEPS and (len(times) < 2 or time.monotonic() < until):
            seconds, loss = self._timed(step)
            times.append(seconds)
            self._report(
                num_steps=len(times), step_s=statistics.median(times), fastest_s=min(times), slowest_s=max(times),
                tokens_per_s=tokens / statistics.median(times), loss=loss, **self._memory(),
            )  # fmt: skip

    def _timed(self, step: Callable[[], float]) -> tuple[float, float]:
        self._wait()
        started = time.perf_counter()
        loss = step()
        self._wait()
        return time.perf_counter() - started, loss

    def _wait(self) -> None:
        if self._kind == "cuda":
            torch.cuda.synchronize()

    def _memory(self) -> dict[str, int]:
        if self._kind == "cpu":
            return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        free, total = torch.cuda.mem_get_info()
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "outside_bytes": total - free - torch.cuda.memory_reserved(),
        }


def batches(model: ModelSpec, size: Size) -> Iterator[Batch]:
    """Random tokens, one document a row."""
    rows, generator = size.micro_batch_sequences * size.num_micro_batches, np.random.default_rng(0)
    for step in range(10**6):
        tokens = generator.integers(0, model.vocab_size, (rows, size.sequence_tokens + 1))
        documents = np.zeros((rows, size.sequence_tokens), np.int32)
        yield Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), documents, np.arange(rows) + step * rows)


def our_step(model: ModelSpec, case: Case, size: Size, kind: str) -> tuple[Callable[[], float], str]:
    """A step as the trainer's ranks take it; and what runs in FP8."""
    job = job_of(model, case.precision, size)
    mesh = Mesh(job.layout, job.expert_tp, device=kind)
    dtype = DTYPES["float32" if case.precision == "float32" else "bfloat16"]
    rank = RankModel(
        model, job, mesh, dtype=dtype, chunk_tokens=chunk_tokens_of(model, size, kind), compiled=case.compiled
    )
    rank.materialise(None)
    draw(model, rank.parameters)
    optimizers = build_optimizers(
        rank.parameters,
        {name: placement.parameter for name, placement in rank.placements.items()},
        AdamW(),
        loads=rank.loads(),
        dtype=dtype,
        state_dtype=DTYPES[job.optimizer_state],
        rounds=MatrixRounds(rank.parameters, rank.placements, mesh),
    )
    losses = None
    if isinstance(model.mlp, MoeSpec):
        weight = torch.tensor(0.01 / job.step_tokens, device=kind)
        losses = RouterLosses(weight, 0 * weight)
    text = batches(model, size)

    def step() -> float:
        loss = rank.accumulate(next(text), Objective(job.step_tokens, router_losses=losses))
        norm = gradient_norm(rank.gradients(), rank.placements, mesh)
        loss_value, norm_value = loss.double().item() / job.step_tokens, norm.item()
        if norm_value > 1.0:
            scale_gradients(rank.parameters.values(), 1.0 / norm)
        for optimizer in optimizers:
            optimizer.step()
        rank.clear_gradients()
        for load in rank.loads().values():
            load.zero_()
        return loss_value

    use = rank.parts[0].float8
    return step, "" if use is None else str(use)


@torch.no_grad()
def draw(model: ModelSpec, parameters: Mapping[str, Tensor]) -> None:
    """Initial weights, drawn where they are: the trainer's own come from the host, which takes minutes for billions."""
    for spec in model.parameters():
        if spec.std == 0:
            parameters[spec.name].fill_(spec.start)
        else:
            parameters[spec.name].normal_(0, spec.std)


def transformers_step(model: ModelSpec, case: Case, size: Size, kind: str) -> Callable[[], float]:
    """The same model by `transformers`: float32 weights under autocast, its own loss, torch's fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    attention, mlp = model.attention, model.mlp
    assert isinstance(attention, AttentionSpec)
    assert isinstance(mlp, MlpSpec)
    config = LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=mlp.intermediate_size,
        num_hidden_layers=model.num_layers, num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads, max_position_embeddings=model.context_tokens,
        tie_word_embeddings=model.tied_embeddings, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(kind):
        theirs = LlamaForCausalLM(config)
    called = torch.compile(theirs) if case.compiled else theirs
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
    text = batches(model, size)
    rows = size.micro_batch_sequences * size.num_micro_batches

    def step() -> float:
        batch = next(text)
        total = torch.zeros((), device=kind)
        for start in range(0, rows, size.micro_batch_sequences):
            # It moves labels by one itself.
            tokens = torch.from_numpy(batch.tokens[start : start + size.micro_batch_sequences]).to(kind)
            with torch.autocast(kind, torch.bfloat16):
                loss = called(input_ids=tokens, labels=tokens).loss / size.num_micro_batches
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        loss_value, _ = total.item(), norm.item()
        optimizer.step()
        optimizer.zero_grad()
        return loss_value

    return step


def measure_attention(kind: str, tiny: bool, report: Callable[..., None]) -> None:
    """Seconds of attention alone, forward and backward, by the ways that there are, at Llama 3 8B's shape."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention as fused

    rows, heads, kv_heads, tokens, head_dim = (1, 4, 2, 64, 16) if tiny else (2, 32, 8, 4096, 128)
    dtype, scale = torch.bfloat16, head_dim**-0.5

    def made(count: int) -> Tensor:
        return torch.randn(rows, count, tokens, head_dim, device=kind, dtype=dtype).requires_grad_()

    query, key, value = made(heads), made(kv_heads), made(kv_heads)
    gradient = torch.randn(rows, heads, tokens, head_dim, device=kind, dtype=dtype)
    documents = (torch.arange(tokens, device=kind) * 4 // tokens).expand(rows, -1).contiguous()
    seen = documents, documents, torch.arange(tokens, device=kind)[None], dtype
    sees, bias = who_sees(*seen), attention_bias(*seen)

    def same_document(row: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (documents[row, q] == documents[row, k])

    def wide(x: Tensor) -> Tensor:
        return x.repeat_interleave(heads // kv_heads, 1)

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return 30.0 * torch.tanh(score / 30.0)

    compiled = torch.compile(flex_attention, dynamic=False)
    blocks = create_block_mask(same_document, rows, None, tokens, tokens, device=kind)
    ways: dict[str, Callable[[], Tensor]] = {
        "ours, documents": lambda: attend(query, key, value, sees, scale=scale),
        "ours, documents, soft cap": lambda: attend(query, key, value, sees, scale=scale, soft_cap=30.0),
        "ours, who sees whom": lambda: attend(query, key, value, who_sees(*seen), scale=scale),
        "plain operations, documents, soft cap": lambda: attend(
            query, key, value, bias, scale=scale, soft_cap=30.0
        ),
        "torch, causal": lambda: fused(query, key, value, is_causal=True, enable_gqa=True),
        "torch, documents, keys shared": lambda: fused(query, key, value, attn_mask=bias, enable_gqa=True),
        "torch, documents, keys repeated": lambda: fused(query, wide(key), wide(value), attn_mask=bias),
        "flex, documents": lambda: compiled(query, key, value, block_mask=blocks, enable_gqa=True),
        "flex, documents, soft cap": lambda: compiled(
            query, key, value, score_mod=capped, block_mask=blocks, enable_gqa=True
        ),
    }
    measured: dict[str, float | str] = {}
    for name, way in ways.items():
        try:
            times = []
            for _ in range(8):
                if kind == "cuda":
                    torch.cuda.synchronize()
                started = time.perf_counter()
                torch.autograd.grad(way(), (query, key, value), gradient)
                if kind == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
            measured[name] = statistics.median(times[3:])
        except Exception as error:  # a way that this machine does not have is a result too
            measured[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        report(attention_s=measured)


# --- one case, in a process of its own ---


def run_case(case: Case, kind: str, tiny: bool, result: Path, seconds: float) -> None:
    started, facts = time.monotonic(), {"name": case.name, **asdict(case)}

    def report(**more: Any) -> None:
        facts.update(more)
        facts["case_s"] = time.monotonic() - started
        write(result, json.dumps(facts))

    report(status="started")
    if kind == "cuda":
        torch.cuda.set_device(0)
        torch.backends.cuda.matmul.allow_tf32 = False
    device_name = torch.cuda.get_device_name() if kind == "cuda" else platform.processor() or "cpu"
    # A toy on a CPU is predicted as if for an H200, only so that this code runs.
    chip_name = catalog_name(device_name) if kind == "cuda" else "h200"
    report(device=device_name, chip=chip_name, torch=torch.__version__)
    if case.model == "attention":
        measure_attention(kind, tiny, report)
        report(status="done")
        return
    model = model_of(case.model, tiny)
    room = torch.cuda.get_device_properties(0).total_memory if kind == "cuda" else 2**33
    usable = room * (memory_constants()["usable"] - MARGIN)
    size, needed = first_that_fits(model, case, sizes_of(case.model, tiny), usable, kind)
    if size is None:
        report(
            status="skipped",
            reason=f"at best {needed / 2**30:.1f} GiB by the account, of {usable / 2**30:.1f} usable",
        )
        return
    if case.software == "transformers" and not tiny:
        # It holds all logits in float32, several times: a sequence at a time.
        size = replace(size, micro_batch_sequences=1, num_micro_batches=2 * size.micro_batch_sequences)
    tokens = size.micro_batch_sequences * size.num_micro_batches * size.sequence_tokens
    report(
        num_params=model.num_params(), active_params=model.num_active_params(), tokens=tokens, **asdict(size)
    )
    if case.software == "colossus":
        held = predicted_bytes(model, case.precision, size, kind)
        report(predicted_bytes=sum(held.values()), predicted_parts_bytes=held)
        if chip_name is not None:
            parts = predicted_step_s(model, case.precision, size, chip_name, case.compiled)
            report(predicted_step_s=sum(parts.values()), predicted_parts_s=parts)
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            store=dist.FileStore(str(Path(directory) / "store"), 1),
            rank=0,
            world_size=1,
        )
        if case.software == "transformers":
            step = transformers_step(model, case, size, kind)
        else:
            step, float8 = our_step(model, case, size, kind)
            report(float8=float8)
        report(status="stepping", ready_s=time.monotonic() - started)
        Stopwatch(kind, report, started + seconds).run(step, tokens)
        dist.destroy_process_group()
    if chip_name is not None:
        peaks = chip_named(chip_name).peak_flops
        flops = model.flops_per_token(size.sequence_tokens) * facts["tokens_per_s"]
        report(mfu_of_bf16=flops / peaks["bfloat16"], mfu=flops / peaks[case.precision])
    report(status="done")


def first_that_fits(
    model: ModelSpec, case: Case, sizes: tuple[Size, ...], usable: float, kind: str
) -> tuple[Size | None, float]:
    """And what it needs by the account; without one, the least that any needs."""
    least = float("inf")
    for size in sizes:
        needed = float(sum(predicted_bytes(model, case.precision, size, kind).values()))
        if needed <= usable:
            return size, needed
        least = min(least, needed)
    return None, least


# --- all cases ---


def write(path: Path, text: str) -> None:
    """Whole or not at all: whoever ends this process must find what was there."""
    beside = path.with_suffix(".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def run_all(arguments: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    ends = time.monotonic() + 60 * arguments.minutes
    done: list[dict[str, Any]] = []
    for case in CASES:
        if arguments.only and not any(case.name.startswith(name) for name in arguments.only):
            continue
        left = ends - time.monotonic()
        facts: dict[str, Any] = {"name": case.name, **asdict(case)}
        if case.software != "colossus" and importlib.util.find_spec(case.software) is None:
            facts |= {"status": "skipped", "reason": f"{case.software} is not installed"}
        elif left < LEAST_LEFT_S:
            facts |= {"status": "skipped", "reason": f"{max(0, left):.0f} s were left"}
        else:
            facts = in_a_process(case, arguments, out, left)
        done.append(facts)
        print(line(facts), flush=True)
        document = {
            "date": date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__,
            "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]), "tiny": arguments.tiny, "cases": done,
        }  # fmt: skip
        write(out / "gpu.json", json.dumps(document, indent=1))
        write(out / "gpu.md", markdown(document))
    return done


def in_a_process(case: Case, arguments: argparse.Namespace, out: Path, left: float) -> dict[str, Any]:
    result = out / f".{case.name}.json"
    command = [sys.executable, str(Path(__file__)), "--case", case.name, "--result", str(result)]
    command += ["--device", arguments.device, "--seconds", str(left - START_S)] + ["--tiny"] * arguments.tiny
    trouble = ""
    try:
        ended = subprocess.run(
            command, timeout=left, capture_output=True, text=True, errors="replace", check=False
        )
        if ended.returncode:
            lines = [text for text in ended.stderr.splitlines() if text.strip()]
            trouble = f"ended with {ended.returncode}: {lines[-1][:300] if lines else 'without a word'}"
            (out / f"{case.name}.stderr").write_text(ended.stderr[-20_000:], encoding="utf-8")
    except subprocess.TimeoutExpired:
        trouble = f"ended after {left:.0f} s, as time was over"
    facts: dict[str, Any] = {"name": case.name, **asdict(case)}
    if result.exists():
        facts = json.loads(result.read_text(encoding="utf-8"))
        result.unlink()
    if trouble:
        facts |= {"status": "failed" if "num_steps" not in facts else "cut short", "reason": trouble}
    return facts


# --- the report ---


TOYS = "Toy models, and predictions for an H200: only to see that the script works."


def line(facts: Mapping[str, Any]) -> str:
    rate = f"{facts['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in facts else ""
    return " ".join(filter(None, [f"{facts['name']}: {facts['status']}", rate, facts.get("reason", "")]))


def markdown(document: Mapping[str, Any]) -> str:
    cases: list[dict[str, Any]] = document["cases"]
    devices = {case["device"] for case in cases if "device" in case}
    lines = [
        f"{document['date']}. {', '.join(sorted(devices))}, Python {document['python']}, torch {document['torch']}. "
        f"Command: `{document['command']}`.",
        *(["", TOYS] if document["tiny"] else []),
        "",
        "| case | batch | state | recompute | tokens/s | MFU | of bf16 peak | step s (fastest to slowest) "
        "| predicted s | error | peak GiB | predicted GiB | error | compile s |",
        "|---|---|---|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    notes = []
    for case in cases:
        if case.get("reason") or case.get("float8"):
            notes.append(
                f"- {case['name']}: "
                + "; ".join(filter(None, [case.get("reason"), case.get("float8", "").replace("\n", "; ")]))
            )
        if "num_steps" not in case:
            continue
        batch = f"{case['num_micro_batches']} × {case['micro_batch_sequences']} × {case['sequence_tokens']}"
        times = f"{case['step_s']:.3f} ({case['fastest_s']:.3f} to {case['slowest_s']:.3f})"
        # The account has the context in it, the allocator's peak has not.
        peak = case["peak_bytes"] + case.get("outside_bytes", 0)
        lines.append(
            f"| {case['name']} | {batch} | {case['optimizer_state']} | {case['recompute']} "
            f"| {case['tokens_per_s']:,.0f} | {_percent(case.get('mfu'))} | {_percent(case.get('mfu_of_bf16'))} "
            f"| {times} "
            f"| {_number(case.get('predicted_step_s'), 3)} | {_error(case.get('predicted_step_s'), case['step_s'])} "
            f"| {peak / 2**30:.2f} | {_number(case.get('predicted_bytes', 0) / 2**30 or None, 2)} "
            f"| {_error(case.get('predicted_bytes'), peak)} | {_number(case.get('compile_s'), 1)} |"
        )
    for case in cases:
        if "attention_s" in case:
            lines += ["", "| attention, forward and backward | ms |", "|---|---:|"]
            for way, took in case["attention_s"].items():
                lines.append(f"| {way} | {took if isinstance(took, str) else f'{1e3 * took:.2f}'} |")
    return "\n".join([*lines, "", *notes, ""])


def _number(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _error(predicted: float | None, measured: float) -> str:
    return "" if not predicted else f"{predicted / measured - 1:+.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="a folder; default: $OUT")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy models: to see that this script works")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all cases together")
    parser.add_argument("--only", nargs="+", help="cases whose names begin with one of these")
    for hidden in ("--case", "--result", "--seconds"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU here; --device cpu --tiny tries the script without one")
    if arguments.case:
        case = next(case for case in CASES if case.name == arguments.case)
        run_case(case, arguments.device, arguments.tiny, Path(arguments.result), float(arguments.seconds))
        return
    if arguments.out is None:
        sys.exit("error: say where the results go: --out DIR, or the variable OUT")
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    done = run_all(arguments, out)
    print(f"\n{(out / 'gpu.md').read_text(encoding='utf-8')}")
    if any(facts["status"] == "failed" for facts in done):
        sys.exit("error: some cases failed; the first lines above say which, and DIR/*.stderr why")


if __name__ == "__main__":
    main()
