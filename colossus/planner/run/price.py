"""What a run costs in USD: on rented chips, by the market of a day; on owned ones, by what wears and what it draws."""

from collections.abc import Sequence
from datetime import date
from functools import cache

from colossus.errors import ConfigError, did_you_mean
from colossus.planner.run.power import drawn_watts_per_chip, rated_watts_per_chip
from colossus.planner.run.rates import table
from colossus.spec.base import Frozen
from colossus.spec.fleet import Node, Pool, Site
from colossus.spec.ranged import Ranged

HOURS_PER_YEAR = 8766


class Rent(Frozen):
    """What a chip was let for, from a day on."""

    since: date
    usd_per_chip_hour: Ranged
    source: str


class OwnedChipHour(Frozen):
    """What an hour of an owned chip costs, part by part, in USD."""

    machine: Ranged
    """Wear of chip, node and network."""
    building: Ranged
    """Wear of building, power and cooling."""
    electricity: Ranged
    operations: Ranged

    @property
    def total(self) -> Ranged:
        return self.machine + self.building + self.electricity + self.operations


@cache
def rents(chip: str) -> tuple[Rent, ...]:
    """The quotes for a chip, oldest first. Of its name the first part counts: `h100` of `h100-sxm`.

    So an H100 on a PCIe card, or with other memory, goes at the rent of an H100 SXM.
    """
    known = table("prices")["rents"]
    family = chip.lower().partition("-")[0]
    if family not in known:
        raise ConfigError(
            f"no rent is known for chip {chip!r}; price the run as owned, or with a rent of your own."
            f"{did_you_mean(family, known)}"
        )
    quotes = [
        Rent(
            since=quote["since"],
            usd_per_chip_hour=Ranged(low=quote["low"], likely=quote["likely"], high=quote["high"]),
            source=quote["source"],
        )
        for quote in known[family]
    ]
    return tuple(sorted(quotes, key=lambda quote: quote.since))


def rent(chip: str, day: date) -> Rent:
    """The latest quote that is not later than `day`; before the first, the first."""
    quotes = rents(chip)
    return next((quote for quote in reversed(quotes) if quote.since <= day), quotes[0])


def rented_usd(chip_hours: float, usd_per_chip_hour: Ranged) -> Ranged:
    """Rent for all hours that chips are held, interruptions included; electricity and staff are in it."""
    return usd_per_chip_hour * _not_negative(chip_hours)


def capital_usd_per_chip(node: Node, site: Site) -> Ranged:
    """To buy a chip with its part of node, network and building."""
    machine, building = _capital(node, site)
    return machine + building


def owned_chip_hour(node: Node, site: Site, busy_share: float) -> OwnedChipHour:
    """An hour of a chip that is depreciated in a straight line and runs kernels for `busy_share` of the time.

    Interest on the capital is not in it, nor hours in which the chip would stand unused.
    """
    machine, building = _capital(node, site)
    kilowatts = drawn_watts_per_chip(node, busy_share) * site.pue * 1e-3
    return OwnedChipHour(
        machine=_over(machine, _owning("machine_years")),
        building=_over(building, _owning("building_years")),
        electricity=kilowatts * site.electricity_usd_per_kwh,
        operations=_owning("operations_usd_per_chip_hour"),
    )


def owned_usd(pools: Sequence[Pool], site: Site, wall_days: float, busy_share: float) -> Ranged:
    """Of a run that holds all chips of `pools` for `wall_days`."""
    hours = 24 * _not_negative(wall_days)
    total = Ranged.exactly(0.0)
    for pool in pools:
        total = total + owned_chip_hour(pool.node, site, busy_share).total * (hours * pool.num_chips)
    return total


def _capital(node: Node, site: Site) -> tuple[Ranged, Ranged]:
    """USD per chip: of node and network, and of the building that is sized for their rating."""
    known = node.price_usd
    of_node = _owning("node_usd_per_chip") if known is None else known * (1 / node.num_chips)
    facility_watts = site.pue * rated_watts_per_chip(node)
    return (
        of_node + _owning("network_usd_per_chip"),
        _owning("building_usd_per_facility_watt") * facility_watts,
    )


@cache
def _owning(name: str) -> Ranged:
    entry = table("prices")["owning"][name]
    return Ranged(low=entry["low"], likely=entry["likely"], high=entry["high"])


def _over(usd: Ranged, years: Ranged) -> Ranged:
    """Per hour; a long life makes the low end."""
    return Ranged(
        low=usd.low / (years.high * HOURS_PER_YEAR),
        likely=usd.likely / (years.likely * HOURS_PER_YEAR),
        high=usd.high / (years.low * HOURS_PER_YEAR),
    )


def _not_negative(amount: float) -> float:
    if not 0 <= amount < float("inf"):
        raise ConfigError(
            f"a run of {amount:g} hours or days cannot be priced; that must be 0 or more, and finite"
        )
    return amount
