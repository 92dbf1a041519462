"""Memory of a training step on its fullest rank, for any number of candidates at once.

Counted by liveness: what a rank holds all the time (weights, gradients, optimizer), the activations of the
micro-batches in flight on a stage, and the largest of what lives only for a moment (one layer's backward, the
logits and their gradient, the optimizer's copies). The first, a middle and the last stage are counted and the
fullest is given. What cannot be counted is in memory_constants.toml.

Sources: activations of a layer and what recompute keeps of them, arXiv:2205.05198; micro-batches in flight
under (interleaved) 1F1B, arXiv:2104.04473; sharding, arXiv:1910.02054.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from colossus.errors import ConfigError
from colossus.planner.estimate.columns import Array, Columns
from colossus.planner.estimate.execution import RECOMPUTE, SHARDING, Execution
from colossus.planner.estimate.shape import ModelShape
from colossus.planner.estimate.step import stage_layers

Stage = Literal["fullest", "first", "middle", "last"]
STAGES: Final = ("first", "middle", "last")
LEAST_STAGES: Final = {"last": 0.0, "first": 1.0, "middle": 2.0, "late": 3.0}
"""A pipeline has such a stage if it has more than so many. `late` is the last of the middle ones, which has experts
where the first of them still has dense layers."""
NONE, SELECTIVE, ALTERNATE, FULL = range(len(RECOMPUTE))
OPTIMIZER, GRADIENTS, WEIGHTS = (SHARDING.index(name) for name in SHARDING[1:])
ELEMENT_BYTES: Final = 2.0
"""Of activations, and of weights as matmuls read them; what 8-bit matmuls read besides is in `Held`."""


@dataclass(frozen=True, slots=True)
class MemoryParts(Columns):
    """Bytes on the fullest rank; the parts add up to the peak as the device's tools show it."""

    weights_bytes: Array
    gradients_bytes: Array
    optimizer_bytes: Array
    activations_bytes: Array
    """Kept from forward to backward by all micro-batches in flight."""
    attention_bytes: Array
    """Scores, kept likewise where attention is not fused."""
    loss_bytes: Array
    """Logits and their gradient, where they are what lives at the peak."""
    gathered_bytes: Array
    """Weights and gradients that are whole for a while though sharded."""
    communication_bytes: Array
    """Collectives' buffers, and the communicators' own."""
    workspace_bytes: Array
    """Gradients inside one layer and what is recomputed of it, or the optimizer's copies."""
    fragmentation_bytes: Array
    """Reserved by the allocator and in no tensor."""
    context_bytes: Array
    """The device's context and libraries."""

    @property
    def total_bytes(self) -> Array:
        return np.asarray(sum(getattr(self, field.name) for field in fields(self)))

    @property
    def needed_bytes(self) -> Array:
        """What a chip must have: without what the allocator only caches, which it gives back before it fails."""
        return np.asarray(self.total_bytes - self.fragmentation_bytes)

    @property
    def reserved_bytes(self) -> Array:
        """As torch.cuda.max_memory_reserved counts: without context and communicators."""
        return np.asarray(self.total_bytes - self.context_bytes - self.communication_bytes)

    @property
    def allocated_bytes(self) -> Array:
        """As torch.cuda.max_memory_allocated counts: in tensors."""
        return np.asarray(self.reserved_bytes - self.fragmentation_bytes)


@dataclass(frozen=True, slots=True)
class Held(Columns):
    """What a software holds: bytes per weight, bytes per logit, buffers.

    `of` says what follows from an Execution; `of_stacks` also what is known of stacks by name.
    """

    weight: Array
    gradient: Array
    optimizer: Array
    """Moments, and the float32 copy where weights are held in 16 bits."""
    step: Array
    """While the optimizer steps: gradients as float32, of the rank's own share."""
    narrow: Array
    """Cached 8-bit copies of a weight; Transformer Engine keeps one and its transpose (2) where weights stay
    in 16 bits."""
    logit: Array
    """Logits, their softmax and their gradient; 0 where the loss is computed in pieces."""
    whole_logits: Array
    """1 where each tensor-parallel rank gathers the logits of the whole vocabulary."""
    buckets_bytes: Array
    """Buffers in which gradients and weights travel between data-parallel ranks."""

    @classmethod
    def of(cls, execution: Execution) -> "Held":
        """Fully sharded: float32 weights, gradients and moments (4 + 4 + 8). Else 16-bit weights (2), gradients
        as they are summed (Megatron's float32 buffer 4, else 2), copy and moments (12). Muon has one in place of two
        moments; its few weights that take AdamW are taken for others.

        The loss: PyTorch's casts logits to float32 first; vocabulary-parallel cross-entropy does so in place, and
        overwrites them with their gradient where it is fused.
        """
        x, c = execution, memory_constants()
        full = x.sharding == WEIGHTS
        zero = 0.0 * x.sharding
        moments = (2.0 - x.muon) * x.state_bytes
        return cls(
            weight=np.where(full, 4.0, 2.0),
            gradient=np.where(full, 4.0, x.gradient_bytes),
            optimizer=np.where(full, moments, 4.0 + moments),
            step=np.where(full | (x.gradient_bytes >= 4.0), 0.0, 4.0),
            narrow=zero,
            logit=np.where(
                full, c["logit.cast"], np.where(x.few_launches > 0, c["logit.fused"], c["logit.parallel"])
            ),
            whole_logits=zero,
            buckets_bytes=zero,
        )

    @classmethod
    def of_stacks(cls, execution: Execution, names: Sequence[str]) -> "Held":
        """The same, one name per candidate; what memory_constants.toml says of a name replaces what follows.

        A name may have a precision after a slash ("megatron-deepspeed/bfloat16"); it counts where it is listed,
        after what is listed for the plain name.
        """
        held, c = cls.of(execution), memory_constants()
        listed = np.array(names)
        values = {
            field.name: np.array(np.broadcast_to(getattr(held, field.name), listed.shape))
            for field in fields(cls)
        }
        for name in np.unique(listed):
            for known in (name.partition("/")[0], name):
                for field, column in values.items():
                    if (value := c.get(f"stack.{known}.{field}")) is not None:
                        column[listed == name] = value
        return cls(**values)


@cache
def memory_constants() -> Mapping[str, float]:
    """Values of memory_constants.toml, nested names joined with dots."""
    tree = tomllib.loads((Path(__file__).parent / "memory.toml").read_text(encoding="utf-8"))
    values: dict[str, float] = {}
    for name, entry in tree.items():
        if name == "stack":
            values.update(
                {
                    f"stack.{stack}.{field}": float(value)
                    for stack, facts in entry.items()
                    for field, value in facts.items()
                    if field != "source"
                }
            )
        elif "value" in entry:
            values[name] = float(entry["value"])
        else:
            values.update({f"{name}.{inner}": float(each["value"]) for inner, each in entry.items()})
    return values


@dataclass(frozen=True, slots=True)
class _Layer:
    """Elements of one micro-batch in one layer, on one rank; `dense` and `expert` differ in their MLP."""

    input: Array
    dense: Array
    expert: Array
    scores: Array
    largest_gradient: Array
    """Of the backward pass inside a layer."""
    again_dense: Array
    """What one layer's backward first computes again."""
    again_expert: Array
    again_scores: Array


def _layer(shape: ModelShape, x: Execution, c: Mapping[str, float]) -> _Layer:
    tokens = x.micro_batch * x.sequence / x.cp
    # Norms and residuals: whole on each tensor-parallel rank, or split too.
    residual = tokens / np.where(x.sequence_parallel > 0, x.tp, 1.0)
    split = tokens / x.tp
    unfused = 1.0 - x.fused
    # A norm keeps its input (the residual, or a block's output) and what it puts out; the latter is gathered for
    # the matmul, and kept whole by PyTorch's tensor parallelism (DTensor) and by ours, while Megatron gathers it again.
    put_out = np.where((x.sharding == WEIGHTS) | (x.keeps_gathered > 0), tokens, residual)
    norms = shape.norms * shape.hidden * (residual * (1.0 + c["unfused_norm"] * unfused) + put_out)
    # Queries and keys before and after rotation (values share the former's storage), what attention puts out.
    # Models without a gated MLP (GPT, MPT) learn positions or bias the scores: nothing is rotated.
    latent = 2.0 * residual * (shape.query_rank + shape.key_value_rank)
    rotated = np.where(shape.mlp_matrices > 2.0, 2.0, 1.0)
    attention = split * (rotated * (shape.query + shape.key) + shape.value + shape.attended) + latent
    # Gate and up (or the one matrix), their product; unfused, the activation of the gate as well.
    mlp_copies = shape.mlp_matrices + unfused * (shape.mlp_matrices - 2.0)
    dense = norms + attention + split * mlp_copies * shape.mlp
    rows = split * shape.top_k * x.expert_tp
    expert_width = shape.expert / x.expert_tp
    expert = (
        norms
        + attention
        + split * mlp_copies * shape.shared
        + rows * (2.0 * shape.hidden + mlp_copies * expert_width)
    )
    # Of score matrices the softmax is kept; the plain one keeps scores and a float32 copy too.
    keys = x.sequence
    copies = np.where(x.score_traffic > 1.0, c["plain_scores"], 1.0)
    scores = np.where(x.flash > 0, 0.0, split * shape.heads * keys * copies)

    # Every other matmul's output, and attention's.
    half = 2.0 * residual * shape.hidden + split * (shape.query + shape.value + shape.attended)
    recompute = x.recompute
    first = residual * shape.hidden
    kept_dense = np.select(
        [recompute == FULL, recompute == ALTERNATE],
        [first, np.minimum(half + split * shape.mlp, dense)],
        dense,
    )
    kept_expert = np.select(
        [recompute == FULL, recompute == ALTERNATE],
        [first, np.minimum(half + split * shape.shared + rows * (shape.hidden + expert_width), expert)],
        expert,
    )
    kept_scores = np.where(recompute == NONE, scores, 0.0)
    gradient = np.maximum(
        split * shape.mlp_matrices * shape.mlp * (shape.dense_layers > 0),
        (
            split * shape.mlp_matrices * shape.shared
            + rows * (shape.mlp_matrices * expert_width + shape.hidden)
        )
        * (shape.experts > 0),
    )
    return _Layer(
        input=first,
        dense=kept_dense,
        expert=kept_expert,
        scores=kept_scores,
        largest_gradient=np.maximum(gradient + residual * shape.hidden, scores),
        again_dense=dense - kept_dense,
        again_expert=expert - kept_expert,
        again_scores=scores - kept_scores,
    )


def memory_parts(
    shape: ModelShape, execution: Execution, held: Held | None = None, *, stage: Stage = "fullest"
) -> MemoryParts:
    """Peak bytes on one rank of a stage, in parts. All arguments broadcast against each other.

    Where there is no such stage (a pipeline of one has only a last), `stage` gives the nearest that is.
    """
    if stage not in ("fullest", *STAGES):
        raise ConfigError(f"there is no stage {stage!r}; there are fullest, first, middle and last")
    x = execution
    held = Held.of(x) if held is None else held
    c = memory_constants()
    layer = _layer(shape, x, c)
    counts = stage_layers(shape.layers, x.pp, x.chunks)
    layers = dict(zip(("middle", "first", "last"), counts, strict=True)) | {"late": counts[0]}
    if stage != "fullest":
        names: tuple[str, ...] = (stage,)
    else:
        names = tuple(name for name in STAGES if name == "last" or np.any(x.pp > LEAST_STAGES[name]))
        if np.any((shape.dense_layers > 0) & (shape.dense_layers < shape.layers) & (x.pp > 3)):
            names = (*names, "late")
    best: list[Array] | None = None
    best_total: Array | None = None
    for name in names:
        parts = _stage_parts(name, layers, layer, shape, x, held, c)
        total = np.asarray(sum(parts))
        exists = x.pp > LEAST_STAGES[name]
        if best is None or best_total is None:
            best, best_total = parts, np.where(exists | (len(names) == 1), total, -1.0)
        else:
            fuller = exists & (total > best_total)
            best = [np.where(fuller, new, old) for new, old in zip(parts, best, strict=True)]
            best_total = np.where(fuller, total, best_total)
    assert best is not None
    return _whole(best, x, held, c)


def _stage_parts(
    name: str,
    layers: Mapping[str, Array],
    layer: _Layer,
    shape: ModelShape,
    x: Execution,
    held: Held,
    c: Mapping[str, float],
) -> list[Array]:
    """Weights, gradients, optimizer, activations, attention, loss, gathered, workspace of one stage's rank."""
    count = layers[name]
    # --- layers of each kind: dense ones come first ---
    before = {
        "first": np.zeros(()),
        "middle": layers["first"],
        "late": layers["first"] + np.maximum(x.pp - 3.0, 0.0) * layers["middle"],
        "last": np.where(x.pp > 1, layers["first"] + np.maximum(x.pp - 2.0, 0.0) * layers["middle"], 0.0),
    }[name]
    dense_layers = np.clip(shape.dense_layers - before, 0.0, count)
    expert_layers = count - dense_layers

    # --- held all the time ---
    tables = {
        "first": np.ones(()),
        "middle": np.zeros(()),
        "late": np.zeros(()),
        "last": np.where(x.pp > 1, 1.0, 2.0 - shape.tied),
    }[name]
    table = shape.embedding_weights / x.tp
    dense_layer = (shape.attention_weights + shape.mlp_weights) / x.tp
    whole_layer = (shape.attention_weights + shape.shared_weights) / x.tp
    experts_layer = shape.expert_weights * shape.experts / (x.ep * x.expert_tp)
    positions = shape.positions * shape.hidden / x.tp * (tables > 0)
    dense = dense_layers * dense_layer + expert_layers * whole_layer + tables * table + positions
    experts = expert_layers * experts_layer
    # What is split for keeping is shared by the shard × cp ranks of one replica group, as the sharding table says. (A
    # software that spreads it over all data-parallel ranks has one group.)
    ranks = np.minimum(x.shard, x.data) * x.cp
    owners = np.where(x.sharding >= OPTIMIZER, ranks, 1.0)
    expert_ranks = np.maximum(ranks * x.tp / (x.ep * x.expert_tp), 1.0)
    own = dense / owners + experts / np.minimum(expert_ranks, owners)
    both = dense + experts
    weights = held.weight * np.where(x.sharding >= WEIGHTS, own, both) + held.narrow * both
    gradients = held.gradient * np.where(x.sharding >= GRADIENTS, own, both)
    optimizer = held.optimizer * own

    # --- whole for a while ---
    # Without a pipeline a layer is gathered while the one before it runs, and its gradient waits to be scattered;
    # tables stay. In a pipeline all stays whole from the first micro-batch to the last.
    full = x.sharding >= WEIGHTS
    one_layer = np.maximum(
        dense_layer * (dense_layers > 0), (whole_layer + experts_layer) * (expert_layers > 0)
    )
    passing = (2.0 * ELEMENT_BYTES + x.gradient_bytes) * one_layer + ELEMENT_BYTES * tables * table
    pipelined = (ELEMENT_BYTES + x.gradient_bytes * (x.micro_batches > 1)) * both
    scattering = x.gradient_bytes * one_layer
    gathered = np.where(
        full, np.where(x.pp > 1, pipelined, passing), np.where(x.sharding == GRADIENTS, scattering, 0.0)
    )

    # --- activations of the micro-batches in flight ---
    place = {"first": np.zeros(()), "middle": np.ones(()), "late": x.pp - 2.0, "last": x.pp - 1.0}[name]
    ahead = np.where(x.chunks > 1, 2.0 * (x.pp - place - 1.0) + (x.chunks - 1.0) * x.pp + 1.0, x.pp - place)
    in_flight = np.minimum(ahead / x.chunks, x.micro_batches)
    in_flight = np.where(x.pp > 1, in_flight, 1.0)
    kept = in_flight * (dense_layers * layer.dense + expert_layers * layer.expert)
    # What a stage puts out waits for its gradient.
    waiting = np.where(x.pp > 1, in_flight * layer.input, 0.0) if name != "last" else 0.0
    activations = ELEMENT_BYTES * (kept + waiting)
    attention = ELEMENT_BYTES * in_flight * count * layer.scores

    # --- what lives only for a moment: the largest ---
    again = np.maximum(layer.again_dense * (dense_layers > 0), layer.again_expert * (expert_layers > 0))
    largest_matrix = np.maximum(
        (shape.mlp_matrices - 1.0) * shape.hidden * shape.mlp / x.tp * (dense_layers > 0),
        (shape.mlp_matrices - 1.0)
        * shape.hidden
        * np.maximum(shape.shared / x.tp, shape.expert / x.expert_tp),
    )
    in_layer = (count > 0) * (
        ELEMENT_BYTES * (again + layer.again_scores + layer.largest_gradient)
        + np.where(full, 0.0, c["weight_gradient"] * largest_matrix)
    )
    tokens = x.micro_batch * x.sequence / x.cp
    is_last = 1.0 if name == "last" else 0.0
    loss = is_last * held.logit * tokens * shape.vocab / np.where(held.whole_logits > 0, 1.0, x.tp)
    # Its gradient, the whole input of the head and that one's gradient.
    head = is_last * ELEMENT_BYTES * (table + 2.0 * tokens * shape.hidden)
    stepping = held.step * own - activations - attention
    in_loss = loss + head
    at_loss = (in_loss > in_layer) & (in_loss > stepping)
    return [
        weights,
        gradients,
        optimizer,
        activations,
        attention,
        np.where(at_loss, loss, 0.0),
        gathered,
        np.where(at_loss, head, np.maximum(in_layer, stepping)),
    ]


def _whole(parts: list[Array], x: Execution, held: Held, c: Mapping[str, float]) -> MemoryParts:
    weights, gradients, optimizer, activations, attention, loss, gathered, workspace = parts
    # Of tensor, context, data and expert parallelism one group each; a pipeline's two directions.
    groups = (x.tp > 1) * 1.0 + (x.cp > 1) + 2.0 * (x.pp > 1) + (x.data > 1) + (x.ep > 1)
    tensors = np.asarray(sum(parts))
    columns = {
        "weights_bytes": weights,
        "gradients_bytes": gradients,
        "optimizer_bytes": optimizer,
        "activations_bytes": activations,
        "attention_bytes": attention,
        "loss_bytes": loss,
        "gathered_bytes": gathered,
        "communication_bytes": c["communicator_bytes"] * groups + held.buckets_bytes * (x.data > 1),
        "workspace_bytes": workspace,
        "fragmentation_bytes": c["fragmentation"] * tensors,
        "context_bytes": np.asarray(c["context_bytes"]),
    }
    return MemoryParts(**{name: np.broadcast_to(column, tensors.shape) for name, column in columns.items()})


def fits(
    shape: ModelShape,
    execution: Execution,
    memory_bytes: Array | float,
    held: Held | None = None,
    *,
    margin: float = 0.0,
) -> npt.NDArray[np.bool_]:
    """Where a step fits a chip of `memory_bytes`, with `margin` (a share of it) to spare."""
    return np.asarray(memory_parts(shape, execution, held).needed_bytes <= usable_bytes(memory_bytes, margin))


def usable_bytes(memory_bytes: Array | float, margin: float = 0.0) -> Array:
    """Of a chip's memory, what a step may need: the rest is lost to fragmentation however full the chip is."""
    return np.asarray(memory_bytes * (memory_constants()["usable"] - margin))


def overflow(parts: MemoryParts, memory_bytes: float) -> str:
    """What one candidate's rank needs of what a step may use of a chip, and its largest parts.

    For instance "needs 96.4 GiB of 75.3 usable (79.2 in all): optimizer 47.2, activations 25.6, weights 23.6".
    """
    sizes = {
        field.name.removesuffix("_bytes"): float(getattr(parts, field.name)) / 2**30
        for field in fields(parts)
        if field.name != "fragmentation_bytes"
    }
    needed = sum(sizes.values())
    listed = sorted(((size, name) for name, size in sizes.items() if size >= 0.03 * needed), reverse=True)
    usable = float(usable_bytes(memory_bytes)) / 2**30
    return f"needs {needed:.1f} GiB of {usable:.1f} usable ({memory_bytes / 2**30:.1f} in all): " + ", ".join(
        f"{name} {size:.1f}" for size, name in listed
    )
