"""`colossus plan` and `explain`: how a model trains on a fleet, and why."""

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from colossus.cli.options import JsonOption
from colossus.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from colossus.cli.plan_goal import Asked
    from colossus.planner.result import Planned
    from colossus.spec.fleet import Fleet
    from colossus.spec.model import ModelSpec

PLAN_EPILOG = """\b
Examples:
  colossus plan llama3.1-405b --fleet colossus-200k --tokens 15T
  colossus plan grok-1 --fleet h100:4096 --tokens 2T --out grok.json --plot grok.png
  colossus plan llama3.1-8b --fleet h100:64 --goal loss=2.1 --objective cost
  colossus plan llama3.1-70b --fleet h100:1024 --by 2027-03-01      as many tokens as can be until then
  colossus plan mixtral-8x7b --fleet h200:256 --tokens 1T --fix tp=4 --fix precision=bfloat16 --max-batch 16M
  colossus plan gpt2 --fleet laptop --json | jq .estimate.days
  colossus plan --prove grok.json          run a step of each kind of its ranks, without its machines
"""
EXPLAIN_EPILOG = """\b
Examples:
  colossus explain plan.json               every choice, with its reason
  colossus explain plan.json tp            one field: what it is, why, what the next-best would cost
  colossus explain plan.json mfu           ... and how it was computed, with this plan's numbers
"""
FLAT = ("step_time_s", "tokens_per_s", "mfu", "memory_bytes", "days", "goodput", "energy_mwh", "water_m3", "co2_t",
        "cost_usd")  # fmt: skip
"""What `estimate` has in the JSON object."""

PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A file written by colossus plan --out.")]


def plan(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A name (see: colossus models), or a .toml or .json file.")
    ] = None,
    fleet: Annotated[
        str | None,
        typer.Option("--fleet", metavar="FLEET", help="A name (see: colossus fleet list), chips in place "
                     "(h100:4096, h100:150000+h200:50000), or a .toml file."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Train on so many: 300B, 15T. [20 for each active parameter]")
    ] = None,
    goal: Annotated[
        str | None, typer.Option(metavar="loss=X", help="... or until this loss, in nats per token, by a scaling law.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(metavar="DATE", help="... or as many tokens as can be until then: 2027-03-01.")
    ] = None,
    objective: Annotated[str, typer.Option(metavar="WHAT", help="Make this small: time, cost or energy.")] = "time",
    sequence: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens of a sequence. [the model's context, at most 8192]")
    ] = None,
    fix: Annotated[
        list[str] | None,
        typer.Option("--fix", metavar="NAME=VALUE", help="Decide a choice yourself: tp=8, precision=fp8. Repeatable."),
    ] = None,
    max_batch: Annotated[
        str | None, typer.Option(metavar="N", help="At most so many tokens per step: 16M; or '2048 sequences'.")
    ] = None,
    deadline: Annotated[str | None, typer.Option(metavar="DAYS", help="At most so many days, from today.")] = None,
    budget: Annotated[str | None, typer.Option(metavar="USD", help="At most so many dollars: 50M.")] = None,
    max_power: Annotated[
        str | None, typer.Option(metavar="WATTS", help="At most so much for the whole facility: 150MW.")
    ] = None,
    json: JsonOption = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plan, for explain and compare.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it, as a PNG.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write --out and --plot over files that exist.")] = False,
    prove: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="In place of planning: run a step of each kind of rank of a plan, "
                     "without data, and set what it holds and exchanges beside what was planned."),
    ] = None,
) -> None:  # fmt: skip
    """Plan how to train a model on a fleet: layout, schedule, batch, memory, time, energy and cost.

    Every choice has its reason and what the next-best would cost. Every figure is an estimate with a range that holds
    the truth about four times in five.
    """
    if prove is not None:
        from colossus.cli.prove import prove_plan

        prove_plan(prove, json=json)
        return
    model = _given(context, model, "argument 'MODEL'")
    fleet = _given(context, fleet, "option '--fleet'")
    from colossus import zoo
    from colossus.cli.plan_files import refuse_existing, write
    from colossus.cli.plan_goal import Options, asked
    from colossus.hardware import parse_fleet

    refuse_existing(out, plot, force)
    today = date.today()
    spec, ground = zoo.load(model), parse_fleet(fleet)
    options = Options(
        tokens=tokens, goal=goal, by=by, objective=objective, sequence=sequence, fix=tuple(fix or ()),
        max_batch=max_batch, deadline=deadline, budget=budget, max_power=max_power,
    )  # fmt: skip
    wanted = asked(spec, options, today)
    planned, notes = _planned(spec, ground, wanted, today)
    if out is not None:
        write(out, planned.plan.to_json().encode(), force)
    if plot is not None:
        from colossus.planner.explain.plot import plot_png

        write(plot, plot_png(planned), force)
    if json:
        from json import dumps

        for note in notes:
            typer.echo(note, err=True)
        typer.echo(dumps(_as_json(planned)))
        return
    from colossus.cli.plan_text import report

    console = _console()
    for part in report(planned, notes):
        console.print(part)
    written = [str(path) for path in (out, plot) if path is not None]
    if written:
        console.print(f"\nwrote {' and '.join(written)}", style="dim", soft_wrap=True, markup=False)
    if out is not None:
        console.print(f"  train it: colossus train --plan {out}", style="dim", soft_wrap=True, markup=False)


def explain(
    path: PlanFile,
    field: Annotated[
        str | None,
        typer.Argument(metavar="FIELD", help="A choice (tp), a figure (mfu) or a part of one (bubble)."),
    ] = None,
) -> None:
    """Explain a plan's choices and figures: what each is, why, and how it was computed."""
    from rich.text import Text

    from colossus.cli.plan_text import advice_lines, field_table, grid
    from colossus.planner.explain.describe import explain_field, field_names
    from colossus.planner.explain.facts import compared
    from colossus.spec.plan import Plan

    told = Plan.load(path)
    console = _console()
    if field is None:
        console.print(field_table(told, field_names(told)))
        for line in advice_lines(told):
            console.print(line)
        return
    one = explain_field(told, field)
    rows = [(one.name, one.value), ("", one.what), ("why", one.why)]
    if one.next_best is not None:
        rows.append(
            (
                "next best",
                f"{one.next_best.value}: {compared(one.next_best.step_time_ratio, told.goal.objective)}",
            )
        )
    elif one.name in told.goal.fixed:
        rows.append(("next best", "none: it was fixed"))
    rows += [("how" if i == 0 else "", line) for i, line in enumerate(one.how)]
    table = grid(2)
    for i, (label, value) in enumerate(rows):
        if value:
            table.add_row(Text(label, "bold" if i == 0 else "dim"), Text(value, "bold" if i == 0 else ""))
    console.print(table)


def _given(context: typer.Context, value: str | None, missing: str) -> str:
    """Refuses what is only missing where a plan is made, and not proven."""
    return context.fail(f"Missing {missing}.") if value is None else value


# --- planning ---


def _planned(model: "ModelSpec", fleet: "Fleet", wanted: "Asked", today: date) -> tuple["Planned", list[str]]:
    """The plan, and what was taken for granted. Until a day: the tokens that a first plan reaches by then."""
    from colossus.planner.plan import make_plan

    if wanted.by is None:
        return make_plan(
            model, fleet, wanted.goal, sequence_tokens=wanted.sequence_tokens, today=today
        ), list(wanted.notes)
    from dataclasses import replace

    from colossus.planner.explain.reasons import advice
    from colossus.units import format_count

    days = float((wanted.by - today).days)
    free = wanted.goal.model_copy(update={"budget_usd": None})
    first = make_plan(model, fleet, free, sequence_tokens=wanted.sequence_tokens, today=today)
    trained, estimate = first.plan.num_steps * first.plan.step_tokens, first.plan.estimate
    share = days / estimate.days.likely
    if wanted.goal.budget_usd is not None:
        share = min(share, wanted.goal.budget_usd / estimate.cost_usd.likely)
    tokens = _rounded_down(trained * share)
    if tokens < first.plan.step_tokens:
        raise ConfigError(
            f"until {wanted.by}, in {days:.0f} days, {model.name} trains {format_count(tokens)} tokens on "
            f"{fleet.name}, less than one step of {format_count(first.plan.step_tokens)}; name a later day, a larger "
            f"fleet or more budget"
        )
    goal = wanted.goal.model_copy(update={"tokens": tokens})
    planned = make_plan(model, fleet, goal, sequence_tokens=wanted.sequence_tokens, today=today)
    until = goal.model_copy(update={"deadline_days": days})
    plan = planned.plan.model_copy(update={"goal": until})
    plan = plan.model_copy(update={"advice": advice(plan, planned.mixture, today=today)})
    note = (
        f"tokens: {format_count(tokens)}, what the fastest plan likely trains in the {days:.0f} days from {today} to "
        f"{wanted.by}" + (" within the budget" if wanted.goal.budget_usd is not None else "")
    )
    return replace(planned, plan=plan, cpu_s=planned.cpu_s + first.cpu_s), [*wanted.notes, note]


def _rounded_down(tokens: float) -> int:
    """To three digits, and a little less than `tokens`, as steps are whole."""
    whole = int(tokens * 0.998)
    unit = int(10 ** max(0, len(str(whole)) - 3))
    return max(1, whole // unit * unit)


def _as_json(planned: "Planned") -> dict[str, Any]:
    from dataclasses import asdict

    estimate = planned.plan.estimate
    return {
        "plan": planned.plan.model_dump(mode="json"),
        "estimate": {name: getattr(estimate, name).model_dump() for name in FLAT},
        "search": {"candidates": planned.candidates, "feasible": planned.feasible, "cpu_s": planned.cpu_s},
        "front": [asdict(point) for point in planned.front],
        "mixture": None if planned.mixture is None else asdict(planned.mixture),
    }


def _console() -> "Console":
    from colossus.cli.plan_text import COLUMNS
    from colossus.cli.screen import screen

    console = screen()
    console.width = min(console.width, COLUMNS)
    return console
