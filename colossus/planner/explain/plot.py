"""A plan as one picture: where the step's time goes, what fills a rank's memory, and what else could be had."""

import io
from typing import TYPE_CHECKING, Any

from colossus.errors import ConfigError
from colossus.planner.explain.facts import chip_name
from colossus.planner.explain.parts import NETWORK_PARTS, bare, memory_part, step_part, step_parts
from colossus.planner.result import Planned
from colossus.spec.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _PAPER, _GRID, _LIMIT = "#33373d", "#fbfbf9", "#dcdcd8", "#c03d3e"
_COMPUTE, _NETWORK, _WAITING = "#3b76af", "#d98c3f", "#9a9a94"
_COMPUTING = ("matmul", "attention", "experts", "elementwise", "head", "recompute", "optimizer")
_SHADES = ("#3b76af", "#7fb0d6", "#3a923a", "#8fc58f", "#8d6ab8", "#c0a8dc", "#d98c3f", "#ecc08f", "#8c6d56", "#c9b5a5",
           "#9a9a94")  # fmt: skip
_GIB = 2**30
_SHOWN = 0.0005
"""Parts of a step below this share are left out."""
_SLOWEST = 2.0
"""Plans of the front that take longer than this over the fastest are left out."""


def plot_png(planned: Planned) -> bytes:
    """Three panels as a PNG. Raises ConfigError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a picture needs matplotlib; run `pip install matplotlib`") from None
    plan = planned.plan
    # A figure of its own, not pyplot's: no global state, no window.
    figure = Figure(figsize=(15, 5.6), dpi=110, facecolor=_PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 3, width_ratios=(5, 4, 5))
    estimate = plan.estimate
    figure.suptitle(
        f"{plan.model.name} on {plan.fleet.name}   ·   {estimate.step_time_s.likely:.4g} s per step, "
        f"MFU {estimate.mfu.likely:.1%}, {estimate.days.likely:,.1f} days",
        color=_INK, fontsize=13, x=0.012, ha="left",
    )  # fmt: skip
    _time(panels[0], plan)
    _memory(panels[1], plan)
    _front(panels[2], planned, figure)
    for panel in panels:
        panel.set_facecolor(_PAPER)
        panel.tick_params(colors=_INK)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()


def _time(panel: "Axes", plan: Plan) -> None:
    parts = step_parts(plan)
    total = sum(parts.values())
    names = [name for name in parts if parts[name] >= _SHOWN * total][::-1]
    colors = [
        _COMPUTE if name in _COMPUTING else _NETWORK if name in NETWORK_PARTS else _WAITING for name in names
    ]
    seconds = [parts[name] for name in names]
    panel.barh([step_part(name).label for name in names], seconds, color=colors)
    for row, value in enumerate(seconds):
        panel.annotate(
            f"{value:.3g} s, {value / total:.1%}", (value, row), xytext=(4, 0), textcoords="offset points", va="center",
            color=_INK, fontsize=8.5,
        )  # fmt: skip
    panel.set_xlim(0, max(seconds) * 1.3)
    panel.set_xlabel("seconds of one step", color=_INK)
    panel.set_title("Where the step's time goes", loc="left", color=_INK, fontsize=11)
    for label, color in (("compute", _COMPUTE), ("network", _NETWORK), ("waiting", _WAITING)):
        panel.barh([0], [0], color=color, label=label)
    panel.legend(frameon=False, labelcolor=_INK, loc="lower right")


def _memory(panel: "Axes", plan: Plan) -> None:
    columns = range(len(plan.pools))
    held = [{bare(name): size / _GIB for name, size in share.memory_bytes.items()} for share in plan.pools]
    names = list(dict.fromkeys(name for parts in held for name in parts if parts[name] > 0))
    floor = [0.0 for _ in columns]
    for i, name in enumerate(names):
        heights = [parts.get(name, 0.0) for parts in held]
        panel.bar(
            columns,
            heights,
            0.55,
            bottom=floor,
            color=_SHADES[i % len(_SHADES)],
            label=memory_part(name).label,
        )
        floor = [a + b for a, b in zip(floor, heights, strict=True)]
    for column, share in zip(columns, plan.pools, strict=True):
        limit = share.memory_limit_bytes / _GIB
        panel.plot([column - 0.34, column + 0.34], [limit, limit], color=_LIMIT, linewidth=2)
        panel.annotate(
            f"{floor[column]:.1f} of {limit:.1f} GiB", (column, max(limit, floor[column])), xytext=(0, 4),
            textcoords="offset points", ha="center", color=_LIMIT, fontsize=8.5,
        )  # fmt: skip
    highest = max([*floor, *(share.memory_limit_bytes / _GIB for share in plan.pools)])
    panel.set_ylim(0, highest * 1.1)
    panel.set_xlim(-0.6, len(plan.pools) + 0.35)  # room for the legend
    panel.set_xticks(list(columns), [chip_name(plan, share) for share in plan.pools])
    panel.set_ylabel("GiB on the fullest rank", color=_INK)
    panel.set_title("Memory of a rank, and its limit", loc="left", color=_INK, fontsize=11)
    handles, labels = panel.get_legend_handles_labels()
    panel.legend(
        handles[::-1], labels[::-1], frameon=False, labelcolor=_INK, fontsize=8.5, loc="center right"
    )


def _front(panel: "Axes", planned: Planned, figure: "Figure") -> None:
    panel.set_title("Pareto front: no plan is better in all", loc="left", color=_INK, fontsize=11)
    fastest = min((point.seconds_per_token for point in planned.front), default=0.0)
    points = [point for point in planned.front if point.seconds_per_token <= _SLOWEST * fastest]
    if not points:
        panel.text(0.5, 0.5, "no other plan", transform=panel.transAxes, ha="center", color=_INK, alpha=0.6)
        return
    scale, unit = _unit(max(point.seconds_per_token for point in points))
    times = [point.seconds_per_token * scale for point in points]
    left = [point.memory_headroom_bytes / _GIB for point in points]
    dots = panel.scatter(
        left, times, c=[point.cost_usd_per_token * 1e9 for point in points], cmap="viridis_r", s=46, zorder=3
    )
    bar = figure.colorbar(dots, ax=panel, shrink=0.8)
    bar.set_label("USD per billion tokens", color=_INK)
    plan = planned.plan
    own = (
        min(share.memory_limit_bytes - share.peak_bytes for share in plan.pools) / _GIB,
        plan.estimate.step_time_s.likely / plan.step_tokens * scale,
    )
    panel.scatter([own[0]], [own[1]], s=180, marker="*", color=_LIMIT, zorder=4, label="the plan")
    panel.legend(frameon=False, labelcolor=_INK, loc="best")
    panel.margins(0.12, 0.16)
    panel.grid(color=_GRID, zorder=0)
    panel.set_xlabel("GiB of memory left", color=_INK)
    panel.set_ylabel(f"{unit} per token", color=_INK)


def _unit(seconds: float) -> tuple[float, str]:
    """Factor and name of the unit in which `seconds` is neither tiny nor huge."""
    for scale, name in ((1.0, "seconds"), (1e3, "milliseconds"), (1e6, "microseconds")):
        if seconds * scale >= 1.0:
            return scale, name
    return 1e9, "nanoseconds"
