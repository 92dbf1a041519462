"""What there is to train on: a catalog of chips, nodes, fabrics, sites and named fleets, each number with its source.

    chip("h100")   node("hgx-h200")   fabric("spectrum-x-400g")   site("memphis")   fleet("colossus-200k")
    parse_fleet("h100:4096")          a fleet written in place, or a file's

The numbers lie in the TOML files beside this one; `colossus fleet chips` and `colossus fleet show NAME` print them.
"""

from colossus.hardware.catalog import (
    aliases,
    chip,
    chips,
    fabric,
    fabrics,
    fleet,
    fleets,
    node,
    nodes,
    site,
    sites,
)
from colossus.hardware.fleet_text import parse_fleet

__all__ = [
    "aliases", "chip", "chips", "fabric", "fabrics", "fleet", "fleets", "node", "nodes", "parse_fleet", "site", "sites",
]  # fmt: skip
