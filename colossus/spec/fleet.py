"""What there is to train on: chips in nodes, nodes in pools, pools on a fabric at a site.

Rates are per chip and per direction, in base units (FLOP/s, bytes/s, bytes, watts), as specified by the
vendor; what software reaches of them is the planner's business, not the catalog's.
"""

from datetime import date
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from colossus.errors import ConfigError
from colossus.spec.base import Frozen
from colossus.spec.measured import Measured
from colossus.spec.model import Positive
from colossus.spec.ranged import Ranged

Rate = Annotated[float, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Generation = Literal["volta", "ampere", "ada", "hopper", "blackwell", "cpu"]
Precision = Literal["float32", "float16", "bfloat16", "fp8", "mxfp8", "nvfp4"]
"""What matmuls run in. `mxfp8` and `nvfp4` are the block-scaled formats of Blackwell."""


class Sourced(Frozen):
    """A catalog entry: where its numbers come from, and for single numbers from elsewhere, from where."""

    name: str
    source: str
    sources: dict[str, str] = Field(default_factory=dict)
    """By field name, for those numbers that `source` does not cover."""
    note: str = ""

    @model_validator(mode="after")
    def _sources_are_of_fields(self) -> Self:
        unknown = set(self.sources) - set(type(self).model_fields)
        if unknown:
            raise ValueError(f"sources of what {self.name} does not have: {', '.join(sorted(unknown))}")
        return self


class Chip(Sourced):
    """One GPU, or one CPU socket."""

    generation: Generation
    peak_flops: dict[Precision, Rate]
    """Dense, without sparsity. A precision that is absent cannot be run."""
    memory_bytes: Positive
    memory_bandwidth: Rate
    """Bytes/s."""
    num_cores: Positive
    """Streaming multiprocessors of a GPU (matmul tiles run in waves over them), cores of a CPU."""
    power_watts: Rate
    """The limit the board is run at."""
    idle_watts: Rate
    price_usd: Ranged | None = None
    measured: Measured | None = None
    """What it was measured to do; the estimate then takes this in place of fitted constants."""


class Node(Sourced):
    """One server or, where one NVLink domain spans a rack, one rack."""

    chip: Chip
    num_chips: Positive
    scale_up_chips: Positive
    """Chips of one NVLink (or in-socket) domain; at most `num_chips`."""
    scale_up_bandwidth: Rate
    """Bytes/s per chip per direction within that domain."""
    nic_bandwidth: Rate
    """Bytes/s per chip per direction into the fabric."""
    power_watts: Rate
    """Rating of the whole node: chips, CPUs, memory, NICs, fans."""
    price_usd: Ranged | None = None

    @model_validator(mode="after")
    def _domain_fits(self) -> Self:
        if self.num_chips % self.scale_up_chips:
            raise ValueError(
                f"node {self.name}: {self.num_chips} chips do not divide into NVLink domains of {self.scale_up_chips}"
            )
        return self


class Tier(Frozen):
    """One level of switches between nodes, from the leaves up."""

    name: str
    num_chips: Positive
    """Chips that one block of this tier connects (for the top tier: the most it can connect)."""
    oversubscription: Annotated[float, Field(ge=1)] = 1.0
    """Bandwidth into this tier from below, over its bandwidth up to it: 1 is full bisection, 7 a seventh."""
    latency_s: Rate
    """One way between two chips whose lowest common tier this is, NICs included."""


class Fabric(Sourced):
    """The network between nodes."""

    kind: Literal["infiniband", "ethernet", "nvlink", "none"]
    switch_ports: NonNegative
    """Ports of one switch at the speed of a chip's NIC."""
    efficiency: Annotated[float, Field(gt=0, le=1)]
    """Share of line rate that large transfers reach under load (congestion, hash collisions)."""
    in_network_reduction: bool = False
    """Switches add (SHARP): an all-reduce sends each byte once."""
    tiers: Annotated[tuple[Tier, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _tiers_grow(self) -> Self:
        reach = [tier.num_chips for tier in self.tiers]
        if reach != sorted(set(reach)):
            raise ValueError(
                f"fabric {self.name}: tiers must grow, from the leaves up, but connect {reach} chips"
            )
        return self

    @property
    def max_chips(self) -> int:
        return self.tiers[-1].num_chips if self.tiers else 0


class PowerLimit(Frozen):
    """From `since` on, the site can feed `facility_watts`, cooling included."""

    since: date
    facility_watts: Rate


class Site(Sourced):
    """Where the fleet stands: power, cooling, carbon, prices."""

    power_limits: Annotated[tuple[PowerLimit, ...], Field(strict=False)] = ()
    """In order of time; none: as much as is needed."""
    pue: Ranged
    """Facility energy over the energy of the computers."""
    wue_litres_per_kwh: Ranged
    """Water used on site per kWh of the computers' energy."""
    carbon_kg_per_kwh: Ranged
    electricity_usd_per_kwh: Ranged


class Pool(Frozen):
    """All nodes of one kind in a fleet."""

    node: Node
    num_nodes: Positive

    @property
    def chip(self) -> Chip:
        return self.node.chip

    @property
    def num_chips(self) -> int:
        return self.num_nodes * self.node.num_chips


class Fleet(Sourced):
    """Pools on one fabric at one site."""

    pools: Annotated[tuple[Pool, ...], Field(min_length=1)]
    fabric: Fabric
    site: Site

    @property
    def num_chips(self) -> int:
        return sum(pool.num_chips for pool in self.pools)

    @property
    def num_nodes(self) -> int:
        return sum(pool.num_nodes for pool in self.pools)

    @property
    def memory_bytes(self) -> int:
        """Of all chips together."""
        return sum(pool.num_chips * pool.chip.memory_bytes for pool in self.pools)

    @property
    def power_watts(self) -> float:
        """Rating of all nodes together, without switches and cooling."""
        return sum(pool.num_nodes * pool.node.power_watts for pool in self.pools)

    def peak_flops(self, precision: Precision) -> float:
        """Of all chips together, dense. Raises ConfigError when one of them cannot run the precision."""
        for pool in self.pools:
            if precision not in pool.chip.peak_flops:
                raise ConfigError(
                    f"{pool.chip.name} cannot run {precision} matmuls; it runs {', '.join(pool.chip.peak_flops)}"
                )
        return sum(pool.num_chips * pool.chip.peak_flops[precision] for pool in self.pools)

    def check(self) -> None:
        """Raises ConfigError when the fabric cannot connect what hangs on it."""
        if self.num_nodes > 1 and not self.fabric.tiers:
            raise ConfigError(
                f"fleet {self.name} has {self.num_nodes:,} nodes, and fabric {self.fabric.name} connects none; "
                "it takes a fabric with switches, for example infiniband-ndr-3-tier"
            )
        if self.num_nodes > 1 and self.num_chips > self.fabric.max_chips:
            raise ConfigError(
                f"fleet {self.name} has {self.num_chips:,} chips, and fabric {self.fabric.name} with "
                f"{len(self.fabric.tiers)} tiers of {self.fabric.switch_ports}-port switches connects at most "
                f"{self.fabric.max_chips:,}; it would take another tier, or larger switches"
            )
