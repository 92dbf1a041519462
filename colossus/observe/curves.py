"""The curves of a run as one picture."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossus.errors import ConfigError
from colossus.events import Event, StepSkipped
from colossus.observe.history import History, history
from colossus.observe.meters import smooth, throughput
from colossus.units import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOSS, _HELDOUT, _RATE, _SPEED = "#3b76af", "#c03d3e", "#3a923a", "#8d6ab8"
_INK, _PAPER, _GRID = "#33373d", "#fbfbf9", "#dcdcd8"


def write_curves(events: Iterable[Event], path: Path, title: str) -> None:
    """Draws training loss, held-out bits per byte, learning rate and throughput against tokens, as a PNG.

    Raises ConfigError where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("curves need matplotlib; run `pip install matplotlib`") from None
    told = history(events)
    # A figure of its own, not pyplot's: no global state, no window.
    figure = Figure(figsize=(11, 7), dpi=120, facecolor=_PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(2, 2, height_ratios=(3, 2))
    figure.suptitle(_title(told, title), color=_INK, fontsize=13, x=0.012, ha="left")
    _loss(panels[0][0], told)
    _heldout(panels[0][1], told)
    _learning_rate(panels[1][0], told)
    _throughput(panels[1][1], told)
    for panel in panels.flat:
        _finish(panel, told)
    figure.savefig(path)


def _title(told: History, title: str) -> str:
    parts = [title]
    if told.starts:
        parts.append(f"{format_count(told.starts[-1].num_params)} parameters")
    parts.append(f"{told.num_steps:,} steps, {format_count(told.num_tokens)} tokens")
    if told.bits_per_byte is not None:
        parts.append(f"{told.bits_per_byte:.3f} bits per byte held out")
    return "   ·   ".join(parts)


def _loss(panel: "Axes", told: History) -> None:
    panel.set_title("Training loss", loc="left", color=_INK, fontsize=11)
    panel.set_ylabel("nats per token", color=_INK)
    if not told.steps:
        return
    tokens, losses = [step.tokens for step in told.steps], [step.loss for step in told.steps]
    panel.plot(tokens, losses, color=_LOSS, alpha=0.25, linewidth=0.8)
    smoothed = smooth(losses, half_life=max(5.0, len(losses) / 200))
    panel.plot(tokens, smoothed, color=_LOSS, linewidth=1.8, label="smoothed")
    _mark_skipped(panel, told)
    _mark_resumes(panel, told)
    panel.legend(frameon=False, labelcolor=_INK, loc="upper right")


def _heldout(panel: "Axes", told: History) -> None:
    panel.set_title("Held-out text", loc="left", color=_INK, fontsize=11)
    panel.set_ylabel("bits per byte", color=_INK)
    if not told.evaluations:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center", color=_INK, alpha=0.6)
        return
    tokens, bits = [e.tokens for e in told.evaluations], [e.bits_per_byte for e in told.evaluations]
    panel.plot(tokens, bits, color=_HELDOUT, linewidth=1.8, marker="o", markersize=3.5)
    last = (tokens[-1], bits[-1])
    panel.annotate(
        f"{last[1]:.3f}", last, xytext=(0, 8), textcoords="offset points", ha="right", color=_HELDOUT
    )


def _learning_rate(panel: "Axes", told: History) -> None:
    panel.set_title("Learning rate", loc="left", color=_INK, fontsize=11)
    panel.set_ylabel("of the matrices", color=_INK)
    panel.plot(
        [s.tokens for s in told.steps], [s.learning_rate for s in told.steps], color=_RATE, linewidth=1.8
    )
    panel.set_ylim(bottom=0)


def _throughput(panel: "Axes", told: History) -> None:
    panel.set_title("Throughput", loc="left", color=_INK, fontsize=11)
    panel.set_ylabel("tokens per second", color=_INK)
    panel.yaxis.set_major_formatter(_count)
    if not told.steps:
        return
    speeds = [step.tokens_per_s for step in told.steps]
    median = throughput(speeds, window=len(speeds))
    panel.plot([step.tokens for step in told.steps], speeds, color=_SPEED, linewidth=0.9, alpha=0.7)
    label = f"median {format_count(median)}, MFU {throughput([s.mfu for s in told.steps], len(speeds)):.0%}"
    panel.axhline(median, color=_SPEED, linewidth=1.4, linestyle="--", label=label)
    panel.legend(frameon=False, labelcolor=_INK, loc="lower right")
    panel.set_ylim(bottom=0)


def _mark_skipped(panel: "Axes", told: History) -> None:
    """A cross at the foot, under the last step before it that was applied."""
    tokens_at = {step.step: step.tokens for step in told.steps}
    skipped = [
        tokens_at.get(problem.step - 1, 0) for problem in told.problems if isinstance(problem, StepSkipped)
    ]
    if skipped:
        foot = panel.get_xaxis_transform()
        crosses = [0.03] * len(skipped)
        panel.plot(skipped, crosses, "x", transform=foot, color=_HELDOUT, markersize=7, label="step skipped")


def _mark_resumes(panel: "Axes", told: History) -> None:
    tokens_at = {step.step: step.tokens for step in told.steps}
    for start in told.starts[1:]:
        if (tokens := tokens_at.get(start.first_step)) is not None:
            panel.axvline(tokens, color=_INK, linewidth=0.8, linestyle=":", alpha=0.7)
            panel.annotate(
                "resumed", (tokens, 0.03), xycoords=("data", "axes fraction"), rotation=90, color=_INK,
                fontsize=8, xytext=(3, 0), textcoords="offset points",
            )  # fmt: skip


def _count(value: float, _: float) -> str:
    return format_count(value)


def _finish(panel: "Axes", told: History) -> None:
    panel.set_facecolor(_PAPER)
    panel.set_xlabel("tokens trained on", color=_INK)
    panel.xaxis.set_major_formatter(_count)
    panel.locator_params(axis="x", nbins=6)
    panel.set_xlim(0, max(told.num_tokens, 1))
    panel.grid(color=_GRID, linewidth=0.8)
    panel.tick_params(colors=_INK, length=0)
    panel.spines[:].set_visible(False)
