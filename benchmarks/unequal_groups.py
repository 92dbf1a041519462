"""Two replica groups of unequal speed in one job: does the plan's split let them finish their steps together?

    colossus doctor --calibrate --out here.toml
    python benchmarks/unequal_groups.py here.toml                    as root, on Linux with cgroups of version 1

Each group is one process of `colossus train --plan`, held by the kernel to its share of a core (the CPU's CFS quota).
The planner gets a fleet of two pools whose chips are this machine's measured one, slowed by as much, and decides who
takes how many sequences. The same model is also trained with an equal split, and both are compared:

 step      on the wall, the median, beside what the planner predicted
 limit     of the CPU time that a group's quota allows while steps run, the part that it used: what it did not use, it
           waited for the other group
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import colossus
from colossus.errors import ConfigError
from colossus.events import StepDone, read_events
from colossus.hardware import parse_fleet
from colossus.planner.plan import make_plan
from colossus.spec.fleet import Chip, Fabric, Fleet, Pool, Tier
from colossus.spec.goal import Goal
from colossus.spec.measured import Measured
from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec
from colossus.spec.plan import Plan

CGROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 20_000
MODEL = ModelSpec(
    name="unequal",
    vocab_size=4096,
    context_tokens=512,
    num_layers=4,
    hidden_size=256,
    attention=AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64),
    mlp=MlpSpec(intermediate_size=672, activation="swiglu"),
)
SEQUENCES, SEQUENCE_TOKENS, NUM_STEPS, WARM_UP_STEPS = 12, 512, 10, 3
TEXT = Path(colossus.__file__).parent / "spec"
"""What is trained on: little, so that the closing evaluation is short."""
POLL_S = 0.02


# --- the fleet ---


def slowed(chip: Chip, share: float, number: int) -> Chip:
    """The chip when it gets `share` of a core."""
    measured = chip.measured
    assert measured is not None, "this fleet has not been measured"
    fields: dict[str, Any] = {
        name: tuple(_longer(item, share) for item in getattr(measured, name))
        for name in ("matmuls", "attention", "operations")
    }
    own: Measured = measured.model_copy(update=fields)
    return chip.model_copy(
        update={
            "name": f"{chip.name}-{number}",
            "measured": own,
            "peak_flops": {name: rate * share for name, rate in chip.peak_flops.items()},
            "memory_bandwidth": chip.memory_bandwidth * share,
        }
    )


def _longer(item: Any, share: float) -> Any:
    def times(value: Any) -> Any:
        return tuple(one / share for one in value) if isinstance(value, tuple) else value / share

    names = [name for name in ("seconds", "backward_seconds") if hasattr(item, name)]
    return item.model_copy(update={name: times(getattr(item, name)) for name in names})


def fleet_of(here: Fleet, limits: Sequence[float]) -> Fleet:
    """A node of one chip for each limit."""
    node = here.pools[0].node
    pools = []
    for number, share in enumerate(limits):
        chip = slowed(node.chip, share, number)
        update = {"name": f"{node.name}-{number}", "chip": chip, "num_chips": 1, "scale_up_chips": 1,
                  "nic_bandwidth": node.scale_up_bandwidth}  # fmt: skip
        pools.append(Pool(node=node.model_copy(update=update), num_nodes=1))
    fabric = Fabric(
        name="loopback", source="messages of processes of one machine", kind="ethernet", switch_ports=len(limits),
        efficiency=1.0, tiers=(Tier(name="loopback", num_chips=len(limits), latency_s=0.001),),
    )  # fmt: skip
    return here.model_copy(update={"pools": tuple(pools), "fabric": fabric})


def planned(fleet: Fleet) -> Plan:
    goal = Goal(
        tokens=10**6, max_global_batch_sequences=SEQUENCES,
        fixed={"tp": 1, "pp": 1, "cp": 1, "shard": 1, "precision": "float32", "recompute": "none"},
    )  # fmt: skip
    return make_plan(MODEL, fleet, goal, sequence_tokens=SEQUENCE_TOKENS).plan


def equal_split(plan: Plan) -> Plan:
    each = plan.step_tokens // plan.sequence_tokens // len(plan.pools)
    pools = tuple(
        pool.model_copy(update={"micro_batch_sequences": 1, "num_micro_batches": each}) for pool in plan.pools
    )
    return plan.model_copy(update={"pools": pools})


# --- runs ---


@dataclass(frozen=True)
class Trained:
    step_time_s: float
    used: tuple[float, ...]
    """By rank: of the CPU time that its limit allowed during steps, the part that it took."""


@contextmanager
def cgroups(limits: Sequence[float]) -> Iterator[list[Path]]:
    made = [CGROUPS / f"colossus-unequal-{number}" for number in range(len(limits))]
    for path, share in zip(made, limits, strict=True):
        path.mkdir(exist_ok=True)
        (path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (path / "cpu.cfs_quota_us").write_text(str(round(PERIOD_US * share)))
    try:
        yield made
    finally:
        for path in made:
            path.rmdir()


def trained(plan: Plan, limits: Sequence[float]) -> Trained:
    with tempfile.TemporaryDirectory() as scratch, cgroups(limits) as groups:
        folder = Path(scratch)
        (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        command = [sys.executable, "-m", "colossus.cli", "train", "--plan", str(folder / "plan.json")]
        command += ["--threads", "1", "--steps", str(NUM_STEPS), "--no-sample", "--name", "run"]
        command += ["--runs", str(folder / "runs"), "--data", str(TEXT)]
        with (folder / "said").open("w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said)
            samples = _watched(process, groups, folder / "runs" / "run-001" / "events.jsonl")
        if process.returncode:
            raise SystemExit((folder / "said").read_text())
        events = read_events(folder / "runs" / "run-001" / "events.jsonl")
        steps = [event for event in events if isinstance(event, StepDone)]
    (started_s, first), (ended_s, last) = samples
    return Trained(
        statistics.median(step.step_time_s for step in steps[WARM_UP_STEPS:]),
        tuple((last[i] - first[i]) / (ended_s - started_s) / share for i, share in enumerate(limits)),
    )


def _watched(
    process: subprocess.Popen[bytes], groups: Sequence[Path], events: Path
) -> list[tuple[float, list[float]]]:
    """Holds ranks to their limits as soon as they are there. Returns the time and each rank's CPU time after the
    warm-up and after the last step."""
    held: dict[int, psutil.Process] = {}
    samples: list[tuple[float, list[float]]] = []
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True) if len(held) < len(groups) else ():
            try:
                command, rank = child.cmdline(), child.environ().get("RANK")
            except psutil.Error:
                continue
            if rank is not None and "colossus.trainer.run_ranks" in command and int(rank) not in held:
                (groups[int(rank)] / "cgroup.procs").write_text(str(child.pid))
                held[int(rank)] = child
        done = events.read_text().count('"StepDone"') if events.exists() else 0
        if len(samples) < 2 and done >= (WARM_UP_STEPS, NUM_STEPS)[len(samples)]:
            used = [sum(held[rank].cpu_times()[:2]) for rank in sorted(held)]
            samples.append((time.monotonic(), used))
        time.sleep(POLL_S)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fleet", type=Path, help="what `colossus doctor --calibrate` wrote")
    parser.add_argument("--limits", type=float, nargs=2, default=(0.6, 0.3), help="of a core, for each group")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write what was measured here")
    args = parser.parse_args()
    if not os.access(CGROUPS, os.W_OK):
        raise SystemExit(
            f"{CGROUPS} is no place to write to: CPU limits are set by root, in cgroups of version 1"
        )
    try:
        fleet = parse_fleet(str(args.fleet))
    except ConfigError as error:
        parser.error(str(error))
    plan = planned(fleet_of(fleet, args.limits))
    rows = []
    print(f"limits of {' and '.join(f'{share:.0%}' for share in args.limits)} of a core")
    print(
        f"{'split':>8} {'sequences':>10} {'predicted s':>12} {'step s':>8}   part of its limit that each group used"
    )
    for _ in range(args.repetitions):
        for name, one in (("equal", equal_split(plan)), ("planned", plan)):
            took = trained(one, args.limits)
            split = [pool.micro_batch_sequences * pool.num_micro_batches for pool in one.pools]
            guess = plan.estimate.step_time_s.likely if name == "planned" else None
            rows.append({"split": name, "sequences": split, "predicted_s": guess, "step_time_s": took.step_time_s,
                         "used": took.used})  # fmt: skip
            print(
                f"{name:>8} {' + '.join(map(str, split)):>10} {f'{guess:.2f}' if guess else '':>12} "
                f"{took.step_time_s:8.2f}   {', '.join(f'{part:.0%}' for part in took.used)}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
