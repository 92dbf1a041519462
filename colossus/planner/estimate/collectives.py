"""What a rank exchanges in one step of our own trainer, counted from the specification: each collective by its kind,
its group of ranks and its bytes. `parallel/record.py` sees the same when the step runs, and tests hold both equal.

Bytes are, of an all-gather, the whole that comes together; of a reduce-scatter, the whole that is put in; of an
all-reduce, the tensor; of an all-to-all, all that this rank sends, to itself too; of a send, the message.

Of experts it is taken that all are chosen alike: what one rank sends more, another sends less. Not counted: sparse
tables, whose rows are known when tokens are.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod
from typing import Literal, NamedTuple

from colossus.spec.job import Job
from colossus.spec.layout import Group, Mates
from colossus.spec.matrices import deal_out
from colossus.spec.model import BYTES_PER_ELEMENT, AttentionSpec, Dtype, ModelSpec, MoeSpec
from colossus.spec.parameters import layer_of
from colossus.spec.plan import Recompute
from colossus.spec.run import OptimizerKind
from colossus.spec.sharding import Placement, ShardingTable, sharding_table
from colossus.spec.stages import Stage

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]

FLOAT32 = BYTES_PER_ELEMENT["float32"]
FLOAT64 = INT64 = 8
BUCKET_BYTES = 256 * 2**20
"""As in parallel/sums.py."""


class Collective(NamedTuple):
    """One exchange of this rank with its mates in a group."""

    kind: Kind
    group: Group
    num_bytes: int


class Exchange(NamedTuple):
    """Exchanges that are alike, and how many of them there are in a step."""

    kind: Kind
    group: Group
    num_bytes: int
    times: int

    @property
    def total_bytes(self) -> int:
        return self.num_bytes * self.times


def in_order(counts: Mapping[Collective, int]) -> tuple[Exchange, ...]:
    """By group and kind, the largest first."""
    found = [Exchange(*collective, count) for collective, count in counts.items() if count]
    return tuple(sorted(found, key=lambda one: (one.group, one.kind, -one.num_bytes)))


def collectives(
    model: ModelSpec,
    job: Job,
    rank: int,
    *,
    dtype: Dtype,
    chunk_tokens: int,
    optimizer: OptimizerKind = "adamw",
    router_losses: bool = False,
    num_micro_batches: int | None = None,
) -> tuple[Exchange, ...]:
    """Those of one step on `rank`. `num_micro_batches`: in place of the job's own, where fewer of them are run."""
    step = _Step(model, job, rank, dtype, chunk_tokens, optimizer, router_losses, num_micro_batches)
    return in_order(step.counts())


Counts = Counter[Collective]


def _times(counts: Counts, count: int) -> Counts:
    return Counter({one: count * times for one, times in counts.items()})


@dataclass(frozen=True)
class _Step:
    model: ModelSpec
    job: Job
    rank: int
    dtype: Dtype
    """What matmuls run in."""
    chunk_tokens: int
    """Of the loss: tokens whose logits stand in memory at once."""
    optimizer: OptimizerKind
    router_losses: bool
    given_micro_batches: int | None

    def counts(self) -> Counts:
        counts = self._pipeline() + self._after_backward() + self._whole_matrices()
        for stage in self._stages:
            counts += _times(self._passes(stage), self._num_micro_batches) + self._sharding(stage)
        return counts

    # --- who and what is here ---

    @cached_property
    def _stages(self) -> tuple[Stage, ...]:
        place = self.job.layout.coordinates(self.rank).pp
        return tuple(stage for stage in self.job.stages if stage.rank == place)

    @cached_property
    def _num_micro_batches(self) -> int:
        return self.given_micro_batches or self.job.share(self.rank).num_micro_batches

    @property
    def _recompute(self) -> Recompute:
        return self.job.share(self.rank).recompute

    @cached_property
    def _placements(self) -> Mapping[str, Placement]:
        return self._table.placements

    @cached_property
    def _table(self) -> ShardingTable:
        job = self.job
        return sharding_table(self.model, job.layout, job.expert_tp, sharded=job.sharding != "none")

    @cached_property
    def _mates(self) -> dict[Group, Mates]:
        groups: tuple[Group, ...] = (
            "tp", "cp", "pp", "replica", "shards", "ep", "expert_tp", "expert_shards", "ends", "group",
        )  # fmt: skip
        return {group: self._table.mates(self.rank, group) for group in groups}

    def _size(self, group: Group) -> int:
        return self._mates[group].size

    @property
    def _element(self) -> int:
        return BYTES_PER_ELEMENT[self.dtype]

    @property
    def _attended(self) -> int:
        """Tokens of a micro-batch whose queries, keys and values are made by this rank's tensor-parallel team."""
        layout = self.job.layout
        return self.job.share(self.rank).micro_batch_sequences * self.job.sequence_tokens // layout.cp

    @property
    def _held(self) -> int:
        """Of these, those whose hidden states stand here: ranks of the team share them out."""
        return self._attended // self.job.layout.tp

    # --- one micro-batch, forward and backward ---

    def _passes(self, stage: Stage) -> Counts:
        counts: Counts = Counter()
        if stage.is_first:
            counts += self._embedding()
        if stage.is_last:
            counts += self._loss()
        first = self.model.first_layers
        num_first = first.num_layers if first is not None else 0
        num_plain = sum(1 for layer in stage.layers if layer < num_first)
        for number, example in ((num_plain, 0), (stage.num_layers - num_plain, num_first)):
            if number:
                counts += _times(self._layer(example), number)
        return counts

    def _layer(self, number: int) -> Counts:
        """Forward, backward, and forward again as far as it is recomputed."""
        forward, backward, left_out = self._layer_passes(number)
        match self._recompute:
            case "none":
                again: Counts = Counter()
            case "selective":  # attention scores alone
                again = self._context_again()
            case _:
                again = forward - left_out
        return forward + backward + again

    def _layer_passes(self, number: int) -> tuple[Counts, Counts, Counts]:
        """Exchanges of a layer's forward pass, of its backward pass, and those of the forward pass that recompute does
        not come to: it ends where the last tensor is made again that the backward pass asks for, and a scatter at a
        layer's end is of no interest to it."""
        forward, backward = self._attention()
        mlp = self.model.mlp_of(number)
        there, back, last = self._mixture(mlp) if isinstance(mlp, MoeSpec) else self._dense()
        # A norm after the MLP wants to see what was scattered.
        left_out = last if self.model.norm_placement == "pre" else Counter()
        return forward + there, backward + back, left_out

    def _around(self, group: Group, channels: int) -> tuple[Counts, Counts]:
        """A gather of hidden states on the way in, whose gradient is scattered; and the other way round on the way out.
        Sizes are the same: of all tokens of the team."""
        if self._size(group) == 1:
            return Counter(), Counter()
        size = self._held * self._size(group) * channels * self._element
        gather, scatter = Collective("all-gather", group, size), Collective("reduce-scatter", group, size)
        return Counter([gather]), Counter([scatter])

    def _attention(self) -> tuple[Counts, Counts]:
        """Tensor parallelism gathers tokens before the projections and scatters sums after the last one; context
        parallelism exchanges keys and values in between."""
        model, attention = self.model, self.model.attention
        forward, backward = self._context()
        widths = [model.hidden_size]
        if not isinstance(attention, AttentionSpec):
            # Latents are narrower than hidden states: they are gathered where they are made.
            widths = [
                attention.kv_lora_rank + attention.rope_head_dim,
                attention.q_lora_rank or model.hidden_size,
            ]
        for width in widths:
            gather, scatter = self._around("tp", width)
            forward, backward = forward + gather, backward + scatter
        gather, scatter = self._around("tp", model.hidden_size)
        forward, backward = forward + scatter, backward + gather
        if self._size("tp") > 1 and isinstance(attention, AttentionSpec) and _norms_all_heads(attention):
            # Each token's sum of squares over all heads, of queries and of keys.
            sums = Counter({Collective("all-reduce", "tp", FLOAT32 * self._attended): 2})
            forward, backward = forward + sums, backward + sums
        return forward, backward

    def _dense(self) -> tuple[Counts, Counts, Counts]:
        """As attention: a gather before the first matmul, a scatter after the last."""
        gather, scatter = self._around("tp", self.model.hidden_size)
        return gather + scatter, scatter + gather, scatter

    def _mixture(self, mlp: MoeSpec) -> tuple[Counts, Counts, Counts]:
        hidden, expert_tp = self.model.hidden_size, self._size("expert_tp")
        forward: Counts = Counter()
        backward: Counts = Counter()
        last: Counts = Counter()
        # Ranks that share each expert gather tokens, their choices' weights, and the choices, which have no gradient;
        # sums are scattered.
        for channels in (hidden, mlp.top_k):
            gather, scatter = self._around("expert_tp", channels)
            forward, backward = forward + gather, backward + scatter
        if expert_tp > 1:
            forward[Collective("all-gather", "expert_tp", INT64 * self._held * expert_tp * mlp.top_k)] += 1
        gather, scatter = self._around("expert_tp", hidden)
        forward, backward, last = forward + scatter, backward + gather, scatter
        # Each choice of a token is a row that travels to its expert and back, and so do gradients; ahead of the rows go
        # their numbers.
        if self._size("ep") > 1:
            rows = self._held * expert_tp * mlp.top_k * hidden * self._element
            forward[Collective("all-to-all", "ep", INT64 * mlp.num_experts)] += 1
            forward[Collective("all-to-all", "ep", rows)] += 2
            backward[Collective("all-to-all", "ep", rows)] += 2
        # What all tokens pass beside the experts is a dense MLP, and comes last.
        if mlp.shared is not None:
            there, back, last = self._dense()
            forward, backward = forward + there, backward + back
        # Balance is over whole sequences: each one's share of every expert, and how often it was chosen.
        if self.router_losses:
            sums = FLOAT32 * self.job.share(self.rank).micro_batch_sequences * mlp.num_experts
            for group in _SHARING_SEQUENCES:
                if self._size(group) > 1:
                    forward[Collective("all-reduce", group, sums)] += 2
            last = Counter()  # recompute comes to the loss, which is after all of it
        return forward, backward, last

    # --- context parallelism ---

    @property
    def _heads(self) -> tuple[int, int, int, int]:
        """Of queries, and of keys and values, on this rank; channels of a key and of a value."""
        attention, tp = self.model.attention, self.job.layout.tp
        if isinstance(attention, AttentionSpec):
            kv_heads = max(1, attention.num_kv_heads // tp)
        else:
            kv_heads = attention.num_heads // tp
        return attention.num_heads // tp, kv_heads, attention.head_dim, attention.value_head_dim

    def _context(self) -> tuple[Counts, Counts]:
        cp, tokens, element = self.job.layout.cp, self._attended, self._element
        if cp == 1:
            return Counter(), Counter()
        heads, kv_heads, key, value = self._heads
        keys_and_values = tokens * kv_heads * (key + value)
        match self.job.context_exchange or "all-gather":
            case "all-gather":  # of keys and values of the whole sequence; gradients are scattered back
                size = keys_and_values * cp * element
                return (
                    Counter([Collective("all-gather", "cp", size)]),
                    Counter([Collective("reduce-scatter", "cp", size)]),
                )
            case (
                "ring"
            ):  # round once forward; backward once more, and their gradients in float32 all the way home
                block = Collective("send", "cp", keys_and_values * element)
                home = Collective("send", "cp", keys_and_values * FLOAT32)
                return Counter({block: cp - 1}), Counter({block: cp - 1}) + Counter({home: cp})
            case (
                "all-to-all"
            ):  # queries, keys and values for heads, and back; keys are copied where there are too few
                copied = lcm(kv_heads, cp)
                there = tokens * (heads * key + copied * (key + value)) * element
                back = tokens * heads * value * element
                trade = Counter([Collective("all-to-all", "cp", there), Collective("all-to-all", "cp", back)])
                return trade, trade.copy()

    def _context_again(self) -> Counts:
        forward, _ = self._context()
        if self.job.layout.cp > 1 and self.job.context_exchange == "all-to-all":
            # The way back is what recompute of attention ends with: nothing is made from it that is asked for.
            heads, _, _, value = self._heads
            forward -= Counter(
                [Collective("all-to-all", "cp", self._attended * heads * value * self._element)]
            )
        return forward

    # --- before and after the layers ---

    def _embedding(self) -> Counts:
        """Each tensor-parallel rank looks up the rows that it has; sums are scattered over the tokens, gradients
        gathered. In the dtype of the table: what sharding gathers is narrow, what stands here is not."""
        if self._size("tp") == 1:
            return Counter()
        is_gathered = self.job.sharding != "none" and self._size("shards") > 1
        size = self._attended * self.model.hidden_size * (self._element if is_gathered else FLOAT32)
        return Counter([Collective("reduce-scatter", "tp", size), Collective("all-gather", "tp", size)])

    def _loss(self) -> Counts:
        """Every tensor-parallel rank has some of the vocabulary: it needs all tokens, and three numbers of each from
        the others, in chunks: the largest logit, then the sum of all raised above it and the target's."""
        if self._size("tp") == 1:
            return Counter()
        gather, scatter = self._around("tp", self.model.hidden_size)
        counts = gather + scatter
        for start in range(0, self._attended, self.chunk_tokens):
            tokens = min(self.chunk_tokens, self._attended - start)
            counts[Collective("all-reduce", "tp", FLOAT32 * tokens)] += 1
            counts[Collective("all-reduce", "tp", 2 * FLOAT32 * tokens)] += 1
        return counts

    # --- pipeline ---

    def _pipeline(self) -> Counts:
        """A micro-batch's hidden states to the next stage, its gradient to the one before, where these are on other
        ranks."""
        stages = self.job.stages
        message = Collective("send", "pp", self._held * self.model.hidden_size * self._element)
        neighbours = (
            stages[number]
            for stage in self._stages
            for number in (stage.number - 1, stage.number + 1)
            if 0 <= number < len(stages)
        )
        elsewhere = sum(1 for stage in neighbours if stage.rank != self._stages[0].rank)
        return Counter({message: elsewhere * self._num_micro_batches}) if elsewhere else Counter()

    # --- sharding ---

    def _sharding(self, stage: Stage) -> Counts:
        """Weights are gathered in the dtype of matmuls, gradients scattered in float32, unit by unit (FSDP2,
        arXiv:2304.11277), each parameter filled up to as many equal parts as there are ranks."""
        counts: Counts = Counter()
        if self.job.sharding == "none":
            return counts
        alone, micro_batches = self.job.layout.pp == 1, self._num_micro_batches
        each_time = alone and self.job.sharding == "weights"
        scatters = micro_batches if alone and self.job.sharding in ("gradients", "weights") else 1
        last: _Unit | None = None
        for unit in self._units(stage):
            gathers = 1
            if each_time:
                # For the forward pass and for the backward pass; what is in no layer stays in between.
                gathers = (1 if unit.is_ends else 2) * micro_batches
            counts[unit.gather] += gathers
            counts[unit.scatter] += scatters
            last = unit
        if each_time and last is not None and self._size("shards") == 1:
            # Where nothing is outside of layers, FSDP2 gathers ahead once too often: behind the first layer of one
            # micro-batch it sees the last layer of the micro-batch before.
            counts[last.gather] += micro_batches - 1
        return counts

    def _units(self, stage: Stage) -> Iterator["_Unit"]:
        """What is gathered together: experts, routers (whose weights stay float32), layers, and all that is not in a
        layer."""
        ends: list[str] = [
            p.name
            for p in (
                *(self.model.input_parameters() if stage.is_first else ()),
                *(self.model.output_parameters() if stage.is_last else ()),
            )
        ]
        if stage.is_last and not stage.is_first and self.model.tied_embeddings:
            ends.append("embedding.weight")
        yield from self._unit(ends, "shards", self._element, is_ends=True)
        for layer in stage.layers:
            names = self._names(layer)
            experts = [name for name in names if self._placements[name].parameter.expert]
            router = [name for name in names if name.startswith(f"layers.{layer}.mlp.router.")]
            if self._element == FLOAT32:
                router = []
            rest = [name for name in names if name not in experts and name not in router]
            yield from self._unit(experts, "expert_shards", self._element)
            yield from self._unit(router, "shards", FLOAT32)
            yield from self._unit(rest, "shards", self._element)

    def _unit(
        self, names: list[str], group: Group, element: int, *, is_ends: bool = False
    ) -> Iterator["_Unit"]:
        size, numbers = self._size(group), 0
        for name in names:
            placement = self._placements[name]
            cut = placement.cut(group)
            if cut is None:
                continue
            shape = list(placement.box(self._mates.__getitem__, kept=False).shape)
            shape[cut.dim] = -(-shape[cut.dim] // size) * size
            numbers += prod(shape)
        if numbers:
            yield _Unit(group, element, numbers, is_ends)

    def _names(self, layer: int) -> list[str]:
        for group in self.model.layer_groups():
            if group.first_layer <= layer < group.first_layer + group.num_layers:
                return [f"layers.{layer}.{parameter.name}" for parameter in group.parameters]
        raise KeyError(layer)

    # --- once a step ---

    def _after_backward(self) -> Counts:
        """What is left to sum of gradients, in buckets; the experts' loads; the gradient's norm; the loss."""
        counts: Counts = Counter()
        for (over, _), sizes in self._left().items():
            for bucket in _buckets(sizes):
                for group, num_parts in over:
                    narrow = 2 if group == "replica" and self.job.replica_sum == "bfloat16" else 1
                    counts[Collective("all-reduce", group, bucket * num_parts // narrow)] += 1
        mixtures = [
            mlp.num_experts
            for stage in self._stages
            for layer in stage.layers
            if isinstance(mlp := self.model.mlp_of(layer), MoeSpec)
        ]
        if mixtures:
            for group in _OTHER_TOKENS:
                if self._size(group) > 1:
                    counts[Collective("all-reduce", group, FLOAT32 * sum(mixtures))] += 1
        if self._size("group") > 1:
            # A square of every rank, added up by all in one order; and the sum of losses.
            counts[Collective("all-gather", "group", FLOAT64 * self._size("group"))] += 1
            counts[Collective("all-reduce", "group", FLOAT64)] += 1
        if self._size("replica") > 1:
            counts[Collective("all-reduce", "replica", FLOAT64)] += 1
        return counts

    def _whole_matrices(self) -> Counts:
        """Muon's: parts come together where a matrix is orthogonalised, and directions go back, in the dtype of
        matmuls."""
        counts: Counts = Counter()
        if self.optimizer == "muon":
            placements = [self._placements[name] for name in self._parameters_here()]
            matrices = [placement for placement in placements if placement.parameter.role == "matrix"]
            shapes = [placement.box(self._mates.__getitem__).shape for placement in matrices]
            stacked = [shape[0] if len(shape) == 3 else 1 for shape in shapes]
            for dealt in deal_out(matrices, stacked, self._mates.__getitem__):
                for group, num_sent in dealt.exchanges():
                    counts[Collective("all-to-all", group, self._element * num_sent)] += 1
        return counts

    def _left(self) -> dict[tuple[tuple[tuple[Group, int], ...], int | None], list[int]]:
        """Over which groups, how many different parts these hold, and the layer of what is summed between replicas
        alone: bytes of the gradients, in the model's order."""
        left: dict[tuple[tuple[tuple[Group, int], ...], int | None], list[int]] = {}
        for name in self._parameters_here():
            placement = self._placements[name]
            if placement.parameter.role in ("sparse_embedding", "balance"):
                continue
            over: list[tuple[Group, int]] = []
            if name == "embedding.weight" and self.model.tied_embeddings and self.job.layout.pp > 1:
                over.append(("ends", 1))  # the head at one end of the pipeline, the embedding at the other
            within: tuple[Group, ...] = (
                ("expert_tp", "expert_shards") if placement.parameter.expert else ("tp", "shards")
            )
            for group in (*within, "replica"):
                size, cut = self._size(group), placement.cut(group)
                if size == 1:
                    continue
                if cut is None:  # all ranks have all of it, and see other tokens
                    over.append((group, 1))
                elif cut.num_parts < size:  # neighbours have copies: each part in a row of its own
                    over.append((group, cut.num_parts))
            if over:
                box = placement.box(self._mates.__getitem__)
                layer = layer_of(name) if over == [("replica", 1)] else None
                left.setdefault((tuple(over), layer), []).append(FLOAT32 * prod(box.shape))
        return left

    def _parameters_here(self) -> Iterator[str]:
        seen = set()
        for stage in self._stages:
            names = [p.name for p in self.model.input_parameters()] if stage.is_first else []
            if stage.is_last and not stage.is_first and self.model.tied_embeddings:
                names.append("embedding.weight")
            for layer in stage.layers:
                names += self._names(layer)
            if stage.is_last:
                names += [p.name for p in self.model.output_parameters()]
            for name in names:
                if name not in seen:
                    seen.add(name)
                    yield name


def _norms_all_heads(attention: AttentionSpec) -> bool:
    return attention.qk_norm and attention.qk_norm_weights == "all_heads"


_SHARING_SEQUENCES: tuple[Group, ...] = ("cp", "tp")
_OTHER_TOKENS: tuple[Group, ...] = ("tp", "shards", "replica")


class _Unit(NamedTuple):
    group: Group
    element: int
    num_padded: int
    """Numbers of all ranks together."""
    is_ends: bool

    @property
    def gather(self) -> Collective:
        return Collective("all-gather", self.group, self.element * self.num_padded)

    @property
    def scatter(self) -> Collective:
        return Collective("reduce-scatter", self.group, FLOAT32 * self.num_padded)


def _buckets(sizes: list[int]) -> list[int]:
    """As parallel/sums.py fills them."""
    buckets: list[int] = []
    for size in sizes:
        if not buckets or buckets[-1] + size > BUCKET_BYTES:
            buckets.append(0)
        buckets[-1] += size
    return buckets
