"""A plan as tables that a person can argue with; 110 columns, and plain enough for a pipe."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from colossus.planner.explain.derive import number
from colossus.planner.explain.describe import CHOICES, choice, with_range
from colossus.planner.explain.facts import chip_name, compared
from colossus.planner.explain.parts import bare, memory_part, step_part, step_parts
from colossus.planner.explain.reasons import reasons
from colossus.spec.plan import Plan
from colossus.spec.ranged import Ranged
from colossus.units import format_count

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from colossus.planner.result import Planned

COLUMNS = 110
_BAR = 18
_GIB = 2**30
_FRONT_ROWS = 6
_FRONT_SLOWEST = 2.0
"""Over the fastest; what is slower yet is of no use."""
_NOT_IN_FRONT = ("virtual_stages", "expert_tp", "sharding")
"""Too much for a line; they are in --json."""
_SMALL = 0.005
"""Parts below this share are summed up."""


def report(planned: "Planned", notes: Sequence[str] = ()) -> Iterator[Any]:
    """What `colossus plan` shows, from top to bottom: things that rich prints."""
    plan = planned.plan
    yield _heading(plan)
    for note in notes:
        yield _text(note, "dim")
    yield from _titled("The plan", _choices(plan))
    yield from _titled("Who runs it", _pools(plan))
    yield from _halves(
        (f"Where a step of {plan.estimate.step_time_s.likely:.4g} s goes", _time(plan)),
        ("Memory of the fullest rank, GiB", _memory(plan)),
        beside=len(plan.pools) <= 2,
    )
    yield from _titled("The run, likely (and from low to high)", _run(plan))
    if len(planned.front) > 1:
        yield from _titled(
            "What else could be had: time over the plan's, and no plan better in all columns", _front(planned)
        )
    yield _text("")
    yield _text(
        f"searched {planned.candidates:,} candidates, {planned.feasible:,} fit; {planned.cpu_s:.1f} s of CPU",
        "dim",
    )
    yield from advice_lines(plan)


def advice_lines(plan: Plan) -> Iterator[Any]:
    from rich.padding import Padding

    if plan.advice:
        yield _title("Advice")
    for sentence in plan.advice:
        marked = grid(2, gap=1)
        marked.add_row("•", _text(sentence))
        yield Padding(marked, (0, 0, 0, 0))


def field_table(plan: Plan, names: Sequence[str]) -> "Table":
    """Each field's name, value and reason."""
    from colossus.planner.explain.describe import explain_field

    table = _columns("field", "value", "why", right=())
    for name in names:
        field = explain_field(plan, name)
        table.add_row(_text(name), _text(field.value), _text(field.why, "dim"))
    return table


# --- sections ---


def _heading(plan: Plan) -> "Text":
    from rich.text import Text

    model, fleet = plan.model, plan.fleet
    chips = " + ".join(f"{pool.num_chips:,} {pool.chip.name}" for pool in fleet.pools)
    sizes = format_count(model.num_params())
    if model.num_active_params() != model.num_params():
        sizes += f", {format_count(model.num_active_params())} active"
    return Text.assemble(
        (f"{model.name}", "bold"), f" ({sizes} parameters) on ", (fleet.name, "bold"), f" ({chips}): ",
        f"{format_count(plan.tokens)} tokens in sequences of {plan.sequence_tokens:,}, for the least "
        f"{plan.goal.objective}",
    )  # fmt: skip


def _choices(plan: Plan) -> "Table":
    why = reasons(plan)
    table = _columns("choice", "", "next best", "why", right=())
    for name in _shown(plan):
        other = plan.alternatives.get(name)
        value = choice(plan, name)
        if name == "schedule" and plan.virtual_stages > 1:
            value += f", {plan.virtual_stages} virtual stages"
        best = f"{other.value}: {compared(other.step_time_ratio, plan.goal.objective)}" if other else ""
        table.add_row(_text(name), _text(value, "bold"), _text(best), _text(why.get(name, ""), "dim"))
    return table


def _shown(plan: Plan) -> Iterator[str]:
    """The choices that say something of this plan."""
    layout = plan.layout
    silent = {"num_micro_batches", "virtual_stages"}
    silent |= {
        name
        for name in ("cp", "ep", "expert_tp")
        if choice(plan, name) == "1" and not _has_experts(plan, name)
    }
    if layout.num_ranks == 1:
        silent |= {"tp", "pp", "shard", "replica", "sharding"}
    if layout.pp == 1:
        silent |= {"schedule", "stage_layers"}
    return (name for name in CHOICES if name not in silent)


def _has_experts(plan: Plan, name: str) -> bool:
    return name == "ep" and plan.model.mlp.kind != "dense"


def _pools(plan: Plan) -> "Table":
    table = _columns(
        "pool", "groups", "chips each", "micro-batch × count", "recompute", "step", "spare nodes", "idle",
        right=range(1, 8),
    )  # fmt: skip
    for share in plan.pools:
        table.add_row(
            chip_name(plan, share),
            f"{share.num_groups:,}",
            f"{plan.layout.group_ranks:,}",
            f"{share.micro_batch_sequences} × {share.num_micro_batches}",
            share.recompute,
            f"{share.busy_s:.4g} s",
            f"{share.spare_nodes:,}",
            f"{share.idle_chips:,}",
        )
    return table


def _time(plan: Plan) -> "Table":
    parts = step_parts(plan)
    total = sum(parts.values())
    shown = {name: seconds for name, seconds in parts.items() if seconds >= _SMALL * total}
    rows = [(step_part(name).label, seconds) for name, seconds in shown.items()]
    if rest := total - sum(shown.values()):
        rows.append((f"{len(parts) - len(shown)} smaller", rest))
    longest = max((seconds for _, seconds in rows), default=1.0)
    table = grid(4)
    table.columns[2].justify = table.columns[3].justify = "right"
    for label, seconds in rows:
        bar = "█" * max(1, round(_BAR * seconds / longest))
        table.add_row(label, _text(f"{bar:<{_BAR}}", "blue"), f"{seconds:.3g} s", f"{seconds / total:.1%}")
    return table


def _memory(plan: Plan) -> "Table":
    held = [{bare(name): size / _GIB for name, size in share.memory_bytes.items()} for share in plan.pools]
    names = list(dict.fromkeys(name for parts in held for name, size in parts.items() if size >= 0.005))
    names.sort(key=lambda name: -max(parts.get(name, 0.0) for parts in held))
    table = grid(1 + len(held))
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("", *(_text(chip_name(plan, share), "dim") for share in plan.pools))
    for name in names:
        table.add_row(memory_part(name).label, *(f"{parts.get(name, 0.0):.2f}" for parts in held))
    table.add_row("in all", *(_text(f"{share.peak_bytes / _GIB:.2f}", "bold") for share in plan.pools))
    table.add_row("limit", *(f"{share.memory_limit_bytes / _GIB:.2f}" for share in plan.pools))
    full = [share.peak_bytes / share.memory_limit_bytes for share in plan.pools]
    table.add_row(
        "full", *(f"{'█' * round(8 * min(1.0, f))}{'░' * round(8 * (1 - min(1.0, f)))} {f:.0%}" for f in full)
    )
    return table


def _run(plan: Plan) -> "Table":
    e = plan.estimate
    causes = sorted(e.interruptions_by_cause.items(), key=lambda item: -item[1])[:2]
    top = ", ".join(f"{cause} {share:.0%}" for cause, share in causes)
    table = grid(2)
    batch = f"{format_count(plan.step_tokens)} tokens ({plan.global_batch_sequences:,} sequences)"
    litres = e.water_m3 * 1000.0
    rows = [
        ("steps", f"{plan.num_steps:,} of {batch}, {with_range('step_time_s', e.step_time_s)} each"),
        ("speed", f"{_counted(e.tokens_per_s, 'tokens/s')}, MFU {with_range('mfu', e.mfu)}"),
        ("time", _figure(e.days, "days")),
        (
            "goodput",
            f"{with_range('goodput', e.goodput)}; if every failure restarts the whole job "
            f"{with_range('goodput', e.goodput_whole_job)}",
        ),
        (
            "failures",
            f"{_figure(e.interruptions_per_day, 'a day')}: {top}; checkpoint every {e.checkpoint_interval_s:,.0f} s",
        ),
        (
            "power",
            f"{_figure(e.facility_watts * _power(e.facility_watts.likely)[0], _power(e.facility_watts.likely)[1])}, "
            f"{_figure(e.energy_mwh, 'MWh')}",
        ),
        ("on site", f"{_counted(litres, 'litres of water')}, {_figure(e.co2_t, 't CO2e')}"),
        ("cost", f"{_counted(e.cost_usd, 'USD')}; owned {_counted(e.cost_owned_usd, 'USD')}"),
    ]
    for label, value in rows:
        table.add_row(_text(label, "dim"), _text(value))
    return table


def _front(planned: "Planned") -> "Table":
    points = sorted(planned.front, key=lambda point: point.seconds_per_token)
    points = [
        point for point in points if point.seconds_per_token <= _FRONT_SLOWEST * points[0].seconds_per_token
    ]
    if len(points) > _FRONT_ROWS:  # the fastest, and evenly down to the slowest
        last = len(points) - 1
        points = [points[round(i * last / (_FRONT_ROWS - 1))] for i in range(_FRONT_ROWS)]
    plan = planned.plan
    base = plan.estimate.step_time_s.likely / plan.step_tokens
    names = [name for name in points[0].choice if len({point.choice.get(name) for point in points}) > 1]
    names = [name for name in names if name not in _NOT_IN_FRONT]
    table = _columns(
        *(name.replace("_", "-") for name in names), "time", "GiB left", "J/token", "USD/Gtoken", "group",
        right=range(len(names), len(names) + 5),
    )  # fmt: skip
    for point in points:
        ratio = point.seconds_per_token / base
        table.add_row(
            *(str(point.choice.get(name, "")) for name in names),
            f"{ratio - 1:+.1%}",
            f"{point.memory_headroom_bytes / _GIB:.1f}",
            number(point.energy_joules_per_token, ".3g"),
            number(point.cost_usd_per_token * 1e9, ".3g"),
            f"{point.group_ranks:,}",
        )
    return table


# --- figures ---


def _figure(value: Ranged, unit: str) -> str:
    low, likely, high = (number(x, ",.3g") for x in (value.low, value.likely, value.high))
    return f"{likely} {unit}" if low == high else f"{likely} {unit} ({low} to {high})"


def _counted(value: Ranged, unit: str) -> str:
    low, likely, high = (format_count(x) for x in (value.low, value.likely, value.high))
    return f"{likely} {unit}" if low == high else f"{likely} {unit} ({low} to {high})"


def _power(watts: float) -> tuple[float, str]:
    return (1e-6, "MW") if watts >= 1e6 else (1e-3, "kW") if watts >= 1e3 else (1.0, "W")


# --- tables ---


def grid(num_columns: int, gap: int = 2) -> "Table":
    from rich.table import Table

    table = Table.grid(padding=(0, gap, 0, 0))
    for _ in range(num_columns):
        table.add_column()
    return table


def _columns(*names: str, right: Sequence[int]) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i in right else "left")
    return table


def _halves(left: tuple[str, Any], right: tuple[str, Any], *, beside: bool) -> Iterator[Any]:
    if not beside:
        yield from _titled(*left)
        yield from _titled(*right)
        return
    both = grid(2, gap=6)
    both.add_row(_title(left[0]), _title(right[0]))
    both.add_row(left[1], right[1])
    yield both


def _titled(title: str, body: Any) -> Iterator[Any]:
    yield _title(title)
    yield body


def _title(title: str) -> "Text":
    return _text(f"\n{title}", "bold cyan")


def _text(text: str, style: str = "") -> "Text":
    from rich.text import Text

    return Text(text, style=style)  # as text: square brackets are not markup
