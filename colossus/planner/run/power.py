"""What a run draws from the grid: watts, energy, water and carbon, and whether the site can feed it.

Two kinds of watts. *Rated* ones are what power lines and cooling are built for: the node's rating plus network and
storage. *Drawn* ones are what the meter shows: a chip between idle and its limit, according to how busy it is, and the
rest of its node at the share of its rating that was measured. Rated 100,000 H100 take 140 MW and draw about 107.
Published energies are often a chip's limit times its hours, which leaves out the node, the network and the cooling.
"""

import math
from collections.abc import Sequence
from datetime import date
from functools import cache

from colossus.errors import ConfigError, did_you_mean
from colossus.planner.run.rates import table
from colossus.spec.base import Frozen
from colossus.spec.fleet import Chip, Node, Pool, Site
from colossus.spec.ranged import Ranged

HOURS_PER_DAY = 24


class Energy(Frozen):
    """What a run takes at its site."""

    it_watts: Ranged
    """Drawn by nodes, network and storage, on average."""
    facility_watts: Ranged
    """Cooling and losses included."""
    facility_mwh: Ranged
    water_litres: Ranged
    """Used on site; what power plants use is not in it."""
    tonnes_co2e: Ranged
    """Of electricity by the grid's average mix; what building the machines emitted is not in it."""


@cache
def share(name: str) -> Ranged:
    """A published share: `computing`, `waiting`, `rest_of_node`, `network`."""
    known = table("power")["shares"]
    if name not in known:
        raise ConfigError(f"no share of power is called {name!r}.{did_you_mean(name, known)}")
    return Ranged(low=known[name]["low"], likely=known[name]["likely"], high=known[name]["high"])


def chip_watts(chip: Chip, busy_share: float) -> Ranged:
    """Drawn on average by a chip that runs kernels for `busy_share` of the time and waits for the rest.

    Of wall time, so that waiting for a restart counts as waiting.
    """
    if not 0 <= busy_share <= 1:
        raise ConfigError(f"chips busy for {busy_share:g} of the time; that is a share, from 0 to 1")
    activity = share("computing") * busy_share + share("waiting") * (1 - busy_share)
    return activity * max(0.0, chip.power_watts - chip.idle_watts) + Ranged.exactly(chip.idle_watts)


def drawn_watts_per_chip(node: Node, busy_share: float) -> Ranged:
    """IT watts on average: the chip, and its part of its node, of the network and of storage."""
    rest = max(0.0, node.power_watts / node.num_chips - node.chip.power_watts)
    of_network = share("network") * (node.power_watts / node.num_chips)
    return chip_watts(node.chip, busy_share) + share("rest_of_node") * rest + of_network


def rated_watts_per_chip(node: Node) -> float:
    """IT watts that a site must be able to feed: a chip's part of its node's rating, of network and storage."""
    return node.power_watts / node.num_chips * (1 + share("network").likely)


def run_energy(pools: Sequence[Pool], site: Site, wall_days: float, busy_share: float) -> Energy:
    """Of a run that holds all chips of `pools` for `wall_days`; they run kernels for `busy_share` of it."""
    if not (wall_days > 0 and math.isfinite(wall_days)):
        raise ConfigError(f"a run of {wall_days:g} days; that must be above 0, and finite")
    it_watts = Ranged.exactly(0.0)
    for pool in pools:
        it_watts = it_watts + drawn_watts_per_chip(pool.node, busy_share) * pool.num_chips
    facility_watts = it_watts * site.pue
    hours = wall_days * HOURS_PER_DAY
    facility_kwh = facility_watts * (hours / 1000)
    return Energy(
        it_watts=it_watts,
        facility_watts=facility_watts,
        facility_mwh=facility_kwh * 1e-3,
        water_litres=it_watts * (hours / 1000) * site.wue_litres_per_kwh,
        tonnes_co2e=facility_kwh * site.carbon_kg_per_kwh * 1e-3,
    )


# --- the site's limits ---


def facility_limit_watts(site: Site, day: date) -> float:
    """What the site can feed on a day, cooling included; infinite where it names no limits, 0 before the first."""
    if not site.power_limits:
        return math.inf
    begun = [limit for limit in site.power_limits if limit.since <= day]
    return max(begun, key=lambda limit: limit.since).facility_watts if begun else 0.0


def chips_fed(site: Site, day: date, watts_per_chip: float) -> int | None:
    """How many chips of `watts_per_chip` (IT, as by `rated_watts_per_chip`) the site can feed; None: any number."""
    if not watts_per_chip > 0:
        raise ConfigError(f"chips of {watts_per_chip:g} W; a chip draws more than 0")
    limit = facility_limit_watts(site, day)
    return None if math.isinf(limit) else int(limit / (watts_per_chip * site.pue.likely))


def check_power(pools: Sequence[Pool], site: Site, day: date) -> None:
    """Raises ConfigError when the site cannot feed `pools` on `day`, with the day from which it can."""
    needed = site.pue.likely * sum(pool.num_chips * rated_watts_per_chip(pool.node) for pool in pools)
    limit = facility_limit_watts(site, day)
    if needed <= limit:
        return
    num_chips = sum(pool.num_chips for pool in pools)
    enough = [
        later.since for later in site.power_limits if later.since > day and later.facility_watts >= needed
    ]
    when = f"it can from {min(enough)} on" if enough else "no later limit of it is enough"
    raise ConfigError(
        f"{num_chips:,} chips need {needed / 1e6:,.1f} MW with cooling, and site {site.name} feeds "
        f"{limit / 1e6:,.1f} MW on {day}: {int(num_chips * limit / needed):,} of them; {when}"
    )
