"""Spare nodes of a pool, and how a run goes on through failures."""

import math

from colossus.planner.run import reliability
from colossus.spec.fleet import Pool

CONFIDENCE = 0.99
"""Chance that the spares are enough at any moment."""
LEAST_NODES = 32
"""Smaller pools keep no spares: one would be more than 3 % of them."""


def num_spare_nodes(pool: Pool) -> int:
    """Nodes held ready so that repairs seldom leave a replica group without."""
    if pool.num_nodes < LEAST_NODES:
        return 0
    failures = reliability.failures(pool.chip.generation, pool.num_chips)
    in_repair = reliability.nodes_in_repair(failures, reliability.published("repair_days"))
    return min(reliability.num_spares(in_repair.likely, CONFIDENCE), math.floor(pool.num_nodes * 0.1))
