"""The physical constants of the estimate: what of the specified rates is reached.

They are fitted once, by `colossus calibrate`, on published measurements, and kept in constants.toml with their
residuals. One name per constant; those that belong to a generation of chips, a precision or a software stack
have it after a dot: `matmul.hopper.bfloat16`, `attention.ampere`, `stack.nemo`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np

from colossus.planner.estimate.columns import Array, Columns


@dataclass(frozen=True, slots=True)
class Constants(Columns):
    """One value for each candidate, or one that all share."""

    matmul: Array
    """Share of the peak that large matmuls reach, in the precision most of them run in."""
    wide_matmul: Array
    """The same in 16 bits."""
    grouped_matmul: Array
    """Rate of a grouped matmul (experts) over that of a plain one."""
    power_exponent: Array
    """Clock under a lower power limit: (limit over the usual)^exponent."""
    output_exposed: Array
    """Share of the traffic of a matmul's result that is not hidden behind its products."""
    wave_quantisation: Array
    """0: the last wave of tiles costs only what is in it; 1: as much as a full one."""
    kernel_s: Array
    """What each matmul costs besides."""
    launch_s: Array
    """Host time to start one layer's kernels, forward and backward."""
    launch_fused: Array
    """The same where kernels are fused or captured in graphs, over that."""
    attention: Array
    """Share of the 16-bit peak that fused attention reaches forward, heads of 128, long sequences."""
    attention_backward: Array
    """Time of its backward over forward (2.5 times the products, at a lower rate)."""
    half_sequence: Array
    """Sequence at which attention reaches half of that rate."""
    half_head: Array
    """Head size at which attention would reach half of the rate of an endless one."""
    score_passes: Array
    """How much more than the least memory traffic unfused attention causes."""
    memory: Array
    """Share of the memory bandwidth that elementwise kernels reach."""
    hidden_passes: Array
    """How often a layer's forward reads or writes the residual stream."""
    unfused: Array
    """Memory traffic of elementwise operations without fusion, over that with."""
    unfused_norm: Array
    """The same for norms and residual sums, which unfused run in 4 bytes."""
    cast_passes: Array
    """Casts to 8 bits: traffic over the least."""
    scale_s: Array
    """What finding and applying scales costs each matmul in 8 bits, whatever its size."""
    scale_up: Array
    nic: Array
    """Share of the links' rates that collectives reach."""
    scattered: Array
    """All-to-all between nodes: share of that."""
    scale_up_latency_s: Array
    nic_latency_s: Array
    tensor_hidden: Array
    """Share of tensor-parallel collectives that runs beside matmuls where they are cut into pieces."""
    context_hidden: Array
    contention: Array
    """Share of the time of a sum or gather of weights that the compute beside it loses: cores, memory, power."""
    expert_hidden: Array
    pipeline_hidden: Array
    """Share of messages between stages that runs beside compute where chunks interleave; else none does."""
    hop_s: Array
    """Host time of one message between stages on different nodes, where the host starts each kernel."""
    bucket_s: Array
    """What each of 16 nodes adds to a sum of 10^9 gradients by way of small buckets, each handed on from node to
    node."""
    expert_passes: Array
    """How often an expert layer reads or writes its routed tokens besides the matmuls: sort, gather, weigh, add."""
    expert_sync_s: Array
    """Per expert layer and pass: waiting until the tokens per expert are known."""
    loss_passes: Array
    """How often the loss reads or writes the logits, in 4 bytes."""
    optimizer_bytes: Array
    """Memory traffic of the optimizer per weight: master weight, two moments, gradient, new weight."""
    step_s: Array
    """Per step: data, clipping, logging, synchronisation."""
    straggler: Array
    """How much longer the step takes for each doubling of the nodes: the slowest sets the pace."""
    stack: Array  # type: ignore[assignment]  # the word for both; records of constants are not stacked
    """How much longer this software's kernels take than those of the reference stack."""

    @classmethod
    def gather(
        cls,
        values: Mapping[str, float],
        generation: Sequence[str],
        precision: Sequence[str],
        stack: Sequence[str],
        kernel: Sequence[str],
    ) -> "Constants":
        """The constants of each candidate; the most particular name that exists counts."""
        keys = list(zip(generation, precision, stack, kernel, strict=True))
        places = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        rows = np.array([places[key] for key in keys])
        table = {
            field.name: np.array([_lookup(values, field.name, *key) for key in places])[rows]
            for field in fields(cls)
        }
        return cls(**table)


WIDE = {"float16": "bfloat16", "bfloat16": "bfloat16", "float32": "float32"}
"""In which 16-bit (or wider) precision the other operations run; default bfloat16."""


def _lookup(
    values: Mapping[str, float], name: str, generation: str, precision: str, stack: str, kernel: str
) -> float:
    own = kernels_of().get(stack, stack) if name == "stack" else stack
    precision = "bfloat16" if precision == "float16" else precision  # the same tensor cores, the same rates
    if name == "wide_matmul":
        name, precision = "matmul", WIDE.get(precision, "bfloat16")
    for key in (
        f"{name}.{generation}.{precision}",
        f"{name}.{generation}.{kernel}",
        f"{name}.{generation}",
        f"{name}.{own}",
        name,
    ):
        if key in values:
            return values[key]
    raise KeyError(f"no constant {name} for {generation}, {precision}, {stack}")


@cache
def kernels_of() -> dict[str, str]:
    """By stack (stacks.toml): whose kernels it runs, which is whose factor `stack` counts for it."""
    import tomllib

    table = tomllib.loads((Path(__file__).parent / "stacks.toml").read_text(encoding="utf-8"))
    return {entry["name"]: entry["kernels"] for entry in table["stack"]}


@cache
def shipped() -> dict[str, float]:
    """The constants that come with Colossus."""
    import tomllib

    table = tomllib.loads((Path(__file__).parent / "constants.toml").read_text(encoding="utf-8"))
    return {name: float(entry["value"]) for name, entry in table["constant"].items()}
