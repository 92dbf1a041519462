"""How one rank runs its part of a step on the machine at hand. The trainer executes it, with no settings beside it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from colossus.spec.base import Frozen
from colossus.spec.layout import Layout
from colossus.spec.model import Dtype, Positive

Float32Library = Literal["default", "onednn"]
"""Who computes float32 matmuls on a CPU: torch's default (MKL or OpenBLAS), or oneDNN."""


class Machine(Frozen):
    """The machine at hand as the planner sees it; rates are measured, not looked up."""

    chip: str
    """What the system calls the processor or GPU."""
    kind: str
    """Torch's name of the device type: `cpu` or `cuda`."""
    num_threads: Positive
    memory_bytes: Positive
    baseline_bytes: Annotated[int, Field(ge=0)]
    """What the process holds before it builds a model: interpreter, torch, tokenizer."""
    matmul_flops: dict[Dtype, float]
    """FLOP/s of a large square matmul in each dtype, with `num_threads` threads."""
    float32_library: Float32Library = "default"
    """The faster one that keeps float32's precision."""
    compiled_before: bool
    """Whether torch.compile's cache holds kernels for this model and batch: compiling then takes seconds."""


class Memory(Frozen):
    """Bytes that one rank's process holds at its peak, by what holds them."""

    baseline_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    loss_bytes: int
    workspace_bytes: int = 0
    """What arithmetic needs for itself: a layer's backward pass, the optimizer, the libraries."""
    fragmentation_bytes: int = 0
    """What the allocator holds and cannot use."""
    checkpoint_bytes: int = 0
    """The copy of the state that is written while training goes on."""

    @property
    def total_bytes(self) -> int:
        return sum(self.model_dump().values())


class RankEstimate(Frozen):
    """What the planner predicts, to be set beside what is measured."""

    memory: Memory
    flops_per_step: float
    step_time_s: float


class RankPlan(Frozen):
    """One frozen value: made by the planner for one rank, executed by the trainer."""

    layout: Layout
    machine: Machine
    micro_batch_sequences: Positive
    num_micro_batches: Positive
    """Micro-batches that each replica group runs per step."""
    sequence_tokens: Positive
    dtype: Dtype
    """What matmuls run in; weights and optimizer state are float32."""
    compile: bool
    loss_chunk_tokens: Positive
    """Tokens whose logits stand in memory at once."""
    estimate: RankEstimate
    reasons: dict[str, str]
    """Why each field is what it is, by field name, a sentence each."""

    @property
    def global_batch_sequences(self) -> int:
        return self.layout.replica * self.num_micro_batches * self.micro_batch_sequences

    @property
    def step_tokens(self) -> int:
        return self.global_batch_sequences * self.sequence_tokens

    @model_validator(mode="after")
    def _reasons_are_of_fields(self) -> Self:
        unknown = set(self.reasons) - set(type(self).model_fields)
        if unknown:
            raise ValueError(f"reasons given for what a plan does not have: {', '.join(sorted(unknown))}")
        return self
