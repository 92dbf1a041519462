"""Time of collectives between ranks, by the tiers they cross.

Ranks are numbered tensor-parallel first, then context, data and pipeline (in our own trainer: shards, pipeline and then
replicas), and fill a scale-up domain (NVLink) before the next one. A group of `size` ranks that lie `stride` apart
therefore has `inside` members in one domain; what leaves it goes through the members' own NICs, side by side.
"""

import numpy as np

from colossus.planner.estimate.columns import Array
from colossus.planner.estimate.constants import Constants
from colossus.planner.estimate.execution import Hardware
from colossus.spec.measured import CollectiveKind


def members_inside(size: Array, stride: Array, hardware: Hardware) -> Array:
    """Members of a group that share one scale-up domain."""
    return np.asarray(np.clip(np.floor(hardware.scale_up_chips / stride), 1.0, np.maximum(size, 1.0)))


def _measured_s(
    kinds: tuple[CollectiveKind, ...], size_bytes: Array, size: Array, inside: Array, hardware: Hardware
) -> Array | None:
    """The mean over `kinds` as they were measured on one node; None where they were not, or where any group leaves
    its node."""
    if hardware.measured is None or np.any((size > 1.0) & (inside < size)):
        return None
    times = [hardware.measured.collective_s(kind, size_bytes, size) for kind in kinds]
    known = [time for time in times if time is not None]
    if not known:
        return None
    return np.where(size > 1.0, sum(known) / len(known), 0.0)


def ring_s(size_bytes: Array, size: Array, stride: Array, hardware: Hardware, constants: Constants) -> Array:
    """Seconds of one reduce-scatter or all-gather of `size_bytes` (the whole tensor's); an all-reduce is both.

    Each rank sends (n − 1)/n of the tensor. Rings enter and leave a domain once, so that its members' NICs
    carry one share each; the slower of NVLink and NICs sets the pace. Latency grows with the logarithm of the
    ranks, as with trees.
    """
    size = np.maximum(size, 1.0)
    inside = members_inside(size, stride, hardware)
    if (
        measured := _measured_s(("reduce_scatter", "all_gather"), size_bytes, size, inside, hardware)
    ) is not None:
        return measured
    moved = size_bytes * (size - 1.0) / size
    within_s = moved / (hardware.scale_up_bandwidth * constants.scale_up)
    outside = size > inside
    between_s = np.where(outside, moved / (hardware.nic_bandwidth * constants.nic * inside), 0.0)
    latency_s = (
        np.log2(np.maximum(inside, 1.0)) * constants.scale_up_latency_s
        + np.log2(size / inside) * constants.nic_latency_s
    )
    return np.asarray(
        np.where(size > 1.0, np.maximum(np.where(inside > 1, within_s, 0.0), between_s) + latency_s, 0.0)
    )


REDUCTION_GAIN = 1.3
"""Of all-reduces whose sums the switches make: 482 against 368 GB/s of bus bandwidth on 8 H200 (stas00/ml-engineering),
and 30 % measured with SHARP between nodes."""


def all_reduce_s(
    size_bytes: Array, size: Array, stride: Array, hardware: Hardware, constants: Constants
) -> Array:
    """Seconds of one all-reduce of `size_bytes`: a scatter and a gather, or the switches' own sum."""
    members = members_inside(size, stride, hardware)
    if (measured := _measured_s(("all_reduce",), size_bytes, size, members, hardware)) is not None:
        return measured
    inside = members >= size
    in_switches = np.where(inside, hardware.domain_reduces, hardware.fabric_reduces)
    gain = 1.0 + (REDUCTION_GAIN - 1.0) * in_switches
    return np.asarray(ring_s(2.0 * size_bytes, size, stride, hardware, constants) / gain)


def all_to_all_s(
    size_bytes: Array,
    size: Array,
    stride: Array,
    hardware: Hardware,
    constants: Constants,
    *,
    copies: Array,
    one_copy: Array,
) -> Array:
    """Seconds in which each rank sends `size_bytes` in equal parts to all `size` ranks, itself included.

    What stays in the domain goes by NVLink while the rest goes through the rank's own NIC. The bytes are
    `copies` of each token; with `one_copy`, a token leaves only once for each domain d that wants it:
    d·(1 − (1 − 1/d)^copies) of them for copies spread evenly.
    """
    size = np.maximum(size, 1.0)
    inside = members_inside(size, stride, hardware)
    if (measured := _measured_s(("all_to_all",), size_bytes, size, inside, hardware)) is not None:
        return measured
    within_s = size_bytes * (inside - 1.0) / size / (hardware.scale_up_bandwidth * constants.scale_up)
    domains = size / inside
    wanted = domains * (1.0 - (1.0 - 1.0 / domains) ** copies) / np.maximum(copies, 1.0)
    leaving = size_bytes * (size - inside) / size * np.where(one_copy > 0, np.minimum(wanted, 1.0), 1.0)
    between_s = leaving / (hardware.nic_bandwidth * constants.nic * constants.scattered)
    latency_s = constants.scale_up_latency_s + np.where(size > inside, constants.nic_latency_s, 0.0)
    return np.asarray(np.where(size > 1.0, np.maximum(within_s, between_s) + latency_s, 0.0))


def send_s(size_bytes: Array, size: Array, stride: Array, hardware: Hardware, constants: Constants) -> Array:
    """Seconds in which each of `size` ranks that lie `stride` apart sends a message to the next one.

    The slowest hop sets the pace: NICs, as soon as the chain leaves a scale-up domain.
    """
    inside = size * stride <= hardware.scale_up_chips
    members = np.where(inside, size, 1.0)
    if (measured := _measured_s(("send",), size_bytes, size, members, hardware)) is not None:
        return measured
    bandwidth = np.where(
        inside,
        hardware.scale_up_bandwidth * constants.scale_up,
        hardware.nic_bandwidth * constants.nic,
    )
    return np.asarray(
        size_bytes / bandwidth + np.where(inside, constants.scale_up_latency_s, constants.nic_latency_s)
    )
