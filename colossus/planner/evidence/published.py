"""Published runs: a table of measurements, read as candidates that the estimate can be set beside.

The columns are those of a table of runs as papers and vendors publish them: model sizes, chip, layout, batch,
precision, recompute, and what was measured. What a row leaves open is filled by stated rules; a row that
cannot be expressed is named with its reason, never dropped in silence.
"""

import csv
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from colossus import zoo
from colossus.errors import ConfigError
from colossus.hardware import catalog
from colossus.planner.estimate.constants import Constants
from colossus.planner.estimate.execution import Execution, Hardware
from colossus.planner.estimate.shape import ModelShape
from colossus.spec.fleet import Node, Precision
from colossus.spec.model import (
    Activation,
    AttentionSpec,
    LayerNormSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
)

NODES = {
    "A100-80": "dgx-a100", "A100-40": "a100-40-hdr", "H100-SXM": "hgx-h100", "H100-HBM2e-96GB-500W": "hgx-h100-500w",
    "H200": "hgx-h200", "H800": "hgx-h800", "B200": "dgx-b200", "B300": "dgx-b300", "GB200": "gb200-nvl72",
    "GB300": "gb300-nvl72", "H20": "hgx-h20", "L40S": "pcie-l40s",
}  # fmt: skip
"""Names of chips as tables write them; other names are looked up in the catalog."""
PRECISIONS: dict[str, Precision] = {
    "bf16": "bfloat16", "fp16": "float16", "fp8": "fp8", "mxfp8": "mxfp8", "nvfp4": "nvfp4", "fp32": "float32",
}  # fmt: skip
UNSTATED = math.nan


@dataclass(frozen=True, slots=True)
class Stack:
    """A training software: facts about what it does (stacks.toml)."""

    name: str
    kernels: str
    match: tuple[str, ...]
    flash: bool
    attention: str
    fused: bool
    few_launches: bool
    overlap_data: bool
    overlap_tensor: bool
    overlap_experts: bool
    sequence_parallel: bool
    interleaves: bool
    one_copy_per_node: bool
    gradient_bytes: int
    expert_tp: str
    sharding: str
    source: str


@cache
def stacks() -> tuple[Stack, ...]:
    import tomllib

    table = tomllib.loads(
        (Path(__file__).parent.parent / "estimate" / "stacks.toml").read_text(encoding="utf-8")
    )
    return tuple(Stack(**{**entry, "match": tuple(entry["match"])}) for entry in table["stack"])


def known_stack(framework: str) -> Stack | None:
    """The stack that a framework's name says, if any does."""
    for stack in stacks():
        if any(re.search(pattern, framework, re.IGNORECASE) for pattern in stack.match):
            return stack
    return None


def stack_of(framework: str) -> Stack:
    """The stack that a framework's name says; an unknown one counts as compiled FSDP."""
    return known_stack(framework) or next(stack for stack in stacks() if stack.name == "fsdp-compiled")


@dataclass(frozen=True, slots=True)
class Run:
    """One row that can be expressed."""

    row: Mapping[str, str]
    model: ModelSpec
    node: Node
    precision: Precision
    stack: Stack
    execution: Execution
    hardware: Hardware
    step_s: float
    """Measured; NaN where only memory or its overflow was published."""
    memory_bytes: float
    """Measured peak; NaN where not published."""
    out_of_memory: bool

    @property
    def num_chips(self) -> int:
        return int(float(self.row["n_gpus"]))

    @property
    def kernel(self) -> str:
        """Family of the attention kernel."""
        return "flash1" if "flash_attentionv1" in self.row.get("notes", "") else self.stack.attention


class Inexpressible(Exception):
    """A row that says too little, or something that no candidate can say."""


REQUIRED = ("id", "model_name", "gpu", "n_gpus", "tp", "pp", "micro_batch", "global_batch_seqs", "seq_len")


def read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
            header = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read the table {path}: {error}") from None
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise ConfigError(
            f"{path} is not a table of runs: it lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}"
        )
    return rows


def run_of(row: Mapping[str, str]) -> Run:
    """One row, expressed. Raises Inexpressible."""
    stack = stack_of(row.get("framework", ""))
    node = _node(row)
    precision = _precision(row, node)
    model = _model(row)
    num_chips = _count(row, "n_gpus")
    tp, pp = _count(row, "tp"), _count(row, "pp")
    cp = _count(row, "cp", default=1)
    if num_chips % (tp * pp * cp):
        raise Inexpressible(f"{num_chips} GPUs are not a multiple of tp {tp} × pp {pp} × cp {cp}")
    data = num_chips // (tp * pp * cp)
    sequences = _count(row, "global_batch_seqs")
    if "LoRA" in row["model_name"]:
        raise Inexpressible("trains adapters on frozen weights")
    micro_batch = _count(row, "micro_batch", default=1)
    micro_batch = max(1, min(micro_batch, sequences // data or 1))
    chunks = _count(
        row, "vpp", default=_default_chunks(row, model, stack, pp, sequences // (data * micro_batch))
    )
    if model.num_layers + 2 < pp * chunks:
        chunks = max(1, model.num_layers // pp)
    moe = isinstance(model.mlp, MoeSpec)
    ep = _count(row, "ep", default=1) if moe else 1
    notes = row.get("notes", "")
    kernel = re.search(r"kernel: ([^;]*)", notes)
    parallel = re.search(r"sequence_parallel: (\S)", notes)
    sharding = _sharding(row.get("fsdp", ""), stack, data)
    numbers = {
        "sequence": _count(row, "seq_len"),
        "micro_batch": micro_batch,
        "micro_batches": max(1.0, sequences / (data * micro_batch)),
        "tp": tp,
        "pp": pp,
        "chunks": chunks,
        "cp": cp,
        "data": data,
        "shard": _shard(row.get("fsdp", ""), data * cp if sharding == 3 else data, node),
        "sharding": sharding,
        "ep": ep,
        "expert_tp": _expert_tp(notes, stack, tp),
        "recompute": _recompute(row),
        "sequence_parallel": stack.sequence_parallel if parallel is None else parallel[1] == "1",
        "flash": stack.flash if kernel is None else "flash" in kernel[1],
        "fused": stack.fused if kernel is None else "RMS" in kernel[1],
        "few_launches": stack.few_launches,
        "score_traffic": 1.0 if kernel is None or kernel[1] != "torch" else 3.0,
        "overlap_data": stack.overlap_data,
        "overlap_tensor": stack.overlap_tensor or "async" in notes.lower(),
        "overlap_experts": stack.overlap_experts,
        "one_copy_per_node": stack.one_copy_per_node,
        "gradient_bytes": stack.gradient_bytes,
    }
    if "Sequence parallelism on" in notes:
        numbers["sequence_parallel"] = 1
    if "eager" in notes:
        numbers["fused"] = numbers["few_launches"] = 0
    speed = _number(row, "interconnect_inter_gbps_per_gpu")
    return Run(
        row=row,
        model=model,
        node=node,
        precision=precision,
        stack=stack,
        execution=Execution(**{name: np.asarray(float(value)) for name, value in numbers.items()}),
        hardware=Hardware.of(
            node,
            precision,
            nic_bandwidth=None if math.isnan(speed) else speed * 1e9 / 8,
        ),
        step_s=_step_s(row, num_chips, sequences),
        memory_bytes=_memory_bytes(row),
        out_of_memory=row.get("tier") == "OOM",
    )


def _number(row: Mapping[str, str], name: str) -> float:
    text = row.get(name, "")
    if not text:
        return UNSTATED
    try:
        value = float(text)
    except ValueError:
        raise Inexpressible(f"{name} is {text!r}, not a number") from None
    if not math.isfinite(value) or value < 0:
        raise Inexpressible(f"{name} is {text}")
    return value


def _count(row: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    value = _number(row, name)
    if math.isnan(value):
        if default is None:
            raise Inexpressible(f"{name} is not published")
        return default
    if value < 1 or value != int(value):
        raise Inexpressible(f"{name} is {row[name]}; it must be a whole number from 1 up")
    return int(value)


def _node(row: Mapping[str, str]) -> Node:
    name = row["gpu"]
    try:
        return catalog.node(NODES[name]) if name in NODES else catalog.node_of_chip(name)
    except ConfigError as error:
        raise Inexpressible(str(error)) from None


def _precision(row: Mapping[str, str], node: Node) -> Precision:
    name = row.get("precision", "").lower()
    if not name and node.chip.generation == "hopper":
        name = "fp8"  # MLPerf rounds that mix FP8 and NVFP4: this generation has only the former
    if name not in PRECISIONS:
        raise Inexpressible("the precision is not published" if not name else f"unknown precision {name!r}")
    precision = PRECISIONS[name]
    if precision not in node.chip.peak_flops:
        raise Inexpressible(f"{node.chip.name} has no {precision}")
    return precision


def zoo_name(name: str) -> str | None:
    """The zoo's name of a published model's: `Llama-3.1-405B-proxy-7L` → `llama3.1-405b`."""
    base = re.sub(r"\s*\(.*\)", "", name).lower().replace(" ", "-")
    base = re.sub(r"-(proxy-\d+l|sft|lora)$", "", base)
    base = re.sub(r"^(llama|olmo|qwen|nemotron)-(\d)", r"\1\2", base)
    known = zoo.names()
    for candidate in (base, re.sub(r"-\d+[bt]$", "", base)):
        if candidate in known:
            return candidate
    longer = [candidate for candidate in known if candidate.startswith(f"{base}-a")]  # qwen3-235b-a22b
    return longer[0] if len(longer) == 1 else None


@cache
def _found(name: str) -> ModelSpec:
    return zoo.find(name)


def _model(row: Mapping[str, str]) -> ModelSpec:
    """The zoo's model where the name is one of its, with the row's layers and vocabulary; else from the columns."""
    name = row["model_name"]
    known = zoo_name(name)
    layers, vocab = _number(row, "n_layers"), _number(row, "vocab")
    if known is not None:
        found = _found(known)
        changes: dict[str, Any] = {}
        if not math.isnan(layers) and layers != found.num_layers:
            changes["num_layers"] = int(layers)
            if found.first_layers is not None and layers <= found.first_layers.num_layers:
                changes["first_layers"] = None
        if not math.isnan(vocab):
            changes["vocab_size"] = int(vocab)
        return found.model_copy(update=changes) if changes else found
    if row.get("family") in ("hybrid-mamba", "mamba") or re.search(
        r"nemotron[-_]?(h|3)", name, re.IGNORECASE
    ):
        raise Inexpressible("state-space layers")
    return _model_of_columns(row)


def _model_of_columns(row: Mapping[str, str]) -> ModelSpec:
    hidden, layers = _count(row, "hidden"), _count(row, "n_layers")
    heads = _count(row, "n_heads", default=max(1, hidden // 128))
    kv_heads = _count(row, "n_kv_heads", default=heads)
    gated = row.get("family") in ("llama", "moe")
    default = 256 * math.ceil(hidden * 8 / 3 / 256) if gated else 4 * hidden
    ffn = _count(row, "ffn_hidden", default=default)
    if hidden % heads or heads % kv_heads:
        heads = kv_heads = max(1, hidden // 128)
    activation: Activation = "swiglu" if gated else "gelu"
    experts = _number(row, "n_experts")
    mlp: MlpSpec | MoeSpec = MlpSpec(intermediate_size=ffn, activation=activation)
    if experts > 1:
        mlp = MoeSpec(
            num_experts=int(experts),
            top_k=_count(row, "top_k"),
            intermediate_size=ffn,
            activation=activation,
        )
    return ModelSpec(
        name=re.sub(r"[^a-z0-9.]+", "-", row["model_name"].lower()).strip("-") or "model",
        vocab_size=_count(row, "vocab", default=_default_vocab(row)),
        context_tokens=_count(row, "seq_len"),
        num_layers=layers,
        hidden_size=hidden,
        attention=AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=hidden // heads, rope=None),
        mlp=mlp,
        norm=NormSpec() if gated else LayerNormSpec(),
        tied_embeddings=not gated,
    )


def _default_vocab(row: Mapping[str, str]) -> int:
    """InternLM's tokenizer has 103,168 tokens (its published configurations); else GPT-2's."""
    return 103_168 if row["model_name"].lower().startswith("internlm-") else 50_257


def _default_chunks(
    row: Mapping[str, str], model: ModelSpec, stack: Stack, pp: int, micro_batches: int
) -> int:
    """Virtual stages where the table does not say: as many as there are layers for, up to 12, where the software
    interleaves by default and a plain schedule would idle for more than a tenth of the step; else none. Software
    that nothing is known of is taken to: what trains in such pipelines does (arXiv:2407.21783, section 3.3.2)."""
    unknown = known_stack(row.get("framework", "")) is None
    interleaves = stack.interleaves or unknown or "interleaved 1f1b" in row.get("notes", "").lower()
    if not interleaves or pp == 1 or (pp - 1) / micro_batches < 0.1:
        return 1
    per_stage = [
        chunks
        for chunks in range(2, 13)
        if model.num_layers % (pp * chunks) == 0 or (model.num_layers + 2) % (pp * chunks) == 0
    ]
    return max(per_stage, default=1)


def _sharding(text: str, stack: Stack, data: int) -> int:
    lower = text.lower()
    levels = (
        (3, ("zero-3", "full", "fsdp", "hsdp")),
        (2, ("zero-2", "grad_op")),
        (1, ("zero-1", "optimizer")),
        (0, ("ddp", "dp")),
    )
    for level, words in levels:
        if any(word in lower for word in words):
            return level
    return ("none", "optimizer", "gradients", "weights").index(stack.sharding)


def _shard(text: str, data: int, node: Node) -> int:
    """Ranks that share one copy: as said ("FSDP=128 x DP=4", "8-way", "within 4 GPUs"), or all."""
    stated = re.search(r"(?:FSDP=|FSDP |FSDP2 |within )(\d+)", text)
    if "shard in node" in text:
        return min(data, node.num_chips)
    if stated and data % int(stated[1]) == 0:
        return int(stated[1])
    return data


def _expert_tp(notes: str, stack: Stack, tp: int) -> int:
    stated = re.search(r"ETP[^=]*= ?(\d+)", notes)
    if stated:
        return int(stated[1])
    return tp if stack.expert_tp == "tensor" else 1


def _recompute(row: Mapping[str, str]) -> int:
    text = row.get("recompute", "").lower()
    if "op-level" in text or "every other" in text:
        return 2
    if "selective" in text and "fms" in row.get("framework", "").lower():
        return 2  # fms-fsdp's "selective" leaves out whole layers, every other one
    if "full" in text:
        return 3
    return 1 if "selective" in text else 0


def _step_s(row: Mapping[str, str], num_chips: int, sequences: int) -> float:
    step_s = _number(row, "metric_step_time_s")
    if step_s > 0:
        return step_s
    rate = _number(row, "metric_tokens_per_gpu_s")
    if rate > 0:
        return sequences * _number(row, "seq_len") / (rate * num_chips)
    return UNSTATED


def _memory_bytes(row: Mapping[str, str]) -> float:
    """What nvidia-smi prints as MiB is often told as GB of a thousand of them (the BLOOM chronicles)."""
    gib = _number(row, "metric_memory_gib")
    return gib * (1000 * 2**20 if "GB/GiB" in row.get("notes", "") else 2**30)


@dataclass(frozen=True, slots=True)
class Table:
    """Runs as columns."""

    runs: Sequence[Run]
    shape: ModelShape
    execution: Execution
    hardware: Hardware
    step_s: np.ndarray[Any, Any]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Table":
        shapes: dict[int, ModelShape] = {}
        for run in runs:
            shapes.setdefault(id(run.model), ModelShape.of(run.model))
        return cls(
            runs=runs,
            shape=ModelShape.stack([shapes[id(run.model)] for run in runs]),
            execution=Execution.stack([run.execution for run in runs]),
            hardware=Hardware.stack([run.hardware for run in runs]),
            step_s=np.array([run.step_s for run in runs]),
        )

    def constants(self, values: Mapping[str, float]) -> Constants:
        return Constants.gather(
            values,
            [run.node.chip.generation for run in self.runs],
            [run.precision for run in self.runs],
            [run.stack.name for run in self.runs],
            [run.kernel for run in self.runs],
        )

    def choose(self, keep: Callable[[Run], bool]) -> "Table":
        rows = np.array([i for i, run in enumerate(self.runs) if keep(run)], dtype=int)
        return Table(
            [self.runs[i] for i in rows],
            self.shape.take(rows),
            self.execution.take(rows),
            self.hardware.take(rows),
            self.step_s[rows],
        )
