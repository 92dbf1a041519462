"""`colossus plan --prove`: what each kind of rank of a plan does in a step, tried out without its machines."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossus.errors import ColossusError, ConfigError
from colossus.spec.plan import Plan
from colossus.units import format_count

if TYPE_CHECKING:
    from rich.table import Table

    from colossus.parallel.dry_run import Proof, RoleProof
    from colossus.planner.estimate.collectives import Exchange

_GIB = 2**30

WHAT_FOR = {
    "tp": "tokens around attention and MLPs",
    "cp": "keys and values of sequences",
    "pp": "tokens on, gradients back",
    "shards": "weights and their gradients",
    "expert_shards": "the same of experts",
    "ep": "tokens to their experts and back",
    "expert_tp": "tokens to shared experts",
    "replica": "gradients of all copies",
    "ends": "the head that is the embedding",
    "group": "the gradient's norm, the loss",
}
"""By group of ranks: what is exchanged in it."""


def what_for(group: str, kind: str) -> str:
    """What a group exchanges in that way, in words."""
    if kind == "all-to-all" and group not in ("ep", "cp"):
        return "whole matrices for Muon"
    return WHAT_FOR.get(group, "")


_MEMORY = (
    ("weights", ("weights",), ("weights",)),
    ("optimizer", ("optimizer",), ("optimizer",)),
    ("activations, loss", ("activations", "loss"), ("activations", "attention", "loss")),
    ("gathered weights, messages", ("gathered",), ("gathered", "communication")),
    ("gradients, workspace", ("gradients", "workspace"), ("gradients", "workspace")),
)
"""What is seen in memory beside the planner's names of it, as far as they can be told apart: gradients that are being
summed look like workspace. The planner's `context` is the device's own, which a dry run has not."""

NOT_AS_ON_A_GPU = (
    "Run as a CPU would: attention in a CPU's kernels with a mask for all pairs of tokens, operators one by one where "
    "a GPU's are fused. So a GPU needs less for activations and workspace than is seen here. What operators, NCCL and "
    "CUDA take for themselves is not seen; the plan's `context` stands for it."
)


def prove_plan(path: Path, *, json: bool) -> None:
    """Prints the proof of a plan file. Raises ColossusError where a rank cannot do a step, or does another one than was
    priced."""
    plan = Plan.load(path)
    proof = _proof(plan)
    if json:
        from json import dumps

        import typer

        typer.echo(dumps(as_json(proof)))
    else:
        from colossus.cli.plan import _console

        console = _console()
        for part in report(proof):
            console.print(part)
    wrong = [one for one in proof.roles if one.differences]
    if wrong:
        raise ColossusError(
            f"{len(wrong)} of {len(proof.roles)} kinds of ranks exchange something else than was priced: "
            f"{_difference(wrong[0])}"
        )


def _proof(plan: Plan) -> "Proof":
    try:
        from colossus.parallel.dry_run import prove
    except ModuleNotFoundError as error:
        raise ColossusError(
            f"--prove runs the trainer's own code, which needs {error.name}: install it, or plan without --prove"
        ) from None
    try:
        return prove(plan, num_processes=len(os.sched_getaffinity(0)))
    except ConfigError as error:
        raise ColossusError(str(error)) from error


# --- as text ---


def report(proof: "Proof") -> Iterator[Any]:
    """From top to bottom: things that rich prints."""
    from rich.text import Text

    plan = proof.plan
    yield Text.assemble(
        (f"\n{plan.model.name}", "bold"), f" on {plan.layout.num_ranks:,} ranks of {plan.fleet.name}, tried out: ",
        f"{len(proof.roles)} kinds of ranks, each in a world of that size, in {proof.seconds:.0f} s",
    )  # fmt: skip
    if plan.precision != proof.dtype:
        yield Text(f"Matmuls in {proof.dtype} stand for those in {plan.precision}.", "dim")
    for one in proof.roles:
        yield Text(f"\n{_title(plan, one)}", "bold cyan")
        yield Text(_run(plan, one), "dim")
        yield _memory(plan, one)
        yield Text("")
        yield _exchanges(plan, one)
        yield Text(_verdict(one), "red" if one.differences else "green")
    yield Text(f"\n{NOT_AS_ON_A_GPU}", "dim")


def _title(plan: Plan, one: "RoleProof") -> str:
    role = one.role
    layers = " and ".join(str(count) for count in role.layers)
    ends = [name for name, there in (("embedding", role.is_first), ("head", role.is_last)) if there]
    where = f"Stage {role.stage} of {plan.layout.pp}, " if plan.layout.pp > 1 else ""
    return (
        f"{where}{layers} layers{''.join(f' + {name}' for name in ends)}, on {plan.pools[role.pool].node}: "
        f"rank {role.rank:,} for {role.num_ranks:,} that are alike"
    )


def _run(plan: Plan, one: "RoleProof") -> str:
    count = plan.pools[one.role.pool].num_micro_batches
    enough = "" if one.num_micro_batches == count else f" of {count:,}, the rest repeats"
    params = ", ".join(f"{name} {format_count(number)}" for name, number in one.num_params.items())
    return (
        f"keeps {format_count(sum(one.num_params.values()))} parameters ({params}); ran {one.num_micro_batches} "
        f"micro-batches{enough}; {one.seconds:.0f} s"
    )


def _memory(plan: Plan, one: "RoleProof") -> "Table":
    planned = plan.pools[one.role.pool].memory_bytes
    table = _columns("memory at the peak, GiB", "seen", "planned", "difference", right=(1, 2, 3))
    seen_total = planned_total = 0
    for name, kinds, parts in _MEMORY:
        seen = sum(one.memory_bytes.get(kind, 0) for kind in kinds)
        wanted = sum(planned.get(part, 0) for part in parts)
        seen_total, planned_total = seen_total + seen, planned_total + wanted
        if max(seen, wanted) >= 0.005 * _GIB:
            table.add_row(name, *_pair(seen, wanted))
    table.add_row("in all, without the device's own", *_pair(seen_total, planned_total), style="bold")
    return table


def _pair(seen: int, planned: int) -> tuple[str, str, str]:
    return f"{seen / _GIB:.2f}", f"{planned / _GIB:.2f}", f"{(seen - planned) / _GIB:+.2f}"


def _exchanges(plan: Plan, one: "RoleProof") -> "Table":
    table = _columns(
        "exchanges",
        "ranks",
        "",
        "seen",
        "GiB",
        "priced",
        "GiB",
        "GiB a step",
        "what for",
        right=(1, 3, 4, 5, 6, 7),
    )
    kinds = dict.fromkeys((e.group, e.kind) for e in (*one.issued, *one.priced))
    for group, kind in kinds:
        times, size = _sum(one.issued, group, kind)
        priced_times, _ = _sum(one.priced, group, kind)
        _, whole = _sum(one.whole_step, group, kind)
        table.add_row(
            group, f"{_size(plan, one, group):,}", kind, f"{times:,}", f"{priced_times:,}", f"{size / _GIB:.3g}",
            f"{whole / _GIB:.3g}", what_for(group, kind),
        )  # fmt: skip
    return table


def _sum(exchanges: "tuple[Exchange, ...]", group: str, kind: str) -> tuple[int, int]:
    here = [one for one in exchanges if (one.group, one.kind) == (group, kind)]
    return sum(one.times for one in here), sum(one.total_bytes for one in here)


def _size(plan: Plan, one: "RoleProof", group: Any) -> int:
    from colossus.spec.layout import mates

    return mates(plan.layout, plan.expert_tp, one.role.rank, group).size


def _verdict(one: "RoleProof") -> str:
    if one.differences:
        return f"Not what was priced: {_difference(one)}"
    return f"All {sum(e.times for e in one.issued):,} exchanges are those that were priced, byte for byte."


def _difference(one: "RoleProof") -> str:
    exchange, count = next(iter(one.differences.items()))
    return (
        f"on stage {one.role.stage}, {exchange.kind} of {exchange.num_bytes:,} bytes among {exchange.group} "
        f"{abs(count)} times {'more' if count > 0 else 'less'}, and {len(one.differences) - 1} other differences"
    )


def _columns(*names: str, right: tuple[int, ...]) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i in right else "left")
    return table


# --- as JSON ---


def as_json(proof: "Proof") -> dict[str, Any]:
    plan = proof.plan
    return {
        "fingerprint": plan.fingerprint(),
        "num_ranks": plan.layout.num_ranks,
        "dtype": proof.dtype,
        "seconds": proof.seconds,
        "roles": [_role_json(plan, one) for one in proof.roles],
        "not_as_on_a_gpu": NOT_AS_ON_A_GPU,
    }


def _role_json(plan: Plan, one: "RoleProof") -> dict[str, Any]:
    from dataclasses import asdict

    return {
        **asdict(one.role),
        "node": plan.pools[one.role.pool].node,
        "num_micro_batches": one.num_micro_batches,
        "num_params": one.num_params,
        "memory_bytes": {"seen": one.memory_bytes, "planned": plan.pools[one.role.pool].memory_bytes},
        "exchanges": {
            name: [
                {"kind": e.kind, "group": e.group, "num_bytes": e.num_bytes, "times": e.times}
                for e in exchanges
            ]
            for name, exchanges in (
                ("seen", one.issued),
                ("priced", one.priced),
                ("whole_step", one.whole_step),
            )
        },
        "num_differences": len(one.differences),
        "seconds": one.seconds,
    }
