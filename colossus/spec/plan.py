"""The plan: how a model trains on a fleet, as one frozen value.

The planner prints it, the simulator rehearses it, the launcher submits it, the trainer executes it. A plan file
holds the plan and its fingerprint, so that one that was edited or cut short is refused.
"""

import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from colossus.errors import ConfigError
from colossus.spec.base import Frozen, fingerprint
from colossus.spec.fleet import Fleet, NonNegative, Precision
from colossus.spec.goal import Goal
from colossus.spec.layout import Layout
from colossus.spec.model import Dtype, ModelSpec, Positive
from colossus.spec.ranged import Ranged
from colossus.spec.run import OptimizerKind

Schedule = Literal["none", "gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev"]
Recompute = Literal["none", "selective", "alternate", "full"]
"""What the backward pass computes again. `selective`: attention scores; `alternate`: those, elementwise parts and
every other matmul; `full`: each layer from its input."""
ContextExchange = Literal["ring", "all-gather", "all-to-all"]
"""How context-parallel ranks see each other's keys and values: sent round beside attention (arXiv:2310.01889), gathered
first (arXiv:2407.21783), or sequence parts traded for heads and back (arXiv:2309.14509)."""
Float8 = Literal["rowwise", "tensorwise", "transformer_engine"]
"""How matmuls in FP8 are scaled, and whose they are: a scale for each row, or one for each tensor, by torch; or one for
each tensor by Transformer Engine, an optional library for CUDA."""
Sharding = Literal["none", "optimizer", "gradients", "weights"]
"""What is split over the shard axis besides the samples: ZeRO stages 0 to 3 (arXiv:1910.02054); 3 is FSDP."""


class PoolShare(Frozen):
    """What the replica groups of one pool do in each step. Groups differ in nothing else."""

    node: str
    """The pool, by the name of its nodes."""
    num_groups: Positive
    micro_batch_sequences: Positive
    num_micro_batches: Positive
    """Per step, on each data-parallel rank of a group."""
    recompute: Recompute
    spare_nodes: NonNegative = 0
    """Held ready to replace broken ones."""
    idle_chips: NonNegative = 0
    """Left over: no whole group fits into them."""
    busy_s: float
    """What one step takes these groups by themselves; the slowest pool sets the pace."""
    memory_bytes: dict[str, int]
    """On the fullest rank, by what holds it."""
    memory_limit_bytes: Positive

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory_bytes.values())


class Estimate(Frozen):
    """What the planner predicts, to be set beside what is measured."""

    step_time_s: Ranged
    step_parts_s: dict[str, float]
    """Where the likely step time goes, on the rank that sets the pace; the parts add up to it."""
    tokens_per_s: Ranged
    mfu: Ranged
    memory_bytes: Ranged
    """Peak on the fullest rank of the fleet."""
    days: Ranged
    """Wall time of the whole run, interruptions included."""
    goodput: Ranged
    """Share of wall time spent on steps that are kept, with the better of the two policies of recovery."""
    goodput_whole_job: Ranged
    """The same when every failure restarts the whole job."""
    interruptions_per_day: Ranged
    interruptions_by_cause: dict[str, float]
    checkpoint_interval_s: float
    facility_watts: Ranged
    energy_mwh: Ranged
    water_m3: Ranged
    co2_t: Ranged
    cost_usd: Ranged
    """Rented, where rents of all chips are known; else owned."""
    cost_owned_usd: Ranged


class Alternative(Frozen):
    """The best plan that differs in one field."""

    value: str
    step_time_ratio: float
    """Its seconds per token over the plan's."""


class Plan(Frozen):
    """How a model trains on a fleet; every choice with its reason."""

    model: ModelSpec
    fleet: Fleet
    goal: Goal
    tokens: Positive
    """Trained in the whole run."""
    sequence_tokens: Positive
    precision: Precision
    """What most matmuls run in; master weights are float32."""
    optimizer: OptimizerKind = "adamw"
    """What time, memory and exchanges are those of: a run by this plan trains with it."""
    optimizer_state: Dtype = "float32"
    """What averages of gradients are kept in."""
    replica_sum: Dtype = "float32"
    """What gradients travel in between replica groups; within a group they are summed in float32."""
    float8: Float8 = "rowwise"
    """Of a plan in FP8: its recipe."""
    wide_matmuls: tuple[str, ...] = ()
    """Of a plan in FP8: linear maps, by name or pattern (`layers.0.*`), that stay in bfloat16."""
    layout: Layout
    expert_tp: Positive = 1
    """Ranks that one expert is split over."""
    context_exchange: ContextExchange | None = None
    """None where no sequence is split (cp 1)."""
    sharding: Sharding
    schedule: Schedule
    virtual_stages: Positive = 1
    stage_layers: tuple[NonNegative, ...]
    """Layers of each pipeline rank."""
    pools: Annotated[tuple[PoolShare, ...], Field(min_length=1)]
    estimate: Estimate
    reasons: dict[str, str]
    """Why each field is what it is, a sentence each."""
    alternatives: dict[str, Alternative] = Field(default_factory=dict)
    """By field: what the next-best choice would have cost."""
    advice: tuple[str, ...] = ()
    """The few sentences an expert would say."""

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        groups = sum(pool.num_groups for pool in self.pools)
        if groups != self.layout.replica:
            raise ValueError(
                f"the pools run {groups} replica groups, and the layout has {self.layout.replica}"
            )
        if len(self.stage_layers) != self.layout.pp or sum(self.stage_layers) != self.model.num_layers:
            raise ValueError(
                f"{len(self.stage_layers)} stages of {sum(self.stage_layers)} layers, for pp {self.layout.pp} and "
                f"{self.model.num_layers} layers"
            )
        return self

    @property
    def global_batch_sequences(self) -> int:
        return sum(
            pool.num_groups * self.layout.shard * pool.micro_batch_sequences * pool.num_micro_batches
            for pool in self.pools
        )

    @property
    def step_tokens(self) -> int:
        return self.global_batch_sequences * self.sequence_tokens

    @property
    def num_steps(self) -> int:
        return -(-self.tokens // self.step_tokens)

    def to_json(self) -> str:
        """The text of a plan file; `from_json` gives back an equal plan."""
        plain = {"fingerprint": self.fingerprint(), "plan": self.model_dump(mode="json")}
        return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str = "plan") -> Self:
        """Raises ConfigError where the text is no plan file, was cut short, or was edited."""
        try:
            plain = json.loads(text)
        except ValueError as error:
            raise ConfigError(
                f"{origin} is not a plan file: {error}; it may have been cut short: plan again with --out"
            ) from None
        if not isinstance(plain, dict) or not isinstance(plain.get("plan"), dict):
            raise ConfigError(
                f"{origin} is not a plan file: that is an object with 'fingerprint', and 'plan', an object too"
            )
        try:
            plan = cls.model_validate_json(json.dumps(plain["plan"]))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{origin} is not a plan that can be run: {place}: {first['msg']}") from None
        # Of what the file says: a version with more fields reads it too.
        if plain.get("fingerprint") != (found := fingerprint(plain["plan"])):
            raise ConfigError(
                f"{origin} was edited after it was planned: its fingerprint is {plain.get('fingerprint')}, its content "
                f"has {found}; plan again, fixing what you want with --fix"
            )
        return plan

    @classmethod
    def load(cls, path: Path) -> Self:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the plan {path}: {error}") from None
        return cls.from_json(text, str(path))
