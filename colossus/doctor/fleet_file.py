"""What has been measured, as a fleet's file: one chip, one node of such chips, and where each number is from."""

from typing import Any

from colossus.hardware.this_machine import this_machine
from colossus.spec.fleet import Chip, Node
from colossus.spec.measured import Measured


def fleet_toml(
    found: dict[str, Any],
    *,
    name: str,
    source: str,
    num_ranks: int,
    num_threads: int,
    memory_bytes: int,
    disk: tuple[float, float] | None = None,
    device: dict[str, Any] | None = None,
) -> str:
    """The file: `num_ranks` chips on one node, each what one rank had to itself while all ranks were busy.

    found: of `measure_ranks`. memory_bytes: of the whole machine. disk: bytes/s written and read. device: fields of
    the chip that only a GPU has; a CPU's are taken from this machine.
    """
    import tomli_w

    measured = Measured.model_validate(
        {
            **{key: found[key] for key in found if key != "memory_bandwidth"},
            "source": source,
            "num_ranks": num_ranks,
            "num_threads": num_threads,
            "disk_write_bytes_per_s": disk and disk[0],
            "disk_read_bytes_per_s": disk and disk[1],
        }
    )
    machine = this_machine()
    best = {
        dtype: max(p.flops / p.seconds for p in measured.matmuls if p.dtype == dtype)
        for dtype in dict.fromkeys(p.dtype for p in measured.matmuls)
    }
    chip_name = f"{name}-rank"
    chip = Chip(
        **{
            "name": chip_name,
            "generation": "cpu",
            "peak_flops": best,
            "memory_bytes": memory_bytes // num_ranks,
            "memory_bandwidth": found["memory_bandwidth"],
            "num_cores": num_threads,
            "power_watts": machine.chip.power_watts / num_ranks,
            "idle_watts": machine.chip.idle_watts / num_ranks,
            "source": source,
            "sources": {
                "memory_bytes": "as the system reports it, an equal part for each rank",
                "num_cores": "threads of a rank",
                "power_watts": f"{machine.chip.source}; an equal part for each rank",
                "idle_watts": "assumed like power_watts",
            },
            "note": "peak_flops is the fastest matmul that was measured; a rank is a process, and counts as a chip.",
            "measured": measured,
            **(device or {}),
        }
    )
    bandwidth, how = _link_rate(measured)
    node = Node(
        name=name,
        chip=chip,
        num_chips=num_ranks,
        scale_up_chips=num_ranks,
        scale_up_bandwidth=bandwidth or machine.scale_up_bandwidth,
        nic_bandwidth=machine.nic_bandwidth,
        power_watts=max(machine.power_watts, num_ranks * chip.power_watts),
        source=source,
        sources={
            "scale_up_bandwidth": how if bandwidth else machine.source,
            "nic_bandwidth": machine.source,
            "power_watts": machine.source,
            "num_chips": "ranks that were measured together",
            "scale_up_chips": "all ranks share one machine",
        },
    )
    plain_node = node.model_dump(mode="json", exclude_none=True, exclude={"name", "chip"})
    table = {
        "name": name,
        "fabric": "single-node",
        "site": "home",
        "note": source,
        "pool": [{"node": name, "count": 1}],
        "node": {name: {"chip": chip_name, **plain_node}},
        "chip": {chip_name: chip.model_dump(mode="json", exclude_none=True, exclude={"name"})},
    }
    return tomli_w.dumps(_shortened(table))


def _link_rate(measured: Measured) -> tuple[float | None, str]:
    """Bytes/s of the largest message that was sent."""
    for curve in measured.collectives:
        if curve.kind == "send":
            return curve.sizes[-1] / curve.seconds[
                -1
            ], f"{measured.source}: sends of {curve.sizes[-1]:,} bytes"
    return None, ""


def _shortened(value: Any) -> Any:
    """Four digits of each number with a fraction: more were not measured."""
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
