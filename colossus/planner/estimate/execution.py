"""How a step is executed and on what: the columns of a candidate beside its model's shape."""

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from colossus.planner.estimate import measured
from colossus.planner.estimate.columns import Array, Columns
from colossus.planner.estimate.measured import MeasuredRates
from colossus.spec.fleet import Generation, Node, Precision

RECOMPUTE: Final = ("none", "selective", "alternate", "full")
"""What the backward pass computes again. `selective`: the attention scores (arXiv:2205.05198); `alternate`:
those, elementwise parts and every other matmul; `full`: each layer from its input."""
SHARDING: Final = ("none", "optimizer", "gradients", "weights")
"""What is split over the shard axis besides the samples (ZeRO stages 0 to 3, arXiv:1910.02054)."""

EXCHANGES: Final = ("ring", "all-gather", "all-to-all")
"""Keys and values go round the ranks beside attention (arXiv:2310.01889); or each rank gathers all of them first
(arXiv:2407.21783); or ranks trade sequence parts for heads and back (arXiv:2309.14509)."""
FASTEST_EXCHANGE: Final = 3.0
"""Whichever of them takes least."""


@dataclass(frozen=True, slots=True)
class Execution(Columns):
    """Layout and schedule of one step."""

    sequence: Array
    """Tokens of one sequence."""
    micro_batch: Array
    """Sequences that a replica group passes at once, on one data-parallel rank."""
    micro_batches: Array
    """Micro-batches per step on one data-parallel rank."""
    tp: Array
    pp: Array
    chunks: Array
    """Virtual stages per rank."""
    cp: Array
    data: Array
    """Data-parallel ranks: replica × shard."""
    shard: Array
    """Of these, the ranks that share one copy of what is sharded."""
    sharding: Array
    """Index into SHARDING."""
    ep: Array
    expert_tp: Array
    """Ranks that one expert is split over."""
    recompute: Array
    """Index into RECOMPUTE."""
    sequence_parallel: Array
    """1 where norms and residuals are split over the tensor-parallel ranks too."""
    flash: Array
    """1 where attention scores never leave the chip's cache (arXiv:2205.14135)."""
    fused: Array
    """1 where elementwise operations are fused into few kernels."""
    few_launches: Array
    """1 where the host starts few kernels: compiled or captured in graphs."""
    score_traffic: Array
    """Memory traffic of unfused attention over that of one with a fused softmax; of no meaning with `flash`."""
    overlap_data: Array
    """1 where gradients are summed while the backward pass goes on."""
    overlap_tensor: Array
    """1 where tensor-parallel collectives run piecewise beside their matmuls."""
    overlap_experts: Array
    """1 where tokens travel to and from experts beside another micro-batch's compute."""
    one_copy_per_node: Array
    """1 where a token goes to a node once, however many of its experts are there."""
    gradient_bytes: Array
    """Bytes per gradient element on the network."""
    exchange: Array = field(default_factory=lambda: np.zeros(()))
    """How context-parallel ranks see each other's keys and values: index into EXCHANGES, or FASTEST_EXCHANGE."""
    keeps_gathered: Array = field(default_factory=lambda: np.zeros(()))
    """1 where what tensor-parallel ranks gather for a matmul is kept for the backward pass and not gathered again."""
    muon: Array = field(default_factory=lambda: np.zeros(()))
    """1 where matrices take Muon, 0 where all take AdamW."""
    state_bytes: Array = field(default_factory=lambda: 4.0 * np.ones(()))
    """Bytes of each number that the optimizer keeps."""
    whole_groups: Array = field(default_factory=lambda: np.zeros(()))
    """1 where ranks of one replica group stand side by side, its pipelines among them; 0 where all data-parallel ranks
    of a stage stand between it and the next one."""


@dataclass(frozen=True, slots=True)
class Hardware(Columns):
    """What the vendors specify, per chip and per direction."""

    peak_flops: Array
    """Dense, in the precision of most matmuls."""
    wide_flops: Array
    """Dense, in 16 bits: attention and the head, whatever the other matmuls run in."""
    narrow: Array
    """1 where matmuls run in 8 bits or fewer: tensors are cast and their scales found."""
    activation_bytes: Array
    """Bytes per element of what modules hand each other: 4 in float32, else 2."""
    memory_bandwidth: Array
    num_cores: Array
    power_share: Array
    """Power limit over that of the generation's usual board; 1 where it is not lower."""
    scale_up_chips: Array
    scale_up_bandwidth: Array
    nic_bandwidth: Array
    domain_reduces: Array = field(default_factory=lambda: np.zeros(()))
    """1 where the switches of the scale-up domain add (NVLink SHARP)."""
    fabric_reduces: Array = field(default_factory=lambda: np.zeros(()))
    """1 where the switches between nodes add (SHARP)."""
    measured: MeasuredRates | None = None
    """What the chip was measured to do, which then counts in place of what is specified; shared by all rows."""
    dtype: Array = field(default_factory=lambda: np.zeros(()))
    """Which of the measured dtypes matmuls run in."""

    @classmethod
    def of(
        cls,
        node: Node,
        precision: Precision,
        *,
        nic_bandwidth: float | None = None,
        scale_up_chips: int | None = None,
    ) -> "Hardware":
        """One node's, with matmuls in `precision`; what a particular fabric or rack changes can be given."""
        chip = node.chip
        wide: Precision = "bfloat16" if precision in NARROW else precision
        return cls(
            **{
                name: np.asarray(float(value))
                for name, value in {
                    "peak_flops": chip.peak_flops[precision],
                    "wide_flops": chip.peak_flops[wide],
                    "narrow": precision in NARROW,
                    "activation_bytes": 4.0 if precision == "float32" else 2.0,
                    "memory_bandwidth": chip.memory_bandwidth,
                    "num_cores": chip.num_cores,
                    "power_share": min(1.0, chip.power_watts / USUAL_POWER_WATTS.get(chip.generation, 1.0)),
                    "scale_up_chips": scale_up_chips or node.scale_up_chips,
                    "scale_up_bandwidth": node.scale_up_bandwidth,
                    "nic_bandwidth": nic_bandwidth or node.nic_bandwidth,
                    "dtype": measured.index_of(chip, precision),
                }.items()
            },
            measured=measured.rates(chip.measured) if chip.measured else None,
        )


NARROW: Final = ("fp8", "mxfp8", "nvfp4")
USUAL_POWER_WATTS: Final[dict[Generation, float]] = {
    "volta": 300.0, "ampere": 400.0, "hopper": 700.0, "blackwell": 1000.0,
}  # fmt: skip
"""Of the boards that the constants were fitted on (A100 SXM, H100 SXM, B200)."""
