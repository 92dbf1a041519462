"""What a run measured, in tables: beside the estimate of a plan, or beside another run."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from colossus.errors import ConfigError
from colossus.observe.gap import FOLLOW, Gap, circumstances, gaps, rank_gaps
from colossus.observe.report import Report, WallTime, measure
from colossus.observe.run_directory import RunDirectory
from colossus.spec.plan import Plan
from colossus.spec.ranged import Ranged
from colossus.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

# --- a run beside an estimate ---


def beside(run: RunDirectory, plan: Plan | None = None) -> tuple[dict[str, Any], Iterator[Any]]:
    """As JSON, and as things that rich prints."""
    report, rows, notes = _of_run(run, plan)
    told = {
        "run": str(run.path),
        "steps": report.num_steps,
        "steady_steps": report.num_steady_steps,
        "tokens": report.num_tokens,
        "wall": _wall_json(report.wall),
        "step_cpu_s": None if report.step_cpu_s is None else report.step_cpu_s.model_dump(),
        "memory_bytes_by_rank": list(report.memory_bytes_by_rank),
        "fields": [_gap_json(gap) for gap in rows],
        "notes": list(notes),
    }
    return told, _run_parts(run, plan, report, rows, notes)


def _of_run(run: RunDirectory, plan: Plan | None) -> tuple[Report, tuple[Gap, ...], tuple[str, ...]]:
    """What a run measured, each field of an estimate beside it, and what to know of the comparison.

    plan: whose estimate; by default that of the run's own.
    """
    report = measure(run)
    if plan is not None:
        return report, gaps(plan, report), (*_differences(run, plan), *circumstances(plan, report))
    if run.has_plan:
        own = run.plan()
        return report, gaps(own, report), circumstances(own, report)
    config = run.config()
    if config.plan is None:
        raise ConfigError(f"{run.path} has not been planned yet: nothing of it has been trained")
    return report, rank_gaps(config.plan, report), (_ASSUMED,)


_ASSUMED = (
    "A run without --plan takes its step time from an assumed share of the machine's matmul rate; for one that is "
    "estimated, with an interval: colossus plan, then colossus train --plan."
)


def _differences(run: RunDirectory, plan: Plan) -> tuple[str, ...]:
    """What a run did otherwise than a plan says that is not its own."""
    config = run.config()
    pairs: list[tuple[str, Any, Any]] = [
        ("model", config.model.name, plan.model.name),
        ("parameters", config.model.num_params(), plan.model.num_params()),
        ("tokens of a sequence", config.batch.sequence_tokens, plan.sequence_tokens),
        ("sequences of a step", config.batch.sequences, plan.global_batch_sequences),
    ]
    if run.has_plan:
        from colossus.planner.explain.compare import rows
        from colossus.planner.explain.describe import CHOICES

        pairs += [(row.field, row.a, row.b) for row in rows(run.plan(), plan) if row.field in CHOICES]
    elif config.plan is not None:
        pairs += [("ranks", 1, plan.layout.num_ranks), ("precision", config.plan.dtype, plan.precision)]
    told = [f"{name} {mine} (in the plan {theirs})" for name, mine, theirs in pairs if mine != theirs]
    return (f"The run was trained otherwise than the plan says: {'; '.join(told)}.",) if told else ()


def _run_parts(
    run: RunDirectory, plan: Plan | None, report: Report, rows: tuple[Gap, ...], notes: tuple[str, ...]
) -> Iterator[Any]:
    from rich.text import Text

    whose = "another plan's estimate" if plan is not None else "its plan's estimate"
    steps = f"{report.num_steps:,} steps of {format_count(report.num_tokens)} tokens in all"
    yield Text.assemble(
        (run.name, "bold"), f" beside {whose}: {steps}, {report.num_steady_steps:,} of them steady"
    )
    yield Text()
    yield _gap_table([gap for gap in rows if gap.report is not None])
    yield Text("\nnot measured", "dim")
    yield _absent_table([gap for gap in rows if gap.report is None])
    yield Text()
    yield Text(f"{'Wall time':<10}{_wall_text(report.wall)}")
    cpu = report.step_cpu_s
    if report.device_kind == "cpu" and cpu is not None and report.step_time_s is not None:
        yield Text(
            f"{'CPU time':<10}{cpu.likely:.4g} s of the first rank in a step of {report.step_time_s.likely:.4g} s; "
            f"what its threads leave of it, it waits: for other ranks, or for other programs"
        )
    judged = [gap for gap in rows if gap.within is not None and gap.field not in FOLLOW]
    if judged:
        inside = sum(bool(gap.within) for gap in judged)
        yield Text(
            f"{'Intervals':<10}{inside} of {len(judged)} hold what was measured "
            f"({' and '.join(FOLLOW)} follow from the step time); four in five should"
        )
    for note in notes:
        yield Text(f"\n{note}", "yellow")


def _gap_table(rows: list[Gap]) -> "Table":
    table = _table(
        "field", "estimate", "low to high", "measured", "spread", "difference", "within", right=range(1, 6)
    )
    for gap in rows:
        assert gap.estimate is not None
        assert gap.report is not None
        form = _form(gap.field)
        within = "" if gap.within is None else "yes" if gap.within else "no"
        table.add_row(
            gap.field,
            form(gap.estimate.likely),
            _between(gap.estimate, form),
            form(gap.report.likely),
            _between(gap.report, form),
            "" if gap.difference is None else f"{gap.difference:+.1%}",
            within,
            gap.note,
            style="yellow" if gap.within is False else "",
        )
    return table


def _absent_table(rows: list[Gap]) -> "Table":
    from colossus.cli.plan_text import grid

    table = grid(3)
    for gap in rows:
        likely = "" if gap.estimate is None else _form(gap.field)(gap.estimate.likely)
        table.add_row(gap.field, likely, gap.note)
    table.columns[1].justify = "right"
    table.columns[2].style = "dim"
    return table


# --- two runs ---


def two_runs(a: RunDirectory, b: RunDirectory) -> tuple[dict[str, Any], Iterator[Any]]:
    sides = {"a": (a, *_of_run(a, None)), "b": (b, *_of_run(b, None))}
    by_field = {side: {gap.field: gap for gap in rows} for side, (_, _, rows, _) in sides.items()}
    names = list(dict.fromkeys([*by_field["a"], *by_field["b"]]))
    pairs = [(name, by_field["a"].get(name), by_field["b"].get(name)) for name in names]
    otherwise = _differences(a, b.plan()) if b.has_plan else ()
    told = {
        **{
            side: {"run": str(run.path), "steps": report.num_steps, "steady_steps": report.num_steady_steps}
            for side, (run, report, _, _) in sides.items()
        },
        "fields": [
            {
                "field": name,
                "a": None if first is None else _gap_json(first),
                "b": None if second is None else _gap_json(second),
                "b_over_a": _over(first, second),
            }
            for name, first, second in pairs
        ],
    }

    def parts() -> Iterator[Any]:
        from rich.text import Text

        yield Text.assemble(
            ("A ", "dim"), (str(a.path), "bold"), "  ", ("B ", "dim"), (str(b.path), "bold"), "\n"
        )
        table = _table(
            "field", "A estimate", "A measured", "B estimate", "B measured", "B over A", right=range(1, 6)
        )
        for name, first, second in pairs:
            ratio, form = _over(first, second), _form(name)
            table.add_row(
                name,
                *(_likely(value, form) for gap in (first, second) for value in _values(gap)),
                "" if ratio is None else f"{ratio - 1:+.1%}",
            )
        yield table
        for text in otherwise:
            yield Text(
                "\n" + text.replace("The run was", "A was").replace("in the plan", "in B's plan"), "yellow"
            )

    return told, parts()


def _over(a: Gap | None, b: Gap | None) -> float | None:
    """What b measured over what a did."""
    if a is None or b is None or a.report is None or b.report is None or not a.report.likely:
        return None
    return b.report.likely / a.report.likely


def _values(gap: Gap | None) -> tuple[Ranged | None, Ranged | None]:
    return (None, None) if gap is None else (gap.estimate, gap.report)


def _likely(value: Ranged | None, form: Callable[[float], str]) -> str:
    return "" if value is None else form(value.likely)


# --- figures ---


def _gap_json(gap: Gap) -> dict[str, Any]:
    return {
        "field": gap.field,
        "estimate": None if gap.estimate is None else gap.estimate.model_dump(),
        "report": None if gap.report is None else gap.report.model_dump(),
        "difference": gap.difference,
        "within": gap.within,
        "note": gap.note,
    }


def _wall_json(wall: WallTime) -> dict[str, float | None]:
    return {
        "total_s": wall.total_s,
        "kept_s": wall.kept_s,
        "lost_s": wall.lost_s,
        "evaluating_s": wall.evaluating_s,
        "down_s": wall.down_s,
        "other_s": wall.other_s,
        "goodput": wall.goodput,
    }


def _wall_text(wall: WallTime) -> str:
    """`1:05: 80.1% in steps that were kept, 12.0% evaluating`."""
    if wall.total_s <= 0:
        return "nothing is trained yet"
    parts = (
        ("in steps that were kept", wall.kept_s),
        ("in steps that a crash threw away", wall.lost_s),
        ("evaluating", wall.evaluating_s),
        ("down after a crash", wall.down_s),
        ("between steps", wall.other_s),
    )
    told = [f"{seconds / wall.total_s:.1%} {name}" for name, seconds in parts if seconds > 0]
    return f"{format_seconds(wall.total_s)}: {', '.join(told)}"


def _form(field: str) -> Callable[[float], str]:
    """How a figure is written; its unit is in its field's name."""
    if field in ("mfu", "goodput", "goodput_whole_job"):
        return lambda value: f"{value:.1%}"
    if field == "memory_bytes":
        return format_bytes
    if field == "flops_per_step":
        return format_count
    return lambda value: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _between(value: Ranged, form: Callable[[float], str]) -> str:
    low, high = form(value.low), form(value.high)
    return "" if value.low == value.high else f"{low} to {high}"


def _table(*names: str, right: range) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i in right else "left")
    return table
