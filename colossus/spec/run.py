"""A whole run as one value: what recipes return, what a TOML file spells out, what the trainer receives."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from colossus.spec.base import Frozen
from colossus.spec.data import DataConfig
from colossus.spec.duration import Duration
from colossus.spec.model import Dtype, ModelSpec, Positive
from colossus.spec.rank import RankPlan

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Batch(Frozen):
    """What one step trains on, whatever machine it runs on."""

    sequences: Positive = 8
    sequence_tokens: Positive = 256

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_tokens


OptimizerKind = Literal["adamw", "muon"]


class AdamW(Frozen):
    """AdamW (arXiv:1711.05101). Weight decay acts on matrices only, never on norms and embeddings."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat = 3e-3
    embedding_learning_rate: PositiveFloat | None = None
    """For the embedding's rows; None: `learning_rate`."""
    head_learning_rate: PositiveFloat | None = None
    """For the head; None: `learning_rate`."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    epsilon: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    sparse_learning_rate: PositiveFloat = 0.2
    """For tables of which a step touches few rows; they take row-wise Adagrad."""


class Muon(Frozen):
    """Muon for matrices: momentum whose update is made orthogonal (Newton-Schulz); AdamW for all the rest."""

    kind: Literal["muon"] = "muon"
    learning_rate: PositiveFloat = 0.02
    momentum: Fraction = 0.95
    newton_schulz_steps: Annotated[int, Field(ge=1, le=10)] = 5
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    rest: AdamW = AdamW()

    @property
    def sparse_learning_rate(self) -> float:
        return self.rest.sparse_learning_rate


OPTIMIZERS: dict[OptimizerKind, AdamW | Muon] = {"adamw": AdamW(), "muon": Muon()}
"""Each kind as it is where nothing is said of it."""


class WarmupStableDecay(Frozen):
    """Rise, stay, fall: the learning rate's multiplier is 1 until the last `decay_fraction` of the run, then
    falls in a straight line to `final_scale`."""

    kind: Literal["wsd"] = "wsd"
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    decay_fraction: Fraction = 0.4
    final_scale: Fraction = 0.0


class Cosine(Frozen):
    """Rise, then half a cosine from 1 down to `final_scale` over the whole run."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    final_scale: Fraction = 0.1


class Routing(Frozen):
    """What keeps the routers of a mixture of experts from favouring few experts. Without a mixture it does nothing."""

    balance_loss: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the load-balance loss, per sequence (arXiv:2101.03961, arXiv:2412.19437)."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log-partition of router logits (arXiv:2202.08906)."""
    balancing_step: Annotated[float, Field(ge=0)] = 0.001
    """How far a step moves a balancing bias, for models that have them (arXiv:2408.15664); follows the schedule."""


class Checkpoints(Frozen):
    """When the state is written, and what is kept."""

    every: Duration = Duration(amount=60, unit="seconds")
    keep_last: Positive = 2
    keep_every_steps: Positive | None = None
    """Checkpoints at multiples of this many steps are kept for good."""


class Evaluation(Frozen):
    """When held-out loss is measured, and on how much."""

    every: Duration = Duration(amount=30, unit="seconds")
    max_tokens: Positive | None = 32_768
    """Held-out tokens looked at in the course of the run; None: all. The closing figure is over all."""


class Fixed(Frozen):
    """What the planner is not to choose. None: it chooses, and says why."""

    dtype: Dtype | None = None
    compile: bool | None = None
    micro_batch_sequences: Positive | None = None
    """A divisor of `batch.sequences`."""


class RunConfig(Frozen):
    """Everything that decides a run. Two runs with equal configs on one machine are equal bit for bit, save
    that a budget of time ends where the clock says."""

    name: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    model: ModelSpec
    data: DataConfig = DataConfig()
    batch: Batch = Batch()
    budget: Duration = Duration(amount=180, unit="seconds")
    optimizer: Annotated[AdamW | Muon, Field(discriminator="kind")] = Muon()
    schedule: Annotated[WarmupStableDecay | Cosine, Field(discriminator="kind")] = WarmupStableDecay()
    gradient_clip: PositiveFloat | None = 1.0
    """Largest norm of the whole gradient; None: no clipping."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log-partition in the loss (arXiv:2204.02311); keeps logits from drifting."""
    routing: Routing = Routing()
    max_skipped_steps: Positive = 5
    """Steps in a row whose loss or gradient may be non-finite before the run stops."""
    checkpoints: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    fixed: Fixed = Fixed()
    plan: RankPlan | None = None
    """How it runs on the machine; None in what people write: the planner fills it in."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch.sequence_tokens > self.model.context_tokens:
            raise ValueError(
                f"batch.sequence_tokens is {self.batch.sequence_tokens}, but model.context_tokens is "
                f"{self.model.context_tokens}; shorten the sequences or lengthen the context"
            )
        tokenizer = self.data.tokenizer
        if tokenizer.kind == "bpe" and tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"data.tokenizer.vocab_size is {tokenizer.vocab_size}, but model.vocab_size is "
                f"{self.model.vocab_size}; the model needs a row for every token"
            )
        micro_batch = self.fixed.micro_batch_sequences
        if micro_batch is not None and self.batch.sequences % micro_batch:
            raise ValueError(
                f"fixed.micro_batch_sequences is {micro_batch}, which does not divide batch.sequences, "
                f"{self.batch.sequences}"
            )
        if self.plan is not None:
            planned = (self.plan.global_batch_sequences, self.plan.sequence_tokens)
            if planned != (self.batch.sequences, self.batch.sequence_tokens):
                raise ValueError(
                    f"the plan is for {planned[0]} sequences of {planned[1]} tokens a step, but batch asks "
                    f"for {self.batch.sequences} of {self.batch.sequence_tokens}; remove [plan] to have it "
                    f"planned anew"
                )
        return self

    def total_steps(self) -> int | None:
        """Steps of the whole run where the budget fixes them; None for a budget of time."""
        match self.budget.unit:
            case "steps":
                return math.ceil(self.budget.amount)
            case "tokens":
                return math.ceil(self.budget.amount / self.batch.tokens)
            case _:
                return None
