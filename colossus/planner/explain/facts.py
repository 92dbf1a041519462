"""Facts of a plan that its reasons, advice and tables share."""

from colossus.errors import ConfigError
from colossus.spec.fleet import Pool
from colossus.spec.plan import Plan, PoolShare

GIB = 2**30
LARGEST_PUBLISHED_BATCH_TOKENS = 15_360 * 4096
"""DeepSeek-V3: 15,360 sequences of 4,096 tokens (arXiv:2412.19437, section 4.2)."""
LARGEST_DENSE_BATCH_TOKENS = 16_000_000
"""Llama 3 405B in its last phase: 16M tokens (arXiv:2407.21783, section 3.4.1)."""


def pool_of(plan: Plan, share: PoolShare) -> Pool:
    """The fleet's pool that a share is of. Raises ConfigError when the fleet has none of its name."""
    for pool in plan.fleet.pools:
        if pool.node.name == share.node:
            return pool
    names = ", ".join(pool.node.name for pool in plan.fleet.pools)
    raise ConfigError(f"the plan runs on {share.node}, and its fleet has {names}")


def chip_name(plan: Plan, share: PoolShare) -> str:
    """What a pool is called: its chip; where two pools have the same chip, its nodes."""
    name = pool_of(plan, share).chip.name
    alike = sum(pool_of(plan, other).chip.name == name for other in plan.pools)
    return name if alike == 1 else share.node


def pace_setter(plan: Plan) -> PoolShare:
    """The pool whose groups take longest for a step."""
    return max(plan.pools, key=lambda share: share.busy_s)


def ideal_bubble(plan: Plan) -> float | None:
    """Waiting in an ideal pipeline over its work; None where there is no pipeline.

    (p − 1) / (v · m) for 1F1B (arXiv:2104.04473); a third of that for zb-h1 (arXiv:2401.10241), a sixth for two chunks
    in a V, with forward, input gradient and weight gradient equally long.
    """
    p, m = plan.layout.pp, pace_setter(plan).num_micro_batches
    if p == 1:
        return None
    factor = {"zb-h1": 3.0, "zbv": 6.0, "dualpipev": 6.0}.get(plan.schedule, float(plan.virtual_stages))
    return (p - 1) / (factor * m)


def hours_lost_per_day(goodput: float) -> float:
    return 24.0 * (1.0 - goodput)


def compared(ratio: float, objective: str = "time") -> str:
    """What the objective is over the plan's, in words: 1.061 → `6.1 % slower`, or dearer, or more energy."""
    if abs(ratio - 1.0) < 0.0005:
        return "the same"
    words = {"cost": ("cheaper", "dearer"), "energy": ("less energy", "more energy")}
    less, more = words.get(objective, ("faster", "slower"))
    if ratio >= 2.0:
        return f"{ratio:.2g} times {'the cost' if objective == 'cost' else 'the ' + objective}"
    return f"{100 * abs(ratio - 1.0):.2g} % {more if ratio > 1 else less}"


def held_chips(plan: Plan) -> int:
    """Chips that the run pays and powers: whole nodes that train, and spare ones."""
    held = 0
    for share in plan.pools:
        each = pool_of(plan, share).node.num_chips
        training = -(-share.num_groups * plan.layout.group_ranks // each)
        held += (training + share.spare_nodes) * each
    return held


def domain_bound(plan: Plan) -> str:
    """How tp stands to the chips that its exchanges stay among."""
    tp = plan.layout.tp
    domain = min(pool.node.scale_up_chips for pool in plan.fleet.pools)
    node = next(pool.node for pool in plan.fleet.pools if pool.node.scale_up_chips == domain)
    links = f"{node.scale_up_bandwidth / 1e9:.0f} GB/s inside, {node.nic_bandwidth / 1e9:.0f} outside"
    name = "machine" if node.chip.generation == "cpu" else "NVLink domain"
    if tp > domain:
        return f"tp {tp} crosses the {name} of {domain} chips ({links})"
    if tp == domain:
        return f"tp {tp} fills the {name}, and more would leave it ({links})"
    return f"tp {tp} stays within the {name} of {domain} chips"


def limit_text(share: PoolShare) -> str:
    return f"{share.memory_limit_bytes / GIB:.1f} GiB"
