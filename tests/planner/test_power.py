"""Power, energy, water and carbon against published figures of machines, sites and runs."""

from datetime import date

import pytest

from colossus.errors import ConfigError
from colossus.planner.run.power import (
    check_power,
    chip_watts,
    chips_fed,
    drawn_watts_per_chip,
    facility_limit_watts,
    rated_watts_per_chip,
    run_energy,
    share,
)
from colossus.spec.fleet import Chip, Node, Pool, PowerLimit, Site
from colossus.spec.ranged import Ranged


def node(name: str, watts: float, idle: float, node_watts: float) -> Node:
    chip = Chip(
        name=name, source="test", generation="hopper", peak_flops={"bfloat16": 1e15}, memory_bytes=2**36,
        memory_bandwidth=3e12, num_cores=132, power_watts=watts, idle_watts=idle,
    )  # fmt: skip
    return Node(
        name=name, source="test", chip=chip, num_chips=8, scale_up_chips=8, scale_up_bandwidth=4.5e11,
        nic_bandwidth=5e10, power_watts=node_watts,
    )  # fmt: skip


H100 = node("dgx-h100", 700.0, 70.0, 10_200.0)
A100 = node("dgx-a100", 400.0, 60.0, 6500.0)
V100 = node("dgx-1", 300.0, 40.0, 3500.0)


def site(pue: float, carbon: float, limits: tuple[PowerLimit, ...] = (), wue: float = 0.0) -> Site:
    exactly = Ranged.exactly
    return Site(
        name="there", source="test", pue=exactly(pue), wue_litres_per_kwh=exactly(wue),
        carbon_kg_per_kwh=exactly(carbon), electricity_usd_per_kwh=exactly(0.07), power_limits=limits,
    )  # fmt: skip


def pool_for(kind: Node, million_hours: float, days: float) -> Pool:
    return Pool(node=kind, num_nodes=round(million_hours * 1e6 / (24 * days) / 8))


# --- machines and sites ---


def test_a_dgx_h100_under_load() -> None:
    """8.4 kW at most, and 76 % of 10.2 kW under intensive load (arXiv:2412.08602, 2506.14551); network aside."""
    network = share("network") * (10_200 / 8)
    busy = drawn_watts_per_chip(H100, 1.0)
    measured = [(total - of_network) * 8 for total, of_network in
                ((busy.low, network.low), (busy.likely, network.likely), (busy.high, network.high))]  # fmt: skip
    assert measured[0] < 0.76 * 10_200 < measured[2]
    assert measured[1] == pytest.approx(7.9e3, rel=0.03)
    assert 8.4e3 < measured[2] < 1.03 * 8.4e3


def test_a_chip_between_idle_and_its_limit() -> None:
    assert chip_watts(H100.chip, 1.0).high == 700
    assert chip_watts(H100.chip, 0.0).low == 70
    draws = [chip_watts(H100.chip, busy).likely for busy in (0.0, 0.5, 1.0)]
    assert draws == sorted(draws)
    assert draws[2] < 700


def test_colossus_at_a_hundred_thousand() -> None:
    """139 MW of IT and 181 MW of facility at PUE 1.30 (Epoch AI)."""
    it_watts = 100_000 * rated_watts_per_chip(H100)
    assert it_watts == pytest.approx(139e6, rel=0.01)
    assert it_watts * 1.30 == pytest.approx(181e6, rel=0.01)
    drawn = run_energy([Pool(node=H100, num_nodes=12_500)], site(1.30, 0.28), 1.0, 0.9)
    assert 0.6 < drawn.facility_watts.likely / 181e6 < 0.85


LIMITS = tuple(
    PowerLimit(since=since, facility_watts=watts)
    for since, watts in (
        (date(2024, 7, 1), 8e6), (date(2024, 8, 15), 50e6), (date(2025, 5, 1), 150e6), (date(2025, 10, 1), 300e6),
    )
)  # fmt: skip


@pytest.mark.parametrize(
    ("day", "chips"),
    [
        (date(2024, 7, 20), 4_400),
        (date(2024, 9, 2), 27_600),
        (date(2025, 5, 1), 83_000),
        (date(2026, 1, 1), 166_000),
    ],
)
def test_chips_that_the_grid_of_memphis_could_feed(day: date, chips: int) -> None:
    """8, 50, 150 and 300 MW over 1.81 kW."""
    memphis = site(1.30, 0.28, LIMITS)
    assert chips_fed(memphis, day, rated_watts_per_chip(H100)) == pytest.approx(chips, rel=0.01)


def test_limits_in_time() -> None:
    memphis = site(1.30, 0.28, LIMITS)
    assert facility_limit_watts(memphis, date(2024, 6, 30)) == 0
    assert chips_fed(memphis, date(2024, 6, 30), 1000.0) == 0
    assert chips_fed(site(1.3, 0.3), date(2024, 6, 30), 1000.0) is None
    assert facility_limit_watts(site(1.3, 0.3, LIMITS[::-1]), date(2025, 6, 1)) == 150e6


def test_a_fleet_that_the_site_cannot_feed_yet() -> None:
    memphis = site(1.30, 0.28, LIMITS)
    fleet = [Pool(node=H100, num_nodes=12_500)]
    check_power(fleet, memphis, date(2025, 10, 1))
    check_power(fleet, site(1.3, 0.3), date(2024, 1, 1))
    with pytest.raises(
        ConfigError, match=r"100,000 chips need 182\.3 MW .* 50\.0 MW on 2024-09-02: 27,\d{3} of"
    ) as said:
        check_power(fleet, memphis, date(2024, 9, 2))
    assert "it can from 2025-10-01 on" in str(said.value)
    with pytest.raises(ConfigError, match="no later limit of it is enough"):
        check_power([*fleet, *fleet], memphis, date(2024, 9, 2))


# --- runs ---


def test_gpt3() -> None:
    """3.55M V100-hours: 1,287 MWh and 552 t, at PUE 1.10 and 429 g/kWh (Patterson et al. 2021, recall)."""
    energy = run_energy([pool_for(V100, 3.55, 14.8)], site(1.10, 0.429), 14.8, 0.9)
    assert energy.facility_mwh.low < 1287 < energy.facility_mwh.high
    assert energy.tonnes_co2e.low < 552 < energy.tonnes_co2e.high
    assert energy.facility_mwh.likely == pytest.approx(1287, rel=0.20)


def test_bloom() -> None:
    """1.083M A100-hours: 433 MWh of chips at their limit, 689 MWh with what idles (Luccioni et al. 2022, recall)."""
    energy = run_energy([pool_for(A100, 1.083, 118.2)], site(1.0, 0.057), 118.2, 0.9)
    assert 1.083e6 * A100.chip.power_watts / 1e9 == pytest.approx(0.433, rel=0.001)
    assert energy.facility_mwh.low < 689 < energy.facility_mwh.high
    assert energy.tonnes_co2e.likely > 433.196 * 0.057


def test_llama3_405b() -> None:
    """30.84M H100-hours: 21,588 MWh is 700 W for each, and 8,930 t are 414 g for each of those kWh (model card).

    So it counts chips only: a meter at the gate shows more, by what nodes, network and cooling take.
    """
    hours = 30.84e6
    chips = chip_watts(H100.chip, 0.9) * (hours / 1e6)
    assert hours * H100.chip.power_watts / 1e6 == pytest.approx(21_588)
    assert chips.likely == pytest.approx(21_588, rel=0.12)
    energy = run_energy([pool_for(H100, 30.84, 78.4)], site(1.10, 0.414), 78.4, 0.9)
    assert chips.likely * 0.414 < 8930 < energy.tonnes_co2e.low
    assert energy.facility_mwh.likely == pytest.approx(1.7 * 21_588, rel=0.05)


def test_olmo2_7b() -> None:
    """131 MWh for 1.8e23 FLOPs (recall); hours from the 38 % MFU that its larger sibling had."""
    hours = 1.8e23 / (0.38 * 989e12) / 3600
    energy = run_energy([pool_for(H100, hours / 1e6, 10.0)], site(1.2, 0.397), 10.0, 0.9)
    chips_only = chip_watts(H100.chip, 0.9).likely * hours / 1e6
    assert chips_only < 131 < energy.facility_mwh.likely


def test_carbon_and_water_follow_from_energy() -> None:
    energy = run_energy([Pool(node=H100, num_nodes=10)], site(1.3, 0.3, wue=1.052), 2.0, 0.8)
    assert energy.facility_mwh.likely == pytest.approx(energy.facility_watts.likely * 48 / 1e6)
    assert energy.facility_watts.likely == pytest.approx(1.3 * energy.it_watts.likely)
    assert energy.tonnes_co2e.likely == pytest.approx(0.3 * energy.facility_mwh.likely)
    # A million gallons a day for 150 MW (what the utility stated for Memphis) are 1.052 litres per kWh.
    assert energy.water_litres.likely == pytest.approx(
        3.785e6 / (150e3 * 24) * energy.it_watts.likely * 0.048, rel=1e-3
    )
    double = run_energy([Pool(node=H100, num_nodes=10)] * 2, site(1.3, 0.3, wue=1.052), 2.0, 0.8)
    assert double.water_litres.likely == pytest.approx(2 * energy.water_litres.likely)


def test_bad_input_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="a share, from 0 to 1"):
        chip_watts(H100.chip, 1.1)
    with pytest.raises(ConfigError, match="above 0, and finite"):
        run_energy([], site(1.3, 0.3), 0.0, 0.9)
    with pytest.raises(ConfigError, match="draws more than 0"):
        chips_fed(site(1.3, 0.3), date(2024, 1, 1), 0.0)
    with pytest.raises(ConfigError, match="Did you mean 'network'"):
        share("networks")
