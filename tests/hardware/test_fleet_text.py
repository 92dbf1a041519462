"""Fleets as people write them, and as people get them wrong."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossus.errors import ConfigError
from colossus.hardware import fleet, node, nodes, parse_fleet
from colossus.hardware.fleet_text import part_of

GOOD = """
name = "mine"
fabric = "infiniband-ndr-3-tier"
site = "memphis"

[[pool]]
node = "hgx-h200"
count = 6250
"""


def refused(text: str) -> str:
    """The sentence with which a fleet is refused."""
    with pytest.raises(ConfigError) as refusal:
        parse_fleet(text)
    return str(refusal.value)


@pytest.fixture
def write(tmp_path: Path):
    def write(content: str | bytes, name: str = "fleet.toml") -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


# --- names and in place ---


def test_a_name_is_the_catalogs_fleet() -> None:
    assert parse_fleet(" Colossus-200k ") is fleet("colossus-200k")


def test_two_pools_in_place() -> None:
    found = parse_fleet("h100:150000 + h200:50000")
    assert [(pool.node.name, pool.num_nodes) for pool in found.pools] == [
        ("hgx-h100", 18_750),
        ("hgx-h200", 6_250),
    ]
    assert found.num_chips == 200_000
    assert "fabric spectrum-x-400g" in found.note
    assert "site us-average" in found.note


def test_nodes_may_be_named_and_counts_shortened() -> None:
    assert parse_fleet("supermicro-h100-liquid:100k").pools[0].num_nodes == 12_500
    assert parse_fleet("gb200:144").num_nodes == 2


@pytest.mark.parametrize(
    ("text", "fabric"),
    [
        ("h100:8", "single-node"),
        ("h100:16", "infiniband-ndr-2-tier"),
        ("h100:2048", "infiniband-ndr-2-tier"),
        ("h100:2056", "infiniband-ndr-3-tier"),
        ("h100:65536", "infiniband-ndr-3-tier"),
        ("h100:65544", "spectrum-x-400g"),
        ("a100:16000", "infiniband-hdr"),
        ("a100:16008", "infiniband-hdr-rail-only"),
        ("bloom-a100:384", "omnipath-100g"),
        ("b300:16", "infiniband-xdr-2-tier"),
        ("h100:8+b300:8", "infiniband-xdr-2-tier"),
        ("cpu:2", "ethernet-1g"),
    ],
)
def test_the_default_fabric_fits_size_and_generation(text: str, fabric: str) -> None:
    assert parse_fleet(text).fabric.name == fabric


@given(
    name=st.sampled_from(sorted(set(nodes()) - {"laptop"})), count=st.integers(min_value=1, max_value=2_000)
)
def test_counts_are_kept_or_refused_with_the_nearest_that_are(name: str, count: int) -> None:
    size = node(name).num_chips
    if count < size or count % size == 0:
        assert parse_fleet(f"{name}:{count}").num_chips == count
    else:
        below = count // size * size
        assert f"write {name}:{below} or {name}:{below + size}" in refused(f"{name}:{count}")


@given(count=st.integers(min_value=1, max_value=72))
def test_a_share_of_a_node_divides_into_its_domains(count: int) -> None:
    for whole in (node("gb200-nvl72"), node("pcie-h100")):
        if count < whole.num_chips:
            share = part_of(whole, count)
            assert share.num_chips == count
            assert count % share.scale_up_chips == 0
            assert share.scale_up_chips <= whole.scale_up_chips
            assert share.power_watts == pytest.approx(whole.power_watts * count / whole.num_chips)


def test_an_nvlink_domain_stays_whole_in_a_share() -> None:
    assert parse_fleet("h100:4").pools[0].node.scale_up_chips == 4
    assert parse_fleet("h100-pcie:6").pools[0].node.scale_up_chips == 2
    assert parse_fleet("h100-pcie:3").pools[0].node.scale_up_chips == 1


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["no fleet is named"]),
        ("h100", ["say how many", "h100:8"]),
        ("h100:", ["how many of h100", "h100:8"]),
        ("h100:8+", ["a part without a chip"]),
        (":8", ["a part without a chip"]),
        ("h100+h200:8", ["how many of h100"]),
        ("h100:0", ["'0' chips", "from 1 up"]),
        ("h100:-8", ["'-8' chips"]),
        ("h100:8.5", ["'8.5' chips"]),
        ("h100:eight", ["'eight' chips"]),
        ("h100:1e999", ["'1e999' chips"]),
        ("h100:8:8", ["'8:8' chips"]),
        ("h100:12", ["8 chips each", "h100:8 or h100:16"]),
        ("h1000:8", ["no chip or node 'h1000'", "Did you mean 'h100'"]),
        ("colosus-100k", ["no fleet", "Did you mean 'colossus-100k'"]),
        ("h100:8+h100-sxm:16", ["hgx-h100 is in two pools"]),
        ("h100:600000", ["600,000 chips", "at most 524,288"]),
        ("a100:200000", ["200,000 chips", "at most 128,000"]),
        ("no/such.toml", ["there is no such file"]),
        ("no/such", ["there is no such file"]),
        ("x\0.toml", ["cannot read", "x"]),
        ("h" * 5000, ["no fleet"]),
    ],
)
def test_what_cannot_be_is_refused(text: str, parts: list[str]) -> None:
    message = refused(text)
    for part in parts:
        assert part in message


@given(st.text(max_size=30) | st.text("h10:+_eE.-k ", max_size=12))
def test_any_text_is_a_fleet_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_fleet(text).num_chips >= 1


# --- files ---


def test_a_file(write) -> None:
    found = parse_fleet(write(GOOD))
    assert (found.name, found.num_chips, found.fabric.name) == ("mine", 50_000, "infiniband-ndr-3-tier")
    assert found.site.name == "memphis"
    assert found.source.endswith("fleet.toml")
    assert found.note == ""


def test_a_file_needs_only_pools(write) -> None:
    found = parse_fleet(
        write('[[pool]]\nnode = "h100"\ncount = 2\n[[pool]]\nnode = "dgx-h200"\ncount = 1', "two.toml")
    )
    assert (found.name, found.num_chips, found.num_nodes) == ("two", 24, 3)
    assert "fabric infiniband-ndr-2-tier" in found.note
    assert "site us-average" in found.note


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["pool is missing"]),
        (GOOD[: GOOD.index("count")] + "cou", ["not a TOML file"]),
        (GOOD[:12], ["not a TOML file"]),
        (GOOD.replace("count = 6250", ""), ["pool.0.count is missing"]),
        (GOOD.replace("6250", "0"), ["pool.0.count is 0", "above 0"]),
        (GOOD.replace("6250", "-3"), ["pool.0.count is -3", "above 0"]),
        (GOOD.replace("6250", '"6250"'), ["pool.0.count is '6250'", "whole number"]),
        (GOOD.replace("6250", "1.5"), ["pool.0.count is 1.5", "whole number"]),
        (GOOD.replace("6250", "nan"), ["pool.0.count is nan", "whole number"]),
        (GOOD.replace("6250", "9" * 30), ["at most 65,536"]),
        (GOOD.replace("6250", "9" * 5000), ["is not a"]),
        (GOOD.replace("6250", "[" * 20_000), ["is not a"]),
        (GOOD.replace("count", "cuont"), ["cuont", "Did you mean", "count"]),
        (GOOD.replace("hgx-h200", "hgx-h20000"), ["no chip or node", "Did you mean 'hgx-h200'"]),
        (GOOD.replace("infiniband-ndr-3-tier", "infinband-ndr-3-tier"), ["no fabric", "infiniband-ndr-3-tier"]),
        (GOOD.replace("memphis", "memfis"), ["no site", "Did you mean 'memphis'"]),
        (GOOD.replace("infiniband-ndr-3-tier", "infiniband-ndr-2-tier"), ["50,000 chips", "at most 2,048"]),
        (GOOD.replace("infiniband-ndr-3-tier", "single-node"), ["connects none"]),
        (GOOD + '[[pool]]\nnode = "h200"\ncount = 1', ["hgx-h200 is in two pools"]),
        ("pool = []", ["at least 1", "[[pool]]"]),
        ("pool = 3", ["pool is 3", "a list"]),
        ('pool = ["hgx-h200"]', ["a table"]),
        (b"\xff\xfe\x00", ["not text in UTF-8"]),
        (b"# " + b"x" * 1_100_000, ["larger than"]),
    ],
)  # fmt: skip
def test_hostile_files(write, content: str | bytes, parts: list[str]) -> None:
    message = refused(write(content))
    assert "fleet.toml" in message
    for part in parts:
        assert part in message


def test_a_directory_is_no_fleet(tmp_path: Path) -> None:
    assert "it is no file, but a directory" in refused(str(tmp_path))


# --- chips and nodes of its own ---

OWN = """
site = "memphis"

[fabric]
name = "ring"
kind = "ethernet"
switch_ports = 8
efficiency = 0.8
tiers = [{ name = "switch", num_chips = 64, latency_s = 20e-6 }]
source = "assumed"

[[pool]]
node = "box"
count = 2

[[pool]]
node = "hgx-h200"
count = 1

[node.box]
chip = "mine"
num_chips = 4
scale_up_chips = 4
scale_up_bandwidth = 1e9
nic_bandwidth = 1e8
power_watts = 300.0
source = "the label"

[chip.mine]
generation = "cpu"
peak_flops = { float32 = 1e12 }
memory_bytes = 8_000_000_000
memory_bandwidth = 3e10
num_cores = 8
power_watts = 65.0
idle_watts = 10.0
source = "the label"
"""


def test_a_file_may_have_chips_nodes_and_a_fabric_of_its_own(write) -> None:
    found = parse_fleet(write(OWN))
    assert [pool.node.name for pool in found.pools] == ["box", "hgx-h200"]
    assert (found.pools[0].chip.name, found.pools[0].chip.peak_flops) == ("mine", {"float32": 1e12})
    assert (found.fabric.name, found.site.name) == ("ring", "memphis")
    assert parse_fleet(write(OWN.replace('chip = "mine"', 'chip = "h200"'))).pools[0].chip.name == "h200"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('source = "the label"\n\n[chip', "\n[chip", "node box: source"),
        ("num_cores = 8", "num_cores = 0", "chip mine: num_cores"),
        ("idle_watts = 10.0", "idle_watts = 10.0\ncolour = 'red'", "chip mine: unknown key 'colour'"),
        ('chip = "mine"', "chip = 7", "chip must be the name"),
        ("efficiency = 0.8", "efficiency = 8", "fabric: efficiency"),
        ('node = "box"', 'node = "bx"', "no chip or node 'bx'"),
    ],
)
def test_what_is_wrong_with_them_is_told_with_where(write, old: str, new: str, says: str) -> None:
    assert old in OWN
    assert says in refused(write(OWN.replace(old, new, 1)))
