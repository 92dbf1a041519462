"""Two replica groups, held to unequal shares of a core by the kernel: as the planner splits the batch between them,
they train what one process trains. (How long they wait for each other, benchmarks/unequal_groups.py measures.)"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from colossus.hardware import parse_fleet
from colossus.planner.plan import make_plan
from colossus.spec.fleet import Fabric, Fleet, Pool, Tier
from colossus.spec.goal import Goal
from colossus.spec.job import Share
from colossus.spec.plan import Plan
from tests.stories.rank_runs import TWO_LAYERS, Ranks
from tests.stories.test_ranks_layouts import losses

LIMITS, MOST_SEQUENCES, SEQUENCE_TOKENS, NUM_STEPS = (0.6, 0.3), 12, 32, 8
SETTINGS = (f"budget={NUM_STEPS} steps", "checkpoints.every=1000 steps", "evaluation.every=1000 steps")
CGROUPS = Path("/sys/fs/cgroup/cpu")

HELD = """
from colossus.parallel import rank_model

accumulate = rank_model.RankModel.accumulate

def held(*arguments):
    with open(f"{folder}-{{rank}}/cgroup.procs", "w") as group:
        print(os.getpid(), file=group)
    return accumulate(*arguments)

rank_model.RankModel.accumulate = held
"""


@pytest.fixture
def limits() -> Iterator[Path]:
    """The kernel's groups of processes with a limit each: this path with the rank's number behind it."""
    folder = CGROUPS / f"colossus-{os.getpid()}"
    groups = [Path(f"{folder}-{rank}") for rank in range(len(LIMITS))]
    try:
        for group, share in zip(groups, LIMITS, strict=True):
            group.mkdir()
            (group / "cpu.cfs_period_us").write_text("20000")
            (group / "cpu.cfs_quota_us").write_text(str(round(20000 * share)))
        yield folder
    finally:
        for group in groups:
            if group.exists():
                group.rmdir()


def unequal_fleet() -> Fleet:
    """Two machines of one core, as fast as LIMITS leave them."""
    laptop = parse_fleet("laptop:1")
    node = laptop.pools[0].node
    pools = []
    for number, share in enumerate(LIMITS):
        peaks = {name: rate * share for name, rate in node.chip.peak_flops.items()}
        chip = node.chip.model_copy(update={"name": f"core-{number}", "peak_flops": peaks,
                                            "memory_bandwidth": node.chip.memory_bandwidth * share})  # fmt: skip
        pools.append(
            Pool(node=node.model_copy(update={"name": f"machine-{number}", "chip": chip}), num_nodes=1)
        )
    fabric = Fabric(
        name="two-machines", source="invented", kind="ethernet", switch_ports=2, efficiency=1.0,
        tiers=(Tier(name="switch", num_chips=2, latency_s=1e-4),),
    )  # fmt: skip
    return laptop.model_copy(update={"pools": tuple(pools), "fabric": fabric})


def split(plan: Plan) -> list[int]:
    return [pool.micro_batch_sequences * pool.num_micro_batches for pool in plan.pools]


@pytest.mark.slow
@pytest.mark.skipif(not os.access(CGROUPS, os.W_OK), reason="limits are set by root, in cgroups of version 1")
def test_the_planners_split_between_unequal_groups(tmp_path: Path, limits: Path) -> None:
    goal = Goal(
        tokens=10**6,
        max_global_batch_sequences=MOST_SEQUENCES,
        fixed={"tp": 1, "pp": 1, "cp": 1, "shard": 1, "precision": "float32"},
    )
    plan = make_plan(TWO_LAYERS, unequal_fleet(), goal, sequence_tokens=SEQUENCE_TOKENS).plan
    fast, slow = split(plan)
    assert fast > slow
    (tmp_path / "planned.json").write_text(plan.to_json())

    ranks = Ranks(tmp_path, SETTINGS, TWO_LAYERS)
    whole = ranks.plan("one", shares=(Share(num_micro_batches=fast + slow),), sequence_tokens=SEQUENCE_TOKENS)
    ranks.colossus(*ranks.new("one", whole))
    ranks.colossus(*ranks.new("two", str(tmp_path / "planned.json")), in_ranks=HELD.format(folder=limits))
    for rank in range(len(LIMITS)):
        said = Path(f"{limits}-{rank}/cpu.stat").read_text().split()
        assert int(said[said.index("nr_throttled") + 1]) > 0  # the kernel did hold it back
    assert len(losses(ranks.run("two"))) == NUM_STEPS
    assert losses(ranks.run("two")) == pytest.approx(losses(ranks.run("one")), rel=2e-5)
