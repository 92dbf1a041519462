"""The space that a search is exact over: which layouts a model and a fleet allow.

Axis sizes multiply out by construction. A layout here is what all replica groups share; micro-batch and
recompute, which may differ from pool to pool, are options beside it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import get_args

import numpy as np
import numpy.typing as npt

from colossus.errors import ConfigError, did_you_mean
from colossus.planner.estimate.columns import Array, Columns
from colossus.planner.estimate.execution import RECOMPUTE, SHARDING
from colossus.planner.schedule.order import SCHEDULES
from colossus.spec.compose import splits_over_tp
from colossus.spec.fleet import Pool, Precision
from colossus.spec.goal import Goal
from colossus.spec.model import ModelSpec
from colossus.spec.parts import MoeSpec
from colossus.spec.plan import Float8
from colossus.spec.run import OPTIMIZERS

PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "bfloat16", "fp8", "mxfp8", "nvfp4")
MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 16)
RECOMPUTE_OPTIONS = ("none", "alternate", "full")
"""`selective` repeats attention scores, which fused attention never keeps."""
MAX_STAGES, MAX_CHUNKS, MAX_SHARD, MAX_CONTEXT = 64, 16, 2048, 64
LEAST_TOKENS_PER_CONTEXT_RANK = 512
FIXABLE = (
    "tp", "pp", "cp", "ep", "expert_tp", "shard", "sharding", "schedule", "virtual_stages", "precision",
    "micro_batch", "recompute", "optimizer", "optimizer_state", "replica_sum", "float8", "wide_matmuls",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layouts(Columns):
    """What all replica groups of a candidate share."""

    tp: Array
    pp: Array
    chunks: Array
    cp: Array
    ep: Array
    expert_tp: Array
    shard: Array
    sharding: Array
    """Index into SHARDING."""
    schedule: Array
    """Index into SCHEDULES."""
    precision: Array
    """Index into PRECISIONS."""
    part: Array
    """Share of the fleet's replica groups that run: 1, ½, ¼ …; less than 1 where time is not all that counts."""

    def __len__(self) -> int:
        return len(self.tp)

    @property
    def group_ranks(self) -> Array:
        return self.tp * self.pp * self.cp * self.shard


@dataclass(frozen=True, slots=True)
class Options:
    """Micro-batch and recompute of a pool's groups: arrays of one length."""

    micro_batch: Array
    recompute: Array


def powers_of_two(limit: float) -> list[int]:
    return [2**i for i in range(int(math.log2(max(limit, 1))) + 1)]


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def check_fixed(goal: Goal) -> dict[str, str]:
    """The fixed choices as text, by name. Raises ConfigError for a name or a word that does not exist."""
    words: dict[str, Sequence[str]] = {
        "sharding": SHARDING, "schedule": SCHEDULES, "precision": PRECISIONS, "recompute": RECOMPUTE,
        "optimizer": tuple(OPTIMIZERS), "optimizer_state": ("float32", "bfloat16"),
        "replica_sum": ("float32", "bfloat16"), "float8": get_args(Float8),
    }  # fmt: skip
    fixed = {}
    for name, value in goal.fixed.items():
        if name == "replica":
            raise ConfigError(
                f"--fix replica={value}: replica groups are not chosen, they follow: as many as the fleet has room for "
                f"at pp × shard × cp × tp chips each; fix those"
            )
        if name not in FIXABLE:
            raise ConfigError(
                f"--fix {name}={value}: a plan has no choice {name!r}.{did_you_mean(name, FIXABLE)}"
            )
        if name in words and str(value) not in words[name]:
            raise ConfigError(f"--fix {name}={value} cannot be.{did_you_mean(str(value), words[name])}")
        if name not in (*words, "wide_matmuls") and not isinstance(value, int):
            raise ConfigError(f"--fix {name}={value} cannot be: {name} is a number from 1 up")
        fixed[name] = str(value)
    return fixed


def options(goal: Goal, sequences: int) -> Options:
    """Every micro-batch and recompute that may be chosen for a pool."""
    fixed = check_fixed(goal)
    micro_batches = [n for n in MICRO_BATCHES if n <= sequences]
    if "micro_batch" in fixed:
        micro_batches = [int(fixed["micro_batch"])]
        if micro_batches[0] > sequences:
            raise ConfigError(
                f"--fix micro_batch={micro_batches[0]} is more than the largest global batch, {sequences} sequences"
            )
    recompute = [fixed["recompute"]] if "recompute" in fixed else RECOMPUTE_OPTIONS
    grid = [(float(n), float(RECOMPUTE.index(name))) for n in micro_batches for name in recompute]
    return Options(np.array([n for n, _ in grid]), np.array([r for _, r in grid]))


def layouts(model: ModelSpec, pools: Sequence[Pool], goal: Goal, sequence: int, sequences: int) -> Layouts:
    """Every layout of the space. `pools` are what can be used (spares taken out), `sequences` the largest batch.

    Raises ConfigError where a fixed choice leaves nothing, naming what could be chosen instead.
    """
    fixed = check_fixed(goal)
    precisions = _precisions(pools, fixed)
    parts = _parts(goal, pools)
    sharding = [i for i, name in enumerate(SHARDING) if fixed.get("sharding", name) == name]
    rows: list[tuple[float, ...]] = []
    largest = max(pool.num_chips for pool in pools)
    for tp, pp, cp in _dense_axes(model, pools, sequence, largest, fixed):
        for schedule, chunks in _schedules(model.num_layers, pp, fixed, tied=model.tied_embeddings):
            for shard in _shards(largest // (tp * pp * cp), fixed):
                if not all(_fills_nodes(tp * pp * cp * shard, pool) for pool in pools):
                    continue
                for ep, expert_tp in _expert_axes(model, tp, shard * cp * tp, fixed):
                    rows += [
                        (tp, pp, chunks, cp, ep, expert_tp, shard, level, schedule, precision, part)
                        for level in sharding
                        if shard > 1 or level == 0 or len(sharding) == 1
                        for precision in precisions
                        for part in parts
                    ]
    if not rows:
        choice = ", ".join(f"{name}={value}" for name, value in fixed.items()) or "this fleet"
        raise ConfigError(
            f"no layout of {model.name} ({model.num_layers} layers, {model.attention.num_heads} heads) on "
            f"{sum(pool.num_chips for pool in pools):,} chips goes with {choice}: tp must divide the heads and stay "
            f"in one NVLink domain, pp × virtual stages must divide the layers evenly (or but for one at each end), "
            f"and tp × pp × cp × shard must fill whole nodes and fit into the fleet"
        )
    columns = np.array(rows, dtype=np.float64).T
    return Layouts(**{field.name: columns[i] for i, field in enumerate(fields(Layouts))})


def _precisions(pools: Sequence[Pool], fixed: dict[str, str]) -> list[int]:
    """What all chips can run: 16 bits and the widest of 8; 32 bits only where there is nothing narrower."""
    common = [name for name in PRECISIONS if all(name in pool.chip.peak_flops for pool in pools)]
    if "precision" in fixed:
        if fixed["precision"] not in common:
            raise ConfigError(
                f"--fix precision={fixed['precision']} cannot be: all chips of the fleet can run {', '.join(common)}"
            )
        return [PRECISIONS.index(common[common.index(fixed["precision"])])]
    usual = [name for name in common if name in ("bfloat16", "fp8")] or common[:1]
    if not usual:
        raise ConfigError("the pools have no precision in common; plan for one of them")
    return [PRECISIONS.index(name) for name in usual]


def _parts(goal: Goal, pools: Sequence[Pool]) -> list[float]:
    only_time = goal.objective == "time" and goal.budget_usd is None
    if only_time or len(pools) > 1:
        return [1.0]
    return [1.0 / n for n in powers_of_two(max(pool.num_chips for pool in pools))]


def _dense_axes(
    model: ModelSpec, pools: Sequence[Pool], sequence: int, largest: int, fixed: dict[str, str]
) -> Iterator[tuple[int, int, int]]:
    attention = model.attention
    domain = min(pool.node.scale_up_chips for pool in pools)
    tps = [
        n
        for n in divisors(attention.num_heads)
        if n <= domain
        and (attention.num_kv_heads % n == 0 or n % attention.num_kv_heads == 0)
        and all(pool.node.scale_up_chips % n == 0 for pool in pools)
        and splits_over_tp(model, n)
    ]
    layers = model.num_layers
    stages = {*divisors(layers), *divisors(layers + 2), *powers_of_two(layers)}
    contexts = [
        n for n in powers_of_two(MAX_CONTEXT) if n == 1 or sequence / n >= LEAST_TOKENS_PER_CONTEXT_RANK
    ]
    for tp in _fix("tp", tps, fixed):
        for pp in _fix("pp", sorted(n for n in stages if n <= min(layers, MAX_STAGES)), fixed):
            for cp in _fix("cp", [n for n in contexts if sequence % (2 * n) == 0 or n == 1], fixed):
                if tp * pp * cp <= largest and sequence % (tp * cp) == 0:
                    yield tp, pp, cp


def _fix(name: str, values: list[int], fixed: dict[str, str]) -> list[int]:
    if name not in fixed:
        return values
    wanted = int(fixed[name])
    if wanted not in values:
        raise ConfigError(
            f"--fix {name}={wanted} cannot be; this model on this fleet allows {', '.join(map(str, values))}"
        )
    return [wanted]


def _schedules(layers: int, pp: int, fixed: dict[str, str], *, tied: bool) -> Iterator[tuple[int, int]]:
    """(schedule, virtual stages per rank). V-shaped ones would have a tied embedding on one rank twice."""

    def even(chunks: int) -> bool:
        return layers % (pp * chunks) == 0 or (layers + 2) % (pp * chunks) == 0

    shapes: list[tuple[str, int]] = [("none", 1)] if pp == 1 else [("1f1b", 1), ("zb-h1", 1)]
    if pp > 1:
        if fixed.get("schedule") == "gpipe":
            shapes.append(("gpipe", 1))
        shapes += [("interleaved", v) for v in range(2, MAX_CHUNKS + 1) if pp * v <= layers + 2 and even(v)]
        if pp * 2 <= layers and even(2):
            shapes += [] if tied else [("zbv", 2), ("dualpipev", 2)]
    for name, chunks in shapes:
        if fixed.get("schedule", name) == name and fixed.get("virtual_stages", str(chunks)) == str(chunks):
            yield SCHEDULES.index(name), chunks


def _shards(most: int, fixed: dict[str, str]) -> list[int]:
    if "shard" in fixed:
        wanted = int(fixed["shard"])
        return [wanted] if wanted <= most else []
    values = powers_of_two(min(most, MAX_SHARD))
    return [*values, most] if most <= 16 and most not in values else values


def _expert_axes(
    model: ModelSpec, tp: int, foldable: int, fixed: dict[str, str]
) -> Iterator[tuple[int, int]]:
    """(ep, ranks per expert): experts fold into shard × cp × tp."""
    if not isinstance(model.mlp, MoeSpec):
        if fixed.get("ep", "1") == "1" and fixed.get("expert_tp", "1") in ("1", str(tp)):
            yield 1, 1
        return
    for expert_tp in sorted({1, tp}):
        for ep in divisors(model.mlp.num_experts):
            wanted = fixed.get("ep", str(ep)) == str(ep) and fixed.get("expert_tp", str(expert_tp)) == str(
                expert_tp
            )
            if wanted and ep * expert_tp <= foldable and foldable % (ep * expert_tp) == 0:
                yield ep, expert_tp


def _fills_nodes(group: int, pool: Pool) -> bool:
    """A group takes whole nodes, or a node takes whole groups: nodes are what fails and is replaced."""
    chips = pool.node.num_chips
    return group % chips == 0 or chips % group == 0


Indices = npt.NDArray[np.intp]
