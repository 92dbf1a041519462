"""The parts that a step's time and a rank's memory are made of: what each is, and what would make it smaller."""

from collections.abc import Mapping
from dataclasses import dataclass

from colossus.spec.plan import Plan


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a step, or of memory."""

    label: str
    what: str
    remedy: str = ""
    """What would make it smaller, to follow on "Less of it:"."""


STEP_PARTS: Mapping[str, Part] = {
    "matmul": Part("matmuls", "products with the weights of attention projections and MLPs, forward and backward"),
    "attention": Part(
        "attention", "scores, softmax and weighted values, forward and backward",
        "shorter sequences, or windows in some layers",
    ),
    "experts": Part(
        "experts", "grouped matmuls of the experts, routing, and sorting tokens by expert",
        "more tokens per expert: a larger micro-batch or fewer ranks per expert",
    ),
    "elementwise": Part(
        "elementwise", "norms, activations, rotations and residual sums, which wait for memory",
        "fused kernels, or sequence parallelism over tp",
    ),
    "head": Part(
        "head", "logits, loss and their gradients, as far as they lengthen the slowest stage",
        "fewer layers on the last stage",
    ),
    "recompute": Part(
        "recompute", "what the backward pass computes again because it was not kept",
        "room for activations: more pp, tp or shard, a smaller micro-batch, or chips with more memory",
    ),
    "launch": Part(
        "launch", "waiting for the host to start kernels", "larger micro-batches, less tp, compiled kernels or graphs"
    ),
    "tensor": Part(
        "tp network", "collectives of tensor parallelism that nothing hides",
        "less tp, or collectives that run beside matmuls",
    ),
    "context": Part(
        "cp network", "keys and values passed around the cp ranks that nothing hides", "less cp, or shorter sequences"
    ),
    "expert": Part(
        "ep network", "tokens on their way to experts and back that nothing hides",
        "less ep, ep within the NVLink domain, or transfers beside another micro-batch's compute",
    ),
    "shard": Part(
        "shard network", "weights gathered and gradients scattered over the shard axis that nothing hides",
        "larger micro-batches, or a lower sharding stage",
    ),
    "data": Part(
        "data network", "the sum of gradients over all replicas, and new weights back, as far as nothing hides it",
        "more tokens per step, or gradients in 2 bytes",
    ),
    "pipeline": Part(
        "pp network", "activations sent from stage to stage that nothing hides", "fewer stages or virtual stages"
    ),
    "bubble": Part(
        "bubble", "stages that wait while the pipeline fills and drains",
        "more micro-batches per step, more virtual stages, or less pp",
    ),
    "optimizer": Part("optimizer", "the update of the weights", "the optimizer's state split over more ranks"),
    "straggler": Part(
        "stragglers", "all wait for the slowest: it grows with the logarithm of the number of nodes",
        "slow nodes found early and taken out",
    ),
    "fixed": Part("fixed", "per step, whatever its size: data, clipping, logging", "more tokens per step"),
}  # fmt: skip
"""By the names of a step's parts without their unit."""

NETWORK_PARTS = ("tensor", "context", "expert", "shard", "data", "pipeline")

MEMORY_PARTS: Mapping[str, Part] = {
    "weights": Part("weights", "what matmuls read", "more tp, pp, or sharded weights"),
    "gradients": Part("gradients", "sums over the step's micro-batches", "more tp, pp, or sharded gradients"),
    "optimizer": Part(
        "optimizer", "moments, and the float32 copy of the weights", "more shards, or state in fewer bytes"
    ),
    "activations": Part(
        "activations", "kept from forward to backward by all micro-batches in flight",
        "a smaller micro-batch, more recompute, more tp or cp",
    ),
    "attention": Part("scores", "attention scores, where attention is not fused", "a fused attention kernel"),
    "loss": Part("loss", "logits and their gradient, where they are what lives at the peak", "a loss in pieces"),
    "gathered": Part("gathered", "weights and gradients that are whole for a while though sharded", "more tp"),
    "communication": Part("buffers", "of the collectives, and of the communicators themselves"),
    "workspace": Part("workspace", "one layer's backward pass, or the optimizer's copies"),
    "fragmentation": Part("fragments", "reserved by the allocator, and in no tensor"),
    "context": Part("context", "the device's context and libraries"),
}  # fmt: skip
"""By the names of memory's parts without their unit."""


def bare(name: str) -> str:
    """A part's name without its unit: `bubble_s` → `bubble`, `weights_bytes` → `weights`."""
    return name.removesuffix("_s").removesuffix("_bytes")


def step_parts(plan: Plan) -> dict[str, float]:
    """Seconds of the likely step by bare name, those above zero, the largest first."""
    found = {bare(name): seconds for name, seconds in plan.estimate.step_parts_s.items() if seconds > 0}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def step_part(name: str) -> Part:
    """What a part of a step is, by its bare name."""
    return STEP_PARTS.get(name, Part(name, "a part of the step"))


def memory_part(name: str) -> Part:
    """What a part of memory is, by its bare name."""
    return MEMORY_PARTS.get(name, Part(name, "a part of memory"))
