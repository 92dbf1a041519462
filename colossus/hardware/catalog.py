"""The catalog: chips, nodes, fabrics, sites and fleets by name, read from the TOML files when first asked for.

A name may be an alias of the data (`h100` is `h100-sxm`); capital letters make no difference. An unknown name is a
ConfigError that proposes the nearest one. The chip `cpu` and the node `laptop` are the machine at hand.
"""

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal

from colossus.errors import ConfigError, did_you_mean
from colossus.hardware.this_machine import CPU, LAPTOP, this_machine
from colossus.spec.fleet import Chip, Fabric, Fleet, Node, Pool, Site

Kind = Literal["chip", "node", "fabric", "site", "fleet"]
_MEASURED_HERE: dict[Kind, str] = {"chip": CPU, "node": LAPTOP}


def chip(name: str) -> Chip:
    """One GPU by its name, or the CPU of this machine. Raises ConfigError for an unknown name."""
    return _chip(canonical("chip", name))


def node(name: str) -> Node:
    """A server, or a rack that is one NVLink domain. Raises ConfigError for an unknown name."""
    return _node(canonical("node", name))


def fabric(name: str) -> Fabric:
    """A network between nodes. Raises ConfigError for an unknown name."""
    return _fabric(canonical("fabric", name))


def site(name: str) -> Site:
    """A place with power, cooling and prices. Raises ConfigError for an unknown name."""
    return _site(canonical("site", name))


def fleet(name: str) -> Fleet:
    """A named fleet, checked. Raises ConfigError for an unknown name."""
    return _fleet(canonical("fleet", name))


def chips() -> dict[str, Chip]:
    """All chips by name, without aliases."""
    return {name: _chip(name) for name in _names("chip")}


def nodes() -> dict[str, Node]:
    """All nodes by name, without aliases."""
    return {name: _node(name) for name in _names("node")}


def fabrics() -> dict[str, Fabric]:
    """All fabrics by name, without aliases."""
    return {name: _fabric(name) for name in _names("fabric")}


def sites() -> dict[str, Site]:
    """All sites by name, without aliases."""
    return {name: _site(name) for name in _names("site")}


def fleets() -> dict[str, Fleet]:
    """All named fleets, without aliases."""
    return {name: _fleet(name) for name in _names("fleet")}


def aliases(kind: Kind) -> dict[str, str]:
    """Further names that are understood, and the entry that each means."""
    return dict(_file(kind)["aliases"])


def known_names(kind: Kind) -> list[str]:
    """Every name that is understood, aliases included."""
    return [*_names(kind), *aliases(kind)]


def canonical(kind: Kind, name: str) -> str:
    """The entry that a name or an alias means. Raises ConfigError when there is none."""
    found = find(kind, name)
    if found is None:
        raise ConfigError(f"no {kind} {name!r} in the catalog.{did_you_mean(name, known_names(kind))}")
    return found


def find(kind: Kind, name: str) -> str | None:
    """The entry that a name or an alias means, or None."""
    key = name.strip().lower()
    key = aliases(kind).get(key, key)
    return key if key in _names(kind) else None


def node_of_chip(chip_name: str) -> Node:
    """The node that a chip usually comes in; `chip_name` is an entry's name, not an alias."""
    return node(_file("node")["node_of_chip"][chip_name])


def default_fabric(num_chips: int, num_nodes: int, nic_bandwidth: float) -> Fabric:
    """The fabric of a fleet that names none: the first that joins all chips, of those made for its fastest NIC.

    `nic_bandwidth` is in bytes/s per chip and direction. Where none joins them all it is the largest, which
    `Fleet.check` then refuses.
    """
    if num_nodes == 1:
        return fabric("single-node")
    rows = _file("fabric")["default"]
    row = next((row for row in rows if row["nic_bandwidth"] >= nic_bandwidth), rows[-1])
    candidates = [fabric(name) for name in row["fabrics"]]
    return next((found for found in candidates if found.max_chips >= num_chips), candidates[-1])


@cache
def _file(kind: Kind) -> Mapping[str, Any]:
    text = resources.files("colossus.hardware").joinpath(f"{kind}s.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _names(kind: Kind) -> list[str]:
    here = _MEASURED_HERE.get(kind)
    return [*_file(kind)[kind], *([here] if here else [])]


def _entry(kind: Kind, name: str) -> dict[str, Any]:
    return {"name": name, **_file(kind)[kind][name]}


@cache
def _chip(name: str) -> Chip:
    return this_machine().chip if name == CPU else Chip.model_validate(_entry("chip", name))


@cache
def _node(name: str) -> Node:
    if name == LAPTOP:
        return this_machine()
    entry = _entry("node", name)
    return Node.model_validate({**entry, "chip": chip(entry["chip"])})


@cache
def _fabric(name: str) -> Fabric:
    return Fabric.model_validate(_entry("fabric", name))


@cache
def _site(name: str) -> Site:
    return Site.model_validate(_entry("site", name))


@cache
def _fleet(name: str) -> Fleet:
    entry = _entry("fleet", name)
    pools = tuple(Pool(node=node(pool["node"]), num_nodes=pool["num_nodes"]) for pool in entry["pools"])
    parts = {"pools": pools, "fabric": fabric(entry["fabric"]), "site": site(entry["site"])}
    made = Fleet.model_validate({**entry, **parts})
    made.check()
    return made
