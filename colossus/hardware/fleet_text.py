"""Fleets as people write them: a name, in place, or a file.

    colossus-200k                   a named fleet
    h100:4096                       4,096 H100 in the nodes they usually come in
    h100:150000+h200:50000          two pools; the numbers count chips, the names are of chips or nodes
    my-fleet.toml                   name, fabric, site, and [[pool]] with node and count (of nodes); chips and nodes
                                    of its own in [chip.NAME] and [node.NAME], as in chips.toml and nodes.toml here,
                                    a fabric or site of its own in [fabric] and [site]

Where fabric or site are not said, the fleet's note says what was taken for them.
"""

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from colossus.errors import ConfigError, did_you_mean
from colossus.hardware import catalog
from colossus.spec.base import Frozen
from colossus.spec.explain import explain
from colossus.spec.fleet import Chip, Fabric, Fleet, Node, Pool, Site, Sourced
from colossus.spec.model import Positive
from colossus.units import parse_number

Made = TypeVar("Made", bound=Sourced)

_DEFAULT_SITE = "us-average"
_MAX_FILE_BYTES = 1_000_000
_EXAMPLE = "write for example h100:4096, h100:150000+h200:50000, a fleet's name, or a .toml file"


class PoolTable(Frozen):
    """A `[[pool]]` of a fleet's file."""

    node: str
    count: Positive
    """Nodes, not chips."""


class FleetTable(Frozen):
    """A fleet's file."""

    name: str | None = None
    fabric: str | dict[str, Any] | None = None
    """A name of the catalog's, or an entry of the fleet's own; `site` too."""
    site: str | dict[str, Any] | None = None
    note: str = ""
    chip: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Chips of the fleet's own by name, as the catalog writes them."""
    node: dict[str, dict[str, Any]] = Field(default_factory=dict)
    pool: Annotated[tuple[PoolTable, ...], Field(strict=False, min_length=1)]


def parse_fleet(text: str) -> Fleet:
    """The fleet that a text means, with a fabric that connects it.

    Raises ConfigError for unknown names, counts that make no whole nodes, files that are missing or wrong, and a
    fabric that joins fewer chips than there are.
    """
    text = text.strip()
    if not text:
        raise ConfigError(f"no fleet is named; {_EXAMPLE}")
    if _is_path(text):
        return _from_file(Path(text))
    if ":" in text or "+" in text:
        return _in_place(text)
    if catalog.find("fleet", text) is None:
        _refuse_name(text)
    return catalog.fleet(text)


def _refuse_name(text: str) -> None:
    if catalog.find("chip", text) or catalog.find("node", text):
        example = f"{text}:{_node_named(text).num_chips}"
        raise ConfigError(f"{text} is no fleet by itself; say how many chips, for example {example}")
    names = catalog.known_names("fleet")
    raise ConfigError(f"no fleet {text!r} in the catalog.{did_you_mean(text, names)} Or {_EXAMPLE}")


# --- in place ---


def _in_place(text: str) -> Fleet:
    pools = [_pool(part.strip(), text) for part in text.split("+")]
    return _fleet(name=text.replace(" ", ""), pools=pools, source=f"written in place: {text}")


def _pool(part: str, whole: str) -> Pool:
    name, colon, count = (piece.strip() for piece in part.partition(":"))
    if not name:
        raise ConfigError(f"{whole!r} has a part without a chip; {_EXAMPLE}")
    node = _node_named(name)
    if not colon or not count:
        raise ConfigError(
            f"{whole!r} does not say how many of {name}; write for example {name}:{node.num_chips}"
        )
    num_chips = _count(name, count)
    num_nodes, rest = divmod(num_chips, node.num_chips)
    if num_nodes and rest:
        raise ConfigError(
            f"{name}:{count} does not fill its nodes: {node.name} has {node.num_chips} chips each; "
            f"write {name}:{num_chips - rest} or {name}:{num_chips - rest + node.num_chips}"
        )
    return (
        Pool(node=node, num_nodes=num_nodes)
        if num_nodes
        else Pool(node=part_of(node, num_chips), num_nodes=1)
    )


def _count(name: str, text: str) -> int:
    try:
        number = parse_number(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 1 and number == int(number)):
        raise ConfigError(
            f"{name}:{text} asks for {text!r} chips; it must be a whole number from 1 up, or 100k"
        )
    return int(number)


def part_of(node: Node, num_chips: int) -> Node:
    """A share of one node: `num_chips` of its chips, and power and price by share, as a cloud rents it."""
    share = num_chips / node.num_chips
    whole_domains = num_chips >= node.scale_up_chips
    changes: dict[str, Any] = {
        "name": f"{node.name}-{num_chips}-of-{node.num_chips}",
        "num_chips": num_chips,
        # Where the share ends within a domain, the smaller domains into which all of it divides.
        "scale_up_chips": math.gcd(num_chips, node.scale_up_chips) if whole_domains else num_chips,
        "power_watts": node.power_watts * share,
        "price_usd": node.price_usd and node.price_usd * share,
        "note": f"{num_chips} of {node.num_chips} chips; power and price by share. {node.note}".strip(),
    }
    return Node.model_validate({**{key: getattr(node, key) for key in Node.model_fields}, **changes})


def _node_named(name: str) -> Node:
    """By a node's name, or by a chip's, which stands for the node that it usually comes in."""
    if catalog.find("node", name) is not None:
        return catalog.node(name)
    found = catalog.find("chip", name)
    if found is None:
        known = {*catalog.known_names("chip"), *catalog.known_names("node")}
        raise ConfigError(f"no chip or node {name!r} in the catalog.{did_you_mean(name, known)}")
    return catalog.node_of_chip(found)


# --- files ---


def _is_path(text: str) -> bool:
    """A .toml file, something with a slash in it, or any file that is there."""
    try:
        return text.endswith(".toml") or "/" in text or Path(text).is_file()
    except (OSError, ValueError):  # too long, or a zero byte: no file can be called so
        return False


def _from_file(path: Path) -> Fleet:
    table = _read(path)
    try:
        pools = [Pool(node=_node_in(table, pool.node), num_nodes=pool.count) for pool in table.pool]
        return _fleet(
            name=table.name or path.stem,
            pools=pools,
            source=f"{path}",
            fabric=_own(Fabric, "fabric", table.fabric),
            site=_own(Site, "site", table.site),
            note=table.note,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _node_in(table: FleetTable, name: str) -> Node:
    """The file's own node of that name, or the catalog's."""
    if name not in table.node:
        return _node_named(name)
    entry = {"name": name, **table.node[name]}
    chip = entry.get("chip")
    if not isinstance(chip, str):
        raise ConfigError(f"node {name}: chip must be the name of one, of the file's own or of the catalog")
    own = {"name": chip, **table.chip[chip]} if chip in table.chip else None
    found = catalog.chip(chip) if own is None else _entry(Chip, f"chip {chip}", own)
    return _entry(Node, f"node {name}", {**entry, "chip": found})


def _own(kind: type[Made], what: str, written: str | dict[str, Any] | None) -> Made | str | None:
    """A name or nothing as it is; an entry as what it says."""
    return _entry(kind, what, written) if isinstance(written, dict) else written


def _entry(kind: type[Made], what: str, plain: dict[str, Any]) -> Made:
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(f"{what}: {'; '.join(explain(error, kind))}") from None


def _read(path: Path) -> FleetTable:
    try:
        if not path.is_file():
            what = "it is no file, but a directory or a device" if path.exists() else "there is no such file"
            raise ConfigError(f"cannot read fleet {path}: {what}")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"cannot read fleet {path}: it is larger than {_MAX_FILE_BYTES:,} bytes")
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a TOML file: it is not text in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"cannot read fleet {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets thousands deep
        raise ConfigError(f"{path} is not a fleet: {error}") from None
    try:
        return FleetTable.model_validate(plain)
    except ValidationError as error:
        problems = "; ".join(explain(error, FleetTable))
        hint = '; a pool is written [[pool]], node = "hgx-h100", count = 16' if "pool" in problems else ""
        raise ConfigError(f"{path}: {problems}{hint}") from None


# --- both ---


def _fleet(
    *,
    name: str,
    pools: Sequence[Pool],
    source: str,
    fabric: Fabric | str | None = None,
    site: Site | str | None = None,
    note: str = "",
) -> Fleet:
    _refuse_twice(pools)
    taken: list[str] = []
    chosen = catalog.fabric(fabric) if isinstance(fabric, str) else fabric or _default_fabric(pools)
    if fabric is None:
        taken.append(f"fabric {chosen.name}, the usual one for its size and NICs")
    if site is None:
        site = "home" if all(pool.chip.generation == "cpu" for pool in pools) else _DEFAULT_SITE
        taken.append(f"site {site}")
    if taken:
        note = f"{note} Not said, and so taken: {'; '.join(taken)}.".strip()
    place = catalog.site(site) if isinstance(site, str) else site
    made = Fleet(name=name, pools=tuple(pools), fabric=chosen, site=place, source=source, note=note)
    made.check()
    return made


def _default_fabric(pools: Sequence[Pool]) -> Fabric:
    return catalog.default_fabric(
        num_chips=sum(pool.num_chips for pool in pools),
        num_nodes=sum(pool.num_nodes for pool in pools),
        nic_bandwidth=max(pool.node.nic_bandwidth for pool in pools),
    )


def _refuse_twice(pools: Sequence[Pool]) -> None:
    seen: set[str] = set()
    for pool in pools:
        if pool.node.name in seen:
            raise ConfigError(
                f"{pool.node.name} is in two pools; a pool is all nodes of one kind, so add the counts up"
            )
        seen.add(pool.node.name)
