"""Costs against what runs, machines and sites were said to cost."""

from datetime import date

import pytest

from colossus.errors import ConfigError
from colossus.planner.run.power import run_energy
from colossus.planner.run.price import (
    capital_usd_per_chip,
    owned_chip_hour,
    owned_usd,
    rent,
    rented_usd,
    rents,
)
from colossus.planner.run.rates import table
from colossus.spec.fleet import Node, Pool
from colossus.spec.ranged import Ranged
from tests.planner.test_power import H100, site

MEMPHIS = site(1.30, 0.2835)  # at 0.07 USD/kWh


# --- rented ---


def test_deepseek_v3() -> None:
    """5.576 MUSD: 2.788M H800-hours at 2 USD (arXiv:2412.19437)."""
    usd = rented_usd(2.788e6, rent("h800", date(2024, 12, 27)).usd_per_chip_hour)
    assert usd.likely == pytest.approx(5.576e6)


@pytest.mark.parametrize(
    ("chip", "day", "million_hours", "million_usd"),
    [
        ("h100-sxm5-80", date(2025, 2, 1), 187, 500),  # GPT-4.5 (Epoch AI, second hand)
        ("A100-SXM4-40", date(2023, 5, 1), 0.1, 0.2),  # MPT-7B (Databricks, second hand)
    ],
)
def test_published_costs_are_in_the_range(
    chip: str, day: date, million_hours: float, million_usd: float
) -> None:
    usd = rented_usd(million_hours, rent(chip, day).usd_per_chip_hour)
    assert usd.low < million_usd < usd.high
    assert usd.likely == pytest.approx(million_usd, rel=0.15)


def test_the_quote_of_a_day() -> None:
    assert rent("h100", date(2023, 6, 1)).usd_per_chip_hour.high == 12
    assert rent("h100", date(2024, 9, 30)).usd_per_chip_hour.likely == 2.85
    assert rent("h100", date(2024, 10, 1)).usd_per_chip_hour.likely == 2.99
    assert rent("h100", date(1999, 1, 1)) == rents("h100")[0]
    assert rent("b200", date(2030, 1, 1)) == rents("b200")[-1]


def test_every_quote_has_a_source_and_a_day_of_its_own() -> None:
    for chip in table("prices")["rents"]:
        days = [quote.since for quote in rents(chip)]
        assert days == sorted(set(days))
        assert all(quote.source and quote.usd_per_chip_hour.low > 0 for quote in rents(chip))


# --- owned ---


@pytest.mark.parametrize("usd", [52_656, 56_000])
def test_capital_of_whole_sites(usd: float) -> None:
    """Colossus 1, and xAI in Georgia (Epoch AI), per chip with everything."""
    capital = capital_usd_per_chip(H100, MEMPHIS)
    assert capital.low < usd < capital.high
    assert capital.likely == pytest.approx(usd, rel=0.12)


def test_an_owned_h100_hour() -> None:
    """1.40 to build and write off (Patel 2026-03), 1.65 to break even (Latent Space), 0.30 to 0.40 to operate."""
    hour = owned_chip_hour(H100, MEMPHIS, 0.9)
    assert hour.total.likely == pytest.approx(1.40, rel=0.10)
    assert hour.total.low < 1.40 < 1.65 < hour.total.high
    running = hour.electricity + hour.operations
    assert running.low < 0.30 < 0.40 < running.high


def test_llama3_405b_on_owned_chips() -> None:
    """29.1 MUSD for 15T tokens in BF16 on 2,304 H100 (SemiAnalysis 2025-08, second hand). The MFU is not given; 43 % is
    what the model reached on 8,192 (arXiv:2407.21783, table 4)."""
    hours = 6 * 405.9e9 * 15e12 / (0.43 * 989e12) / 3600
    usd = owned_usd([Pool(node=H100, num_nodes=288)], MEMPHIS, hours / 2304 / 24, 0.9)
    assert usd.low < 29.1e6 < usd.high
    assert usd.likely == pytest.approx(29.1e6, rel=0.15)


def test_operating_colossus_for_a_year() -> None:
    """250.8 MUSD for 200,000 chips (Epoch AI)."""
    hour = owned_chip_hour(H100, MEMPHIS, 0.9)
    year = (hour.electricity + hour.operations) * (200_000 * 8766)
    assert year.low < 250.8e6 < year.high


def test_electricity_is_what_the_meter_shows() -> None:
    """USD of electricity = kWh of `run_energy` × the site's price; 100,000 chips take some 85 to 125 MUSD a year,
    where SemiAnalysis has 123.9 at 0.078 USD/kWh and full rating."""
    pool = Pool(node=H100, num_nodes=12_500)
    hour = owned_chip_hour(H100, MEMPHIS, 0.9)
    year = run_energy([pool], MEMPHIS, 365.25, 0.9)
    assert hour.electricity.likely * 100_000 * 8766 == pytest.approx(year.facility_mwh.likely * 70)
    assert year.facility_mwh.likely * 78 == pytest.approx(123.9e6, rel=0.25)
    assert year.facility_mwh.likely * 78 < 123.9e6


def test_a_run_on_owned_chips_costs_its_hours() -> None:
    pools = [Pool(node=H100, num_nodes=2048), Pool(node=H100, num_nodes=100)]
    usd = owned_usd(pools, MEMPHIS, 78.4, 0.9)
    assert usd.likely == pytest.approx(
        owned_chip_hour(H100, MEMPHIS, 0.9).total.likely * 2148 * 8 * 78.4 * 24
    )


def test_a_known_price_counts() -> None:
    def priced(usd: float) -> Node:
        return H100.model_copy(update={"price_usd": Ranged.exactly(usd)})

    dearer = capital_usd_per_chip(priced(400_000.0), MEMPHIS).likely
    assert dearer - capital_usd_per_chip(priced(240_000.0), MEMPHIS).likely == pytest.approx(20_000)


def test_bad_input_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'h100'"):
        rent("h10-80", date(2024, 1, 1))
    with pytest.raises(ConfigError, match="0 or more, and finite"):
        rented_usd(-1.0, Ranged.exactly(2.0))
    with pytest.raises(ConfigError, match="0 or more, and finite"):
        owned_usd([], MEMPHIS, float("nan"), 0.9)
