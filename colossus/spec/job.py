"""What all ranks execute: a plan without its fleet, estimates and reasons. No torch."""

from typing import Annotated, NamedTuple, Self

from pydantic import Field, model_validator

from colossus.spec.base import Frozen, Positive
from colossus.spec.fleet import Precision
from colossus.spec.layout import Layout
from colossus.spec.model import Dtype
from colossus.spec.plan import ContextExchange, Float8, Plan, Recompute, Schedule, Sharding
from colossus.spec.stages import Stage, pipeline_stages


class Share(Frozen):
    """What each of some replica groups, those of one pool, does in a step."""

    num_groups: Positive = 1
    micro_batch_sequences: Positive = 1
    num_micro_batches: Positive = 1
    """On each of the group's `shard` ranks."""
    recompute: Recompute = "none"

    @property
    def rank_sequences(self) -> int:
        """Of a step, on each of a group's `shard` ranks."""
        return self.micro_batch_sequences * self.num_micro_batches


class Samples(NamedTuple):
    """Consecutive samples of a step: the first, counted from the step's own first, and how many."""

    first: int
    num_sequences: int


class Job(Frozen):
    """How a step is executed, by every rank of it. Where ranks differ (stage, pool), it says for each."""

    layout: Layout = Layout()
    expert_tp: Positive = 1
    context_exchange: ContextExchange | None = None
    sharding: Sharding = "none"
    schedule: Schedule = "none"
    virtual_stages: Positive = 1
    stage_layers: tuple[int, ...]
    """Layers of each pipeline rank."""
    sequence_tokens: Positive
    precision: Precision = "float32"
    optimizer_state: Dtype = "float32"
    replica_sum: Dtype = "float32"
    float8: Float8 = "rowwise"
    wide_matmuls: tuple[str, ...] = ()
    shares: Annotated[tuple[Share, ...], Field(min_length=1)] = (Share(),)
    """Of the replica groups, in order: the first ones are the first pool's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        groups = sum(share.num_groups for share in self.shares)
        if groups != self.layout.replica:
            raise ValueError(
                f"the shares are for {groups} replica groups, and the layout has {self.layout.replica}"
            )
        if len(self.stage_layers) != self.layout.pp:
            raise ValueError(
                f"stage_layers has {len(self.stage_layers)} stages, and the layout has pp {self.layout.pp}"
            )
        return self

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """What a plan's ranks execute."""
        return cls(
            **{name: getattr(plan, name) for name in cls.model_fields if name != "shares"},
            shares=tuple(
                Share(**{name: getattr(pool, name) for name in Share.model_fields}) for pool in plan.pools
            ),
        )

    @property
    def global_batch_sequences(self) -> int:
        return sum(self._group_sequences)

    @property
    def step_tokens(self) -> int:
        return self.global_batch_sequences * self.sequence_tokens

    @property
    def stages(self) -> tuple[Stage, ...]:
        return pipeline_stages(self.stage_layers, self.schedule, self.virtual_stages)

    def share(self, rank: int) -> Share:
        """What `rank`'s replica group does."""
        return self._share_of_groups[self.layout.coordinates(rank).replica]

    def samples(self, rank: int) -> Samples:
        """Which samples of a step `rank` trains on, as do all ranks that differ from it in pp, cp and tp alone."""
        here = self.layout.coordinates(rank)
        before = sum(self._group_sequences[: here.replica])
        num = self._share_of_groups[here.replica].rank_sequences
        return Samples(before + here.shard * num, num)

    @property
    def _share_of_groups(self) -> list[Share]:
        return [share for share in self.shares for _ in range(share.num_groups)]

    @property
    def _group_sequences(self) -> list[int]:
        return [self.layout.shard * share.rank_sequences for share in self._share_of_groups]
