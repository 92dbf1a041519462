"""What can be combined: whether a model can be trained under a layout at all. No torch.

Every refusal of the trainer is here, in one place, so that the planner offers nothing that would be refused.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from colossus.errors import ConfigError, did_you_mean
from colossus.spec.context import check_exchange
from colossus.spec.model import ModelSpec
from colossus.spec.parts import MlpSpec, MoeSpec
from colossus.spec.stages import V_SHAPED

if TYPE_CHECKING:
    from colossus.spec.job import Job

RUNNABLE = ("float32", "bfloat16", "fp8")
ZERO_BUBBLE = frozenset({"zb-h1", "zbv", "dualpipev"})
"""Schedules that put weight gradients off."""


def check_job(model: ModelSpec, job: "Job", *, compiled: bool = False) -> None:
    """Raises ConfigError, with what collides and what would work, for what cannot be trained."""
    layout, name = job.layout, model.name
    if job.precision not in RUNNABLE:
        why = {
            "float16": "float16 overflows without a scaled loss, and bfloat16 costs the same",
            "mxfp8": "matmuls in mxfp8 are not built yet",
            "nvfp4": "matmuls in nvfp4 are not built yet",
        }[job.precision]
        raise ConfigError(f"the plan wants {job.precision}: {why}; plan with --fix precision=bfloat16 or fp8")
    for pattern in job.wide_matmuls:
        names = [name.removesuffix(".weight") for name in (p.name for p in model.parameters())]
        if not any(fnmatchcase(one, pattern) for one in names):
            raise ConfigError(
                f"wide_matmuls: nothing of {name} is called {pattern!r}.{did_you_mean(pattern, names)}"
            )
    for what, size in _sizes_over_tp(model):
        if size % layout.tp:
            raise ConfigError(
                f"tp {layout.tp} does not divide {what} of {name}, {size}; tp {_largest(size, layout.tp)} does"
            )
    keys = model.attention.num_kv_heads
    if keys % layout.tp and layout.tp % keys:
        raise ConfigError(
            f"tp {layout.tp} and the {keys} key-value heads of {name}: neither divides the other"
        )
    tokens, parts = job.sequence_tokens, layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
    if tokens % (layout.cp * layout.tp) or (layout.cp > 1 and tokens % (2 * layout.cp)):
        raise ConfigError(
            f"sequences of {tokens:,} tokens are not cut evenly by cp {layout.cp} × tp {layout.tp}; "
            f"{tokens // parts * parts or parts:,} tokens would be"
        )
    if layout.cp > 1:
        if job.context_exchange is None:
            raise ConfigError(
                f"cp is {layout.cp}, and context_exchange says not how ranks see each other's keys"
            )
        check_exchange(model, job.context_exchange, layout.cp, layout.tp)
    _check_experts(model, job)
    if sum(job.stage_layers) != model.num_layers:
        raise ConfigError(
            f"stage_layers has {sum(job.stage_layers)} layers, and {name} has {model.num_layers}"
        )
    if job.schedule in V_SHAPED and model.tied_embeddings and layout.pp > 1:
        raise ConfigError(
            f"{name} ties its head to its embedding, and {job.schedule} would have both on one rank twice; zb-h1 has "
            f"them on two"
        )
    if compiled and job.schedule in ZERO_BUBBLE:
        raise ConfigError(
            f"{job.schedule} puts weight gradients off, which a compiled layer cannot; train with "
            f"--set fixed.compile=false, or plan with --fix schedule=1f1b"
        )


def _check_experts(model: ModelSpec, job: "Job") -> None:
    layout, moe = job.layout, model.mlp
    if not isinstance(moe, MoeSpec):
        if layout.ep > 1 or job.expert_tp > 1:
            raise ConfigError(
                f"{model.name} has no experts: ep {layout.ep} × expert_tp {job.expert_tp} has no use"
            )
        return
    if job.expert_tp not in (1, layout.tp):
        raise ConfigError(f"expert_tp is {job.expert_tp}: it can be 1 or tp, {layout.tp}")
    for what, size, by in (
        ("ep", moe.num_experts, layout.ep),
        ("expert_tp", moe.intermediate_size, job.expert_tp),
        ("ep × expert_tp", layout.stage_ranks, layout.ep * job.expert_tp),
    ):
        if size % by:
            of = {
                "ep": f"the {size} experts of {model.name}",
                "expert_tp": f"the {size:,} inner channels of an expert",
                "ep × expert_tp": f"shard × cp × tp, {size} ranks, which experts fold into",
            }[what]
            raise ConfigError(f"{what} {by} does not divide {of}; {_largest(size, by)} does")


def _sizes_over_tp(model: ModelSpec) -> Iterator[tuple[str, int]]:
    yield "the heads", model.attention.num_heads
    parts = [model.mlp] if model.first_layers is None else [model.mlp, model.first_layers.mlp]
    for part in parts:
        if isinstance(part, MlpSpec):
            yield "the inner channels of the MLP", part.intermediate_size
        elif part.shared is not None:
            yield "the inner channels of the shared MLP", part.shared.intermediate_size


def splits_over_tp(model: ModelSpec, tp: int) -> bool:
    """Whether everything that tp splits comes out even."""
    return all(size % tp == 0 for _, size in _sizes_over_tp(model))


def _largest(size: int, limit: int) -> int:
    return max(n for n in range(1, limit + 1) if size % n == 0)
