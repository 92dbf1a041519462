"""What one rank of our own trainer holds at the peak of a step, under any layout, counted from the specification.

The step is gone through as the rank goes through it: its operations in the schedule's order, its layers in theirs, and
what sharding gathers and lets go of around each. What stays and what is kept between passes is counted exactly; what a
layer needs for itself in passing is counted at the few moments that can be the peak. (`estimate.memory` prices any
number of candidates at once, of any software; this is one candidate, of ours.)
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

from colossus.planner.estimate.collectives import BUCKET_BYTES
from colossus.planner.estimate.layer_memory import LayerMemory, LossMemory, layer_memory, loss_memory
from colossus.planner.estimate.orthogonal import orthogonal_bytes
from colossus.planner.one_rank.activations import (
    FLOAT32,
    Shape,
    Split,
    bias_bytes,
    embedding_bytes,
    norm_bytes,
    num_kinds_of_sight,
    sight_bytes,
)
from colossus.planner.schedule.messages import Action, Receive, Send, stage_of, with_messages
from colossus.planner.schedule.order import Op, order
from colossus.spec.job import Job
from colossus.spec.layout import Group
from colossus.spec.model import BYTES_PER_ELEMENT, Dtype, LatentAttentionSpec, ModelSpec, MoeSpec
from colossus.spec.parameters import ParameterSpec
from colossus.spec.plan import Schedule
from colossus.spec.run import AdamW, Muon
from colossus.spec.sharding import Placement, sharding_table
from colossus.spec.stages import Stage

DEFERRING = ("zb-h1", "zbv", "dualpipev")
"""Schedules that put weight gradients off."""

Kind = Literal["weights", "gradients", "optimizer", "activations", "gathered", "loss", "workspace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """What the trainer is told beside the job."""

    dtype: Dtype
    chunk_tokens: int
    optimizer: AdamW | Muon | None = None
    """None: no step of it is counted."""
    state_bytes: int = FLOAT32
    """Of each number that the optimizer keeps."""
    z_loss: bool = False
    router_losses: bool = False
    on_cpu: bool = False
    """With the ways that attention takes on a CPU."""


def rank_memory(model: ModelSpec, job: Job, rank: int, how: How) -> dict[Kind, int]:
    """Bytes at the peak of a step on `rank`, by what they are; without what the device and its libraries take."""
    return _Step(model, job, rank, how).peak()


def enough_micro_batches(schedule: Schedule, pp: int, there: int) -> int:
    """Of a step's micro-batches, as many as show all that there is to see of its memory."""
    if schedule == "gpipe" or (schedule == "interleaved" and there % pp):
        return there
    if pp == 1:
        return min(there, 3)
    return min(
        there, {"interleaved": 2 * pp, "zbv": 2 * pp + 1, "dualpipev": 2 * pp + 1}.get(schedule, pp + 2)
    )


class _Ledger:
    """What is held now, and what was when it was most."""

    def __init__(self) -> None:
        self.now: Counter[Kind] = Counter()
        self.peak: Counter[Kind] = Counter()
        self._total, self._most = 0, -1

    def hold(self, kind: Kind, num_bytes: int) -> None:
        self.now[kind] += num_bytes
        self._total += num_bytes
        if self._total > self._most:
            self.peak, self._most = self.now.copy(), self._total

    def let_go(self, kind: Kind, num_bytes: int) -> None:
        self.now[kind] -= num_bytes
        self._total -= num_bytes

    def moment(self, kind: Kind, num_bytes: int) -> None:
        """So much more for a moment."""
        if self._total + num_bytes > self._most:
            self.hold(kind, num_bytes)
            self.let_go(kind, num_bytes)


# --- parameters ---


class _Unit:
    """Parameters that are gathered and scattered together, and what there is of them and of their gradients now."""

    def __init__(self, num_ranks: int = 1, element: int = FLOAT32) -> None:
        self.num_ranks, self.element = num_ranks, element
        self.kept = self.whole = self.not_rows = self.largest = 0
        """Numbers: kept here, computed with; of these, those that are split along another dim than the first, which
        one more copy puts in order; and those of the largest parameter."""
        self.is_gathered = self.is_scattered = False
        self.fresh = 0
        """Bytes of gradients that no pass has taken up yet."""
        self.summed = 0
        """Bytes of whole gradients, of earlier passes."""

    def add(self, placement: Placement, shape: tuple[int, ...], group: Group) -> None:
        """`shape`: what is computed with."""
        numbers = 1
        for size in shape:
            numbers *= size
        cut = placement.cut(group) if self.is_sharded else None
        if cut is not None and cut.dim == 0:
            numbers = numbers // max(shape[0], 1) * -(-shape[0] // self.num_ranks) * self.num_ranks
        self.kept += numbers // (self.num_ranks if cut is not None else 1)
        self.whole += numbers
        self.largest = max(self.largest, numbers)
        if cut is not None and cut.dim != 0:
            self.not_rows = max(self.not_rows, numbers)

    @property
    def is_sharded(self) -> bool:
        return self.num_ranks > 1

    @property
    def gathered_bytes(self) -> int:
        return self.element * self.whole


class _Layer:
    def __init__(
        self,
        memory: LayerMemory,
        first: LayerMemory,
        rest: _Unit,
        router: _Unit,
        experts: _Unit,
        plain: _Unit,
    ) -> None:
        self.memory, self.first = memory, first
        self.rest, self.router, self.experts, self.plain = rest, router, experts, plain
        self.mlp: Counter[_Unit] = Counter()
        """Numbers of the feed-forward part in each unit."""
        self.attention: Counter[_Unit] = Counter()
        self.between_replicas: list[int] = []
        """Bytes of gradients that are summed between replicas alone, each, as they travel."""

    @property
    def units(self) -> Mapping[_Unit, None]:
        """Each once, in order."""
        return dict.fromkeys((self.rest, self.router, self.experts, self.plain))


@dataclass
class _Part:
    """One stage of this rank."""

    stage: Stage
    layers: list[_Layer]
    ends: _Unit
    """Embeddings, last norm, head."""
    inputs: int = 0
    """Numbers of the tables that tokens are looked up in, without sparse ones."""
    head: int = 0
    sparse: int = 0
    state: int = 0
    """Bytes of the optimizer's."""
    between_replicas: list[int] = field(default_factory=list)
    """Bytes of gradients that are summed between replicas alone, each, of what stands around the layers."""
    left: list[int] = field(default_factory=list)
    """Bytes of gradients that are summed over other ranks after all passes, each."""
    matrices: list[tuple[Placement, int]] = field(default_factory=list)
    """Of Muon: each, and how many are here of a stack."""

    def units(self) -> Iterator[_Unit]:
        yield self.ends
        for layer in self.layers:
            yield from layer.units


# --- a step ---


class _Step:
    def __init__(self, model: ModelSpec, job: Job, rank: int, how: How) -> None:
        self.model, self.job, self.how = model, job, how
        layout = job.layout
        self.here, self.share = layout.coordinates(rank), job.share(rank)
        table = sharding_table(model, layout, job.expert_tp, sharded=job.sharding != "none")
        groups: tuple[Group, ...] = ("tp", "ep", "expert_tp", "shards", "expert_shards", "replica")
        self.mates = {group: table.mates(rank, group) for group in groups}
        is_sharded = job.sharding != "none"
        self.dense_ranks = self.mates["shards"].size if is_sharded else 1
        self.expert_ranks = self.mates["expert_shards"].size if is_sharded else 1
        self.alone = layout.pp == 1
        self.each_time = self.alone and job.sharding == "weights"
        """Whether weights are gathered for each pass."""
        self.shape = Shape(
            self.share.micro_batch_sequences,
            job.sequence_tokens,
            how.dtype,
            Split(
                tp=layout.tp,
                cp=layout.cp,
                cp_place=self.here.cp,
                ep=layout.ep,
                expert_tp=job.expert_tp,
                exchange=job.context_exchange or "all-gather",
                dense_gathered=self.dense_ranks > 1,
                experts_gathered=self.expert_ranks > 1,
                deferred=job.schedule in DEFERRING,
                on_cpu=how.on_cpu,
            ),
        )
        self.ledger = _Ledger()
        self.parts = {
            stage.number: self._part(stage, table.placements)
            for stage in job.stages
            if stage.rank == self.here.pp
        }
        self.sight = sight_bytes(model, self.shape, with_bias=self.share.recompute != "none")
        self.message = self.shape.held_values(model.hidden_size)
        self._pending = self._scattering = 0
        """Bytes of what was gathered last, and of what was scattered last, which stay until the next is."""
        self._travelling: list[int] = []
        """Bytes of sums between replicas that are under way."""
        self._coming: set[_Unit] = set()
        """Gathered ahead of the backward pass, and not yet put in place."""

    def peak(self) -> dict[Kind, int]:
        ledger = self.ledger
        numbers = sum(unit.kept for part in self.parts.values() for unit in part.units())
        sparse = sum(part.sparse for part in self.parts.values())
        ledger.hold("weights", FLOAT32 * (numbers + sparse) + self._buffer_bytes())
        ledger.hold("optimizer", sum(part.state for part in self.parts.values()))
        ledger.hold("activations", self.message)  # what is received looks like it
        last = _last_backwards(self._actions)
        for action in self._actions:
            match action:
                case Receive():
                    ledger.hold("activations", self.message)
                case Send():
                    pass
                case Op("forward", chunk):
                    self._forward(self._stage(chunk))
                case Op("forward_backward", chunk):
                    self._forward(self._stage(chunk))
                    self._backward(self._stage(1 - chunk), False, last[1 - chunk] is action)
                case Op("backward_weight", chunk):
                    self._weights(self._stage(chunk), last[chunk] is action)
                case Op(kind, chunk):
                    self._backward(self._stage(chunk), kind == "backward_input", last[chunk] is action)
        ledger.let_go("activations", self.message)
        self._after()
        return {kind: size for kind, size in ledger.peak.items() if size}

    # --- what stands here ---

    def _part(self, stage: Stage, placements: Mapping[str, Placement]) -> _Part:
        model, element = self.model, BYTES_PER_ELEMENT[self.how.dtype]
        ends = _Unit(self.dense_ranks, element) if self.dense_ranks > 1 else _Unit()
        part = _Part(stage, [], ends)
        boxes = {}

        def shape_here(placement: Placement) -> tuple[int, ...]:
            if placement not in boxes:
                boxes[placement] = placement.box(lambda group: self.mates[group], kept=False).shape
            return boxes[placement]

        def place(name: str, unit: _Unit, between_replicas: list[int]) -> int:
            placement = placements[name]
            parameter = placement.parameter
            shape = shape_here(placement)
            before, kept = unit.whole, unit.kept
            unit.add(placement, shape, "expert_shards" if parameter.expert else "shards")
            part.state += self._state_bytes(parameter, unit.kept - kept)
            if parameter.role != "balance" and (groups := self._left(name, placement)):
                left = between_replicas if groups == ["replica"] else part.left
                left.append(FLOAT32 * (unit.kept - kept))
            if self._takes_muon(parameter):
                box = placement.box(lambda group: self.mates[group])
                part.matrices.append((placement, box.shape[0] if len(box.shape) == 3 else 1))
            return unit.whole - before

        if stage.is_first or (stage.is_last and model.tied_embeddings):
            part.inputs += place("embedding.weight", ends, part.between_replicas)
        if stage.is_first:
            for parameter in model.input_parameters()[1:]:
                if parameter.role == "sparse_embedding":
                    part.sparse += parameter.num_elements
                    part.state += FLOAT32 * parameter.shape[0]
                else:
                    part.inputs += place(parameter.name, ends, part.between_replicas)
        if stage.is_last:
            for parameter in model.output_parameters():
                numbers = place(parameter.name, ends, part.between_replicas)
                part.head += numbers
            part.head = part.inputs if model.tied_embeddings else part.head
            if not stage.is_first:
                part.inputs = 0
        memories: dict[int, tuple[LayerMemory, LayerMemory]] = {}
        for number, group in enumerate(model.layer_groups()):
            for layer in range(group.first_layer, group.first_layer + group.num_layers):
                if layer not in stage.layers:
                    continue
                if number not in memories:
                    recompute, has_losses = self.share.recompute, self.how.router_losses
                    again, first = (
                        layer_memory(
                            model, group.mlp, self.shape, recompute, router_losses=has_losses, first=first
                        )
                        for first in (False, True)
                    )
                    memories[number] = again, first
                sharded = self.dense_ranks > 1
                own_router = sharded and isinstance(group.mlp, MoeSpec) and element != FLOAT32
                plain = _Unit()
                here = _Layer(
                    *memories[number],
                    rest=_Unit(self.dense_ranks, element) if sharded else plain,
                    router=_Unit(self.dense_ranks) if own_router else plain,
                    experts=_Unit(self.expert_ranks, element) if self.expert_ranks > 1 else plain,
                    plain=plain,
                )
                for parameter in group.parameters:
                    unit = here.rest
                    if parameter.role == "balance":
                        unit = here.plain
                    elif parameter.expert:
                        unit = here.experts
                    elif parameter.name.startswith("mlp.router") and own_router:
                        unit = here.router
                    numbers = place(f"layers.{layer}.{parameter.name}", unit, here.between_replicas)
                    side = here.mlp if parameter.name.startswith("mlp") else here.attention
                    side[unit] += numbers
                part.layers.append(here)
        return part

    def _state_bytes(self, parameter: ParameterSpec, kept: int) -> int:
        if self.how.optimizer is None or parameter.role == "balance":
            return 0
        return (1 if self._takes_muon(parameter) else 2) * self.how.state_bytes * kept

    def _takes_muon(self, parameter: ParameterSpec) -> bool:
        return parameter.role == "matrix" and isinstance(self.how.optimizer, Muon)

    def _left(self, name: str, placement: Placement) -> list[Group]:
        """Over whom a gradient is left to sum, as in parallel/sums.py."""
        within: tuple[Group, ...] = (
            ("expert_tp", "expert_shards") if placement.parameter.expert else ("tp", "shards")
        )
        left: list[Group] = []
        if name == "embedding.weight" and self.model.tied_embeddings and not self.alone:
            left.append("ends")
        for group in (*within, "replica"):
            size, cut = self.mates[group].size, placement.cut(group)
            if size > 1 and (cut is None or cut.num_parts < size):
                left.append(group)
        return left

    def _buffer_bytes(self) -> int:
        """The frequencies of rotations, float64; and every mixture's count of its experts' tokens."""
        attention, total = self.model.attention, 0
        if attention.rope is not None:
            turned = (
                attention.rope_head_dim if isinstance(attention, LatentAttentionSpec) else attention.head_dim
            )
            total += len(self.parts) * 8 * (int(attention.rope.rotated_fraction * turned) // 2)
        for part in self.parts.values():
            for number in part.stage.layers:
                mlp = self.model.mlp_of(number)
                total += FLOAT32 * mlp.num_experts if isinstance(mlp, MoeSpec) else 0
        return total

    # --- the order of things ---

    @cached_property
    def _actions(self) -> tuple[Action, ...]:
        job, here = self.job, self.share.num_micro_batches
        orders = order(
            job.schedule,
            job.layout.pp,
            job.virtual_stages,
            enough_micro_batches(job.schedule, job.layout.pp, here),
        )
        return _with_messages(job.schedule, job.virtual_stages, orders)[self.here.pp]

    def _stage(self, chunk: int) -> int:
        return stage_of(self.job.schedule, self.job.layout.pp, self.here.pp, chunk)

    # --- passes ---

    def _forward(self, number: int) -> None:
        part, ledger, shape = self.parts[number], self.ledger, self.shape
        if number - 1 in self.parts:
            ledger.hold("activations", self.message)  # of a neighbour on this rank; else it came before
        self._unshard(part.ends)
        # Who sees whom: three comparisons of a byte each, then the numbers and two of those.
        ledger.moment("workspace", max(3, 2 + shape.element) * shape.pairs)
        ledger.hold("activations", self.sight)
        bias = num_kinds_of_sight(self.model) * bias_bytes(shape)
        in_passing = bias if shape.short and shape.split.cp == 1 and self.share.recompute == "none" else 0
        ledger.hold("workspace", in_passing)
        if part.stage.is_first:
            looked_up = part.ends.element * shape.tokens * self.model.hidden_size
            ledger.moment("workspace", looked_up * (2 if shape.split.tp > 1 else 1) + self.message)
            ledger.hold("activations", embedding_bytes(self.model, shape))
        for index, layer in enumerate(part.layers):
            for unit in (layer.rest, layer.router, layer.experts):
                self._unshard(unit)
            memory = layer.memory
            ledger.moment("workspace", memory.kept + memory.again // 2 + memory.residual)
            # The first one's input came as a message.
            ledger.hold("activations", memory.kept - self._came(part, index))
            for unit in (layer.router, layer.experts, layer.rest):
                if self.each_time:
                    self._reshard(unit)
        ledger.let_go("workspace", in_passing)
        if not part.stage.is_last:
            ledger.hold("activations", self.message)  # until its gradient is there
        else:
            ledger.hold("activations", self._final_norm)
            loss = self._loss(part)
            ledger.hold("loss", loss.gradients)
            ledger.moment("loss", loss.forward)
        ledger.let_go("gathered", self._pending)
        self._pending = 0

    def _backward(self, number: int, put_off: bool, is_last: bool) -> None:
        part, ledger = self.parts[number], self.ledger
        complete = is_last and not put_off
        scatters = complete or (self.alone and self.job.sharding in ("gradients", "weights"))
        reshards = complete or self.each_time
        if part.stage.is_last:
            loss = self._loss(part)
            ledger.moment("loss", loss.backward)
            ledger.let_go("loss", loss.gradients)
            self._add_gradients(part.ends, part.head, are_there=True)
            ledger.let_go("activations", self._final_norm)
        elif number + 1 in self.parts:
            ledger.hold("activations", self.message)
        for index in range(len(part.layers) - 1, -1, -1):
            layer = part.layers[index]
            memory = layer.memory if layer.plain.is_scattered or not layer.plain.whole else layer.first
            # The gradient of what the layer put out; for a stage's last one it came as a message.
            residual = memory.residual if part.stage.is_last or index < len(part.layers) - 1 else 0
            before = part.layers[index - 1].rest if index else None
            own_experts = layer.experts if layer.experts is not layer.plain else None
            self._unshard_again(layer.rest, own_experts or before)
            self._unshard_again(layer.router, None)
            ledger.hold("activations", memory.again)
            if own_experts is not None:
                self._unshard_again(own_experts, before)
            numbers = {} if put_off else layer.mlp
            ledger.moment("workspace", residual + memory.mlp_most)
            for unit, count in numbers.items():
                self._add_gradients(unit, count)
            if own_experts is not None:
                self._scatter(own_experts, scatters, reshards)
            ledger.let_go("activations", memory.mlp)
            numbers = {} if put_off else layer.attention
            ledger.moment("workspace", residual + memory.attention_most)
            for unit, count in numbers.items():
                self._add_gradients(unit, count)
            ledger.let_go("activations", memory.kept + memory.again - memory.mlp - self._came(part, index))
            if put_off:
                ledger.hold("activations", memory.waiting)
            for unit in (layer.router, layer.rest):
                if unit is not layer.plain:
                    self._scatter(unit, scatters, reshards)
            if complete:
                self._begin_sums(layer.between_replicas)
        if part.stage.is_first:
            ledger.let_go("activations", embedding_bytes(self.model, self.shape))
            self._add_gradients(part.ends, part.inputs)
        ledger.let_go("activations", self.sight)
        if part.ends.is_sharded:
            self._scatter(part.ends, scatters, reshards)
        if complete:
            self._finish()
        if not part.stage.is_last:
            ledger.let_go("activations", 2 * self.message)  # what was put out, and its gradient
        if not part.stage.is_first:
            ledger.let_go("activations", self.message)  # what came in

    def _weights(self, number: int, is_last: bool) -> None:
        """Weight gradients that were put off."""
        part = self.parts[number]
        for layer in part.layers:
            for numbers in (layer.mlp, layer.attention):
                for unit, count in numbers.items():
                    # As a matmul makes it, and in the dtype in which it is kept.
                    narrow = self.shape.element if self.shape.element < unit.element else 0
                    self.ledger.moment("workspace", (narrow + unit.element) * min(unit.largest, count))
                    self._add_gradients(unit, count, are_there=True)
            self.ledger.let_go("activations", layer.memory.waiting)
        if is_last:
            for unit in part.units():
                if unit.is_sharded:
                    self._scatter(unit, True, True)
            for layer in reversed(part.layers):
                self._begin_sums(layer.between_replicas)
            self._finish()

    def _begin_sums(self, sizes: list[int]) -> None:
        """Of a layer's gradients, between replicas; those of two layers at most are under way."""
        if len(self._travelling) == 2:
            self.ledger.let_go("workspace", self._travelling.pop(0))
        self._travelling.append(sum(sizes) // (2 if self.job.replica_sum == "bfloat16" else 1))
        self.ledger.hold("workspace", self._travelling[-1])

    def _finish(self) -> None:
        self.ledger.let_go("gathered", self._scattering)
        self._scattering = 0

    def _after(self) -> None:
        """The last sums over ranks, and the optimizer."""
        for part in self.parts.values():
            self._begin_sums(part.between_replicas)
        self.ledger.let_go("workspace", sum(self._travelling))
        self._travelling.clear()
        left = [size for part in self.parts.values() for size in part.left]
        self.ledger.moment("workspace", max(min(sum(left), BUCKET_BYTES), max(left, default=0)))
        matrices = [matrix for part in self.parts.values() for matrix in part.matrices]
        if matrices:
            placements, counts = zip(*matrices, strict=True)
            element = BYTES_PER_ELEMENT[self.how.dtype]
            self.ledger.moment(
                "workspace", orthogonal_bytes(placements, counts, self.mates.__getitem__, element)
            )

    def _came(self, part: _Part, index: int) -> int:
        return self.message if index == 0 and not part.stage.is_first else 0

    @property
    def _final_norm(self) -> int:
        return norm_bytes(self.model, self.model.hidden_size, self.shape)

    def _loss(self, part: _Part) -> LossMemory:
        return loss_memory(
            self.model, self.shape, self.how.chunk_tokens, part.ends.element, z_loss=self.how.z_loss
        )

    # --- gradients ---

    def _add_gradients(self, unit: _Unit, numbers: int, *, are_there: bool = False) -> None:
        """A backward pass has made those of so many parameters; `are_there`: their own bytes are counted."""
        made = min(unit.element * numbers, unit.gathered_bytes - unit.fresh)
        unit.fresh += made
        self.ledger.hold("gradients", made)
        if not unit.is_sharded:
            unit.is_scattered = unit.fresh == unit.gathered_bytes
        if made < unit.element * numbers and not are_there:
            self.ledger.moment("workspace", unit.element * min(unit.largest, numbers))

    # --- sharding ---

    def _unshard(self, unit: _Unit) -> None:
        if not unit.is_sharded or unit.is_gathered:
            return
        self._gather(unit)
        self.ledger.let_go("gathered", self._pending)
        self._pending = unit.gathered_bytes
        self._put_in_place(unit)

    def _unshard_again(self, unit: _Unit, following: _Unit | None) -> None:
        """In the backward pass, in which the following unit is gathered ahead."""
        if unit.is_sharded and not unit.is_gathered:
            if unit not in self._coming:
                self._gather(unit)
            self._coming.discard(unit)
            self._put_in_place(unit)
            self.ledger.let_go("gathered", unit.gathered_bytes)
        if (
            following is not None
            and following.is_sharded
            and not following.is_gathered
            and following not in self._coming
        ):
            self._gather(following)
            self._coming.add(following)

    def _gather(self, unit: _Unit) -> None:
        """Into a buffer, from what is kept here in the dtype of matmuls."""
        self.ledger.hold("gathered", unit.gathered_bytes)
        self.ledger.moment("gathered", unit.element * unit.kept if unit.element < FLOAT32 else 0)

    def _put_in_place(self, unit: _Unit) -> None:
        self.ledger.hold("gathered", unit.gathered_bytes)
        self.ledger.moment("gathered", unit.element * unit.not_rows)
        unit.is_gathered = True

    def _reshard(self, unit: _Unit) -> None:
        if unit.is_gathered:
            self.ledger.let_go("gathered", unit.gathered_bytes)
            unit.is_gathered = False

    def _scatter(self, unit: _Unit, scatters: bool, reshards: bool) -> None:
        """What follows the backward pass of a unit."""
        ledger, wide = self.ledger, FLOAT32 * unit.whole
        if not unit.is_sharded:
            return
        if unit.summed or (not scatters and unit.element < FLOAT32 and unit.fresh):
            # Gradients of several passes are added up in float32.
            if not unit.summed:
                ledger.hold("gradients", wide)
                unit.summed = wide
            ledger.let_go("gradients", unit.fresh)
            unit.fresh = 0
        if reshards:
            self._reshard(unit)
        made = unit.fresh + unit.summed
        if not scatters or not made:
            return
        ledger.moment("gradients", unit.not_rows * (FLOAT32 if unit.summed else unit.element))
        self._finish()
        ledger.hold("gathered", wide)
        self._scattering = wide
        ledger.let_go("gradients", made)
        unit.fresh = unit.summed = 0
        if unit.is_scattered:
            ledger.moment("gradients", FLOAT32 * unit.kept)
        else:
            ledger.hold("gradients", FLOAT32 * unit.kept)
            unit.is_scattered = True


@lru_cache(maxsize=64)
def _with_messages(
    schedule: Schedule, num_chunks: int, orders: tuple[tuple[Op, ...], ...]
) -> tuple[tuple[Action, ...], ...]:
    return with_messages(schedule, num_chunks, orders)


def _last_backwards(actions: tuple[Action, ...]) -> dict[int, Op]:
    """By chunk: the operation with which its gradients are complete."""
    last: dict[int, Op] = {}
    for action in actions:
        if isinstance(action, Op):
            if action.kind in ("backward", "backward_weight"):
                last[action.chunk] = action
            elif action.kind == "forward_backward":
                last[1 - action.chunk] = action
    return last
