"""The plan for one rank: a whole model on one chip."""

from colossus.errors import ConfigError
from colossus.planner.one_rank.memory import step_memory
from colossus.spec.layout import Layout
from colossus.spec.model import Dtype, ModelSpec, MoeSpec
from colossus.spec.rank import Machine, RankEstimate, RankPlan
from colossus.spec.run import RunConfig
from colossus.units import format_bytes, format_seconds

LOGITS_IN_CACHE_BYTES = 2 * 2**20
"""A chunk's float32 logits should stay in a core's cache between the passes over them."""
LOGITS_ON_GPU_BYTES = 2**30
"""A chunk's float32 logits on a GPU: 2,048 tokens of a vocabulary of 128,000."""
MEMORY_TO_USE = 0.9
"""Share of the machine's memory that a plan may fill."""
ASSUMED_MFU = 0.5
"""Assumed before anything has been measured, only to weigh compiling against the length of a run."""
COMPILE_GAIN = 0.15
"""Share of step time that compiling saved on 2-layer to 8-layer models (measured, docs/LOG.md)."""
COMPILE_S = 40.0
"""What compiling costs the first time, and with kernels cached from an earlier run (measured, same place)."""
COMPILE_CACHED_S = 5.0

_ASKED_FOR = "asked for by the configuration's [fixed]"


def plan_one_rank(config: RunConfig, machine: Machine) -> RankPlan:
    """The plan for `config` on one chip of `machine`, each choice with its reason.

    Raises ConfigError when not even one sequence at a time fits the memory.
    """
    model, batch = config.model, config.batch
    machine = _machine_for(model, machine)
    reasons: dict[str, str] = {}
    dtype = _dtype(config, machine, reasons)
    chunk = loss_chunk_tokens(model, batch.tokens, machine.kind)
    room = "which stays in cache" if machine.kind == "cpu" else "little beside the rest"
    reasons["loss_chunk_tokens"] = (
        f"{chunk} tokens × {model.vocab_size} logits × 4 bytes = {format_bytes(4 * chunk * model.vocab_size)}, "
        f"{room}; all {batch.tokens} at once would be {format_bytes(4 * batch.tokens * model.vocab_size)}"
    )
    micro_batch = _micro_batch(config, machine, dtype, chunk, reasons)
    flops = model.flops_per_token(batch.sequence_tokens) * batch.tokens
    step_time_s = flops / (ASSUMED_MFU * machine.matmul_flops[dtype])
    return RankPlan(
        layout=Layout(),
        machine=machine,
        micro_batch_sequences=micro_batch,
        num_micro_batches=batch.sequences // micro_batch,
        sequence_tokens=batch.sequence_tokens,
        dtype=dtype,
        compile=_compile(config, machine, step_time_s, reasons),
        loss_chunk_tokens=chunk,
        estimate=RankEstimate(
            memory=step_memory(config, machine, dtype, micro_batch, chunk),
            flops_per_step=flops,
            step_time_s=step_time_s,
        ),
        reasons=reasons,
    )


def loss_chunk_tokens(model: ModelSpec, tokens: int, kind: str, *, tp: int = 1) -> int:
    """Tokens whose logits stand in memory at once: on a CPU as fit its cache, on a GPU as keep it busy."""
    room = LOGITS_IN_CACHE_BYTES if kind == "cpu" else LOGITS_ON_GPU_BYTES
    return max(32, min(tokens, room * tp // (4 * model.vocab_size)))


def _machine_for(model: ModelSpec, machine: Machine) -> Machine:
    """The machine with the library that suits the model.

    oneDNN makes a kernel for each shape of matmul and keeps up to 1024 of them. An expert's rows differ in number at
    every step: measured on mixtures of 7 and 14 million parameters in float32, that took 250 to 350 MB within four
    steps, and saved no time.
    """
    if not any(isinstance(group.mlp, MoeSpec) for group in model.layer_groups()):
        return machine
    return machine.model_copy(update={"float32_library": "default"})


def _dtype(config: RunConfig, machine: Machine, reasons: dict[str, str]) -> Dtype:
    if config.fixed.dtype is not None:
        reasons["dtype"] = _ASKED_FOR
        return config.fixed.dtype
    fastest = max(machine.matmul_flops, key=lambda dtype: machine.matmul_flops[dtype])
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in machine.matmul_flops.items())
    reasons["dtype"] = (
        f"{fastest} matmuls are the fastest here (measured GFLOP/s: {rates}); weights stay float32"
    )
    return fastest


def _micro_batch(
    config: RunConfig, machine: Machine, dtype: Dtype, chunk: int, reasons: dict[str, str]
) -> int:
    """The largest divisor of the batch that fits."""
    limit = MEMORY_TO_USE * machine.memory_bytes
    sequences = config.batch.sequences
    fixed = config.fixed.micro_batch_sequences
    divisors = [n for n in range(sequences, 0, -1) if sequences % n == 0]
    for micro_batch in divisors if fixed is None else [fixed]:
        needed = step_memory(config, machine, dtype, micro_batch, chunk).total_bytes
        if needed <= limit:
            reasons["micro_batch_sequences"] = (
                f"{'' if fixed is None else 'asked for; '}{micro_batch} of {sequences} at once need "
                f"{format_bytes(needed)} of {format_bytes(machine.memory_bytes)}"
            )
            return micro_batch
    smallest = fixed or 1
    memory = step_memory(config, machine, dtype, smallest, chunk)
    parts = ", ".join(
        f"{name.removesuffix('_bytes')} {format_bytes(size)}" for name, size in memory.model_dump().items()
    )
    raise ConfigError(
        f"{config.model.name} does not fit this machine: a micro-batch of {smallest} × "
        f"{config.batch.sequence_tokens} tokens needs {format_bytes(memory.total_bytes)}, and a plan may fill "
        f"{format_bytes(limit)} of {format_bytes(machine.memory_bytes)} ({parts}); take a smaller model or shorter "
        f"sequences"
    )


def _compile(config: RunConfig, machine: Machine, step_time_s: float, reasons: dict[str, str]) -> bool:
    if config.fixed.compile is not None:
        reasons["compile"] = _ASKED_FOR
        return config.fixed.compile
    budget = config.budget
    length_s = budget.amount if budget.on_the_clock else (config.total_steps() or 0) * step_time_s
    cost_s = COMPILE_CACHED_S if machine.compiled_before else COMPILE_S
    saved_s = length_s * COMPILE_GAIN
    pays = saved_s > 2 * cost_s
    reasons["compile"] = (
        f"compiling costs about {cost_s:.0f} s{' (cached kernels)' if machine.compiled_before else ''} and saves about "
        f"{COMPILE_GAIN:.0%} of {format_seconds(length_s)}: {'it pays' if pays else 'it does not clearly pay'}"
    )
    return pays
