"""The catalog against published numbers, and against itself: conserved ratios, formulas, sources, units."""

import subprocess
import sys
import tomllib
from importlib import resources
from typing import Any

import pytest

from colossus.errors import ConfigError
from colossus.hardware import catalog, chip, chips, fabric, fabrics, fleet, fleets, node, nodes, site, sites
from colossus.spec.fleet import Fabric, Fleet, Sourced

ENTRIES: dict[str, Sourced] = {
    f"{kind} {name}": entry
    for kind, entries in (
        ("chip", chips()), ("node", nodes()), ("fabric", fabrics()), ("site", sites()), ("fleet", fleets())
    )
    for name, entry in entries.items()
}  # fmt: skip
GPUS = {name: found for name, found in chips().items() if found.generation != "cpu"}


# --- published numbers ---


@pytest.mark.parametrize(
    ("name", "bfloat16_tflops", "label_gb", "tb_per_s", "watts"),
    [  # vendors' data sheets, dense; bandwidth and memory to the digits that they print
        ("a100-40", 312, 40, 1.555, 400),
        ("a100-80", 312, 80, 2.04, 400),
        ("a100-pcie-80", 312, 80, 1.94, 300),
        ("h100-sxm", 989, 80, 3.35, 700),
        ("h100-pcie", 756, 80, 2.04, 350),
        ("h100-nvl", 835, 94, 3.94, 400),
        ("h200", 989, 141, 4.8, 700),
        ("h800", 989, 80, 3.35, 700),
        ("h20", 148, 96, 4.0, 400),
        ("l40s", 362, 48, 0.864, 350),
        ("b200", 2250, 180, 7.7, 1000),
        ("gb200", 2500, 186, 8.0, 1200),
        ("b300", 2250, 288, 8.0, 1100),
        ("gb300", 2500, 288, 8.0, 1400),
    ],
)
def test_data_sheets(
    name: str, bfloat16_tflops: float, label_gb: float, tb_per_s: float, watts: float
) -> None:
    found = chip(name)
    assert found.peak_flops["bfloat16"] == pytest.approx(bfloat16_tflops * 1e12, rel=0.001)
    assert found.memory_bandwidth == pytest.approx(tb_per_s * 1e12, rel=0.002)
    assert found.power_watts == watts
    # A label's gigabyte is something between 10^9 and 2^30 bytes, and the driver keeps a little.
    assert 0.97 * label_gb * 1e9 < found.memory_bytes < label_gb * 2**30


def test_torchtitans_variant_differs_from_the_h100_as_published() -> None:
    variant, usual = chip("h100-96-500w"), chip("h100")
    assert (variant.power_watts, variant.memory_bandwidth) == (500, 2.4e12)
    assert 95e9 < variant.memory_bytes < 96 * 2**30
    assert variant.peak_flops == usual.peak_flops
    assert node("hgx-h100-500w").chip == variant


def test_h200_is_an_h100_with_more_memory() -> None:
    h100, h200 = chip("h100"), chip("h200")
    assert h200.peak_flops == h100.peak_flops
    assert h200.memory_bandwidth / h100.memory_bandwidth == pytest.approx(1.43, abs=0.005)
    assert h200.memory_bytes / h100.memory_bytes == pytest.approx(1.76, abs=0.01)


@pytest.mark.parametrize("name", GPUS)
def test_halving_the_bits_doubles_the_peak(name: str) -> None:
    found = GPUS[name]
    peak = found.peak_flops
    assert peak["float16"] == peak["bfloat16"]
    assert peak["float32"] < peak["bfloat16"] / 2
    assert ("fp8" in peak) == (found.generation in ("ada", "hopper", "blackwell"))
    assert ("nvfp4" in peak) == ("mxfp8" in peak) == (found.generation == "blackwell")
    if "fp8" in peak:
        assert peak["fp8"] == pytest.approx(2 * peak["bfloat16"], rel=0.02)
    if "nvfp4" in peak:  # Blackwell Ultra trades other units for half as many again
        factor = 3 if name in ("b300", "gb300") else 2
        assert peak["mxfp8"] == peak["fp8"]
        assert peak["nvfp4"] == pytest.approx(factor * peak["fp8"], rel=0.01)


def test_h100_peak_is_cores_times_clock() -> None:
    """A Hopper core does 4,096 dense bfloat16 FLOPs in a cycle; 1830 MHz is the boost clock of its data sheet."""
    found = chip("h100")
    assert found.peak_flops["bfloat16"] == pytest.approx(found.num_cores * 4096 * 1830e6, rel=0.001)


@pytest.mark.parametrize(
    ("name", "nvlink", "nic", "watts"),
    [
        ("dgx-a100", 300e9, 25e9, 6_500),
        ("bloom-a100", 300e9, 4 * 100e9 / 8 / 8, 6_500),
        ("dgx-h100", 450e9, 50e9, 10_200),
        ("hgx-h800", 200e9, 50e9, 10_200),
        ("dgx-b200", 900e9, 50e9, 14_300),
        ("dgx-b300", 900e9, 100e9, 14_500),
        ("gb200-nvl72", 900e9, 28.8e12 / 8 / 72, 132_000),
    ],
)
def test_nodes_as_published(name: str, nvlink: float, nic: float, watts: float) -> None:
    found = node(name)
    assert (found.scale_up_bandwidth, found.power_watts) == (nvlink, watts)
    assert found.nic_bandwidth == pytest.approx(nic)


def test_nvl72_adds_up_to_its_130_terabytes_per_second() -> None:
    rack = node("gb200-nvl72")
    assert rack.scale_up_chips == rack.num_chips == 72
    assert 2 * 72 * rack.scale_up_bandwidth == pytest.approx(130e12, rel=0.01)


# --- units and sources ---


@pytest.mark.parametrize("label", ENTRIES)
def test_every_entry_has_a_source(label: str) -> None:
    entry = ENTRIES[label]
    assert len(entry.source.strip()) >= 8
    assert all(text.strip() for text in entry.sources.values())
    assert entry.name == label.split()[1]


@pytest.mark.parametrize("name", GPUS)
def test_units_of_chips_are_base_units(name: str) -> None:
    found = GPUS[name]
    assert 1e14 < found.peak_flops["bfloat16"] < 1e16
    assert 0.5e12 < found.memory_bandwidth < 1e13
    assert 30 * 2**30 < found.memory_bytes < 300 * 2**30
    assert 0.05 < found.idle_watts / found.power_watts < 0.25
    if found.price_usd:
        assert 5_000 < found.price_usd.low <= found.price_usd.high < 100_000


@pytest.mark.parametrize("name", [name for name in nodes() if name != "laptop"])
def test_units_of_nodes_are_base_units(name: str) -> None:
    found = node(name)
    chips_alone = found.num_chips * found.chip.power_watts
    assert chips_alone < found.power_watts < 2.5 * chips_alone
    assert 5e9 < found.nic_bandwidth <= found.scale_up_bandwidth < found.chip.memory_bandwidth
    if found.price_usd and found.chip.price_usd:
        assert found.price_usd.likely > 0.9 * found.num_chips * found.chip.price_usd.likely


@pytest.mark.parametrize("name", sites())
def test_units_of_sites_are_base_units(name: str) -> None:
    found = site(name)
    assert 1 <= found.pue.low <= found.pue.high < 2
    assert 0 <= found.wue_litres_per_kwh.high < 2
    assert 0.01 < found.carbon_kg_per_kwh.low <= found.carbon_kg_per_kwh.high < 1.1  # coal is 1.03
    assert 0.02 < found.electricity_usd_per_kwh.low <= found.electricity_usd_per_kwh.high < 0.5
    dates = [limit.since for limit in found.power_limits]
    assert dates == sorted(set(dates))


# --- fabrics ---


def fat_tree(ports: int, tiers: int) -> int:
    """NICs at the foot of a fat tree, by building it: half of every switch's ports go down, all of the top's."""
    reach = ports // 2
    for tier in range(1, tiers):
        reach *= ports if tier == tiers - 1 else ports // 2
    return reach


@pytest.mark.parametrize(
    ("name", "rails"),
    [("infiniband-hdr", 1), ("infiniband-hdr-rail-only", 8), ("infiniband-ndr-2-tier", 1), ("infiniband-ndr-3-tier", 1),
     ("infiniband-ndr-rail-only", 8), ("infiniband-xdr", 1), ("infiniband-xdr-2-tier", 1), ("spectrum-x-400g", 1),
     ("ethernet-100g", 1)],
)  # fmt: skip
def test_fat_trees_follow_from_the_ports(name: str, rails: int) -> None:
    found = fabric(name)
    ports, num_tiers = found.switch_ports, len(found.tiers)
    assert found.max_chips == rails * fat_tree(ports, num_tiers)
    assert found.max_chips == rails * (ports**2 // 2 if num_tiers == 2 else ports**3 // 4)
    assert found.tiers[0].num_chips == 8 * ports // 2  # rail-optimised: eight leaf switches to a block
    if num_tiers == 3:
        assert found.tiers[1].num_chips == rails * (ports // 2) ** 2


def test_published_reach_of_fabrics() -> None:
    assert fabric("infiniband-ndr-2-tier").max_chips == 2_048
    assert fabric("infiniband-ndr").max_chips == 65_536  # below 100,000
    assert fabric("infiniband-ndr-rail-only").max_chips == 524_288  # arXiv:2307.12169
    assert fabric("infiniband-xdr-2-tier").max_chips == 10_368  # NVIDIA
    assert fabric("spectrum-x").tiers[0].num_chips == 512  # one of Colossus's arrays: 8 racks of 64
    assert fabric("omnipath").max_chips == 2 * 48**2 // 2  # two chips to a link


def test_meta_24k_is_eight_pods_at_seven_to_one() -> None:
    pod, top = fabric("roce-meta-24k").tiers[1:]
    assert (pod.num_chips, top.num_chips, top.oversubscription) == (3_072, 8 * 3_072, 7)
    assert pod.oversubscription == 1
    assert 2 * top.latency_s == pytest.approx(22e-6)


@pytest.mark.parametrize("name", fabrics())
def test_farther_is_slower(name: str) -> None:
    latencies = [tier.latency_s for tier in fabric(name).tiers]
    assert latencies == sorted(set(latencies))
    assert all(0.5e-6 < latency < 100e-6 for latency in latencies)


def test_default_fabrics_exist_and_grow() -> None:
    rows = _data("fabrics")["default"]
    assert [row["nic_bandwidth"] for row in rows] == sorted(row["nic_bandwidth"] for row in rows)
    for row in rows:
        reach = [fabric(name).max_chips for name in row["fabrics"]]
        assert reach == sorted(reach)


# --- fleets ---


@pytest.mark.parametrize(
    ("name", "by_chip"),
    [
        ("dgx-h100", {"h100-sxm": 8}),
        ("dgx-h200", {"h200": 8}),
        ("gpt4-25k", {"a100-40": 25_000}),
        ("meta-24k", {"h100-sxm": 24_576}),
        ("oracle-24k", {"h100-sxm": 24_000}),
        ("colossus-100k", {"h100-sxm": 100_000}),
        ("colossus-200k", {"h100-sxm": 150_000, "h200": 50_000}),
        ("meta-350k", {"h100-sxm": 350_000}),
        ("b200-300k", {"b200": 300_000}),
    ],
)
def test_fleets_have_the_published_chips(name: str, by_chip: dict[str, int]) -> None:
    found = fleet(name)
    assert {pool.chip.name: pool.num_chips for pool in found.pools} == by_chip
    assert found.num_chips == sum(by_chip.values()) <= max(found.fabric.max_chips, 8)


def test_totals_are_sums() -> None:
    both, first = fleet("colossus-200k"), fleet("colossus-100k")
    assert both.num_nodes == 25_000
    assert both.peak_flops("bfloat16") == pytest.approx(200_000 * 989.4e12)
    assert first.memory_bytes == 100_000 * chip("h100").memory_bytes
    with pytest.raises(ConfigError, match="a100-40 cannot run fp8"):
        fleet("gpt4-25k").peak_flops("fp8")


@pytest.mark.parametrize(
    ("name", "since", "it_watts"), [("colossus-100k", "2024-09-02", 139e6), ("colossus-200k", "2025-02-17", 278e6)]
)  # fmt: skip
def test_memphis_could_feed_colossus_on_the_day(name: str, since: str, it_watts: float) -> None:
    """Node ratings against Epoch's IT power, which has network and storage in it, and the site's limit that day."""
    found = fleet(name)
    assert 0.85 * it_watts < found.power_watts < it_watts
    limit = next(limit for limit in found.site.power_limits if limit.since.isoformat() == since)
    assert found.power_watts * found.site.pue.likely < limit.facility_watts
    assert limit.facility_watts / it_watts == pytest.approx(found.site.pue.likely, abs=0.01)


def test_an_impossible_fleet_is_refused() -> None:
    known = fleet("colossus-100k")
    small, none = fabric("infiniband-ndr-2-tier"), fabric("single-node")
    with pytest.raises(ConfigError, match=r"100,000 chips.*at most 2,048"):
        _on(known, small).check()
    with pytest.raises(ConfigError, match=r"12,500 nodes.*connects none"):
        _on(known, none).check()
    _on(fleet("dgx-h100"), none).check()


def _on(known: Fleet, other: Fabric) -> Fleet:
    return known.model_copy(update={"fabric": other})


# --- names ---


def test_aliases() -> None:
    assert chip("h100") is chip("H100-SXM")
    assert chip("a100").name == "a100-80"
    assert {chip(name).name for name in ("b200", "gb200", "b300", "gb300")} == {
        "b200",
        "gb200",
        "b300",
        "gb300",
    }
    assert node("hgx-b200").name == "dgx-b200"


@pytest.mark.parametrize("kind", ["chip", "node", "fabric", "site", "fleet"])
def test_aliases_mean_entries_and_hide_none(kind: Any) -> None:
    names = set(_data(f"{kind}s")[kind])
    for alias, name in catalog.aliases(kind).items():
        assert name in names
        assert alias not in names


def test_every_chip_comes_in_a_node_of_it() -> None:
    for name in chips():
        assert catalog.node_of_chip(name).chip.name == name


@pytest.mark.parametrize(
    ("get", "wrong", "nearest"),
    [(chip, "h1000", "h100"), (node, "dgx-h10", "dgx-h100"), (fabric, "spectrum-y", "spectrum-x"),
     (site, "memphys", "memphis"), (fleet, "colosus-200k", "colossus-200k")],
)  # fmt: skip
def test_unknown_names_propose_the_nearest(get: Any, wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"no {get.__name__} '{wrong}'.*Did you mean '{nearest}"):
        get(wrong)


# --- this machine ---


def test_the_laptop_is_this_machine() -> None:
    import os

    import psutil

    laptop = node("laptop")
    assert laptop.chip is chip("cpu")
    assert 1 <= laptop.chip.num_cores <= (os.cpu_count() or 1)
    assert 2**28 < laptop.chip.memory_bytes <= psutil.virtual_memory().total
    assert laptop.chip.peak_flops["float32"] == 30e9 * laptop.chip.num_cores
    assert laptop.chip.source.startswith("assumed")


def test_naming_a_gpu_reads_nothing_of_this_machine() -> None:
    script = (
        "import sys; from colossus.hardware import chip, parse_fleet; parse_fleet('h100:8')\n"
        "sys.exit(' '.join(name for name in ('torch', 'psutil', 'rich', 'numpy') if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _data(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("colossus.hardware").joinpath(f"{name}.toml").read_text("utf-8"))
