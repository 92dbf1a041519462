"""What a run came to: one frozen value, shown as a table, written as `summary.json`, printed as JSON."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from colossus.errors import RunError
from colossus.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run at its end, over all the times it was resumed where not said otherwise. None: not measured."""

    run_dir: str
    steps: int
    tokens: int
    num_params: int
    wall_s: float
    """Of the process that ended the run, from its start: preparation and evaluation included."""
    cpu_s: float
    """CPU time that counts against a budget of it: start-up and training, all the times it was resumed."""
    tokens_per_s: float
    """Median over the run's steps."""
    mfu: float | None
    train_loss: float | None
    """Nats per token, smoothed over the last steps."""
    heldout_bits_per_byte: float | None
    """Over all held-out text, with the final weights."""
    peak_rss_bytes: int
    predicted_memory_bytes: int | None
    """What the plan said of the fullest rank."""
    preparation_cpu_s: float
    """CPU time to tokenize the corpus; next to nothing where an earlier run has done it."""
    compile_s: float
    evaluation_cpu_s: float
    device_kind: str | None = None
    """Where the model was trained: `cpu` or `cuda`."""
    peak_memory_bytes_by_rank: tuple[int, ...] = ()
    """The most that each rank held where the model is: in tensors on a GPU, by the process on a CPU."""

    @property
    def peak_memory_bytes(self) -> int:
        """Of the fullest rank."""
        return max(self.peak_memory_bytes_by_rank, default=self.peak_rss_bytes)

    def to_json(self) -> str:
        """One line, valid JSON: numbers that are not finite become null."""
        record = {key: _finite_or_none(value) for key, value in dataclasses.asdict(self).items()}
        return json.dumps(record, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError for what is not a summary; fields of a newer version are passed over."""
        record = json.loads(text)
        names = {field.name for field in dataclasses.fields(cls)}
        try:
            given = {key: value for key, value in record.items() if key in names}
            by_rank = tuple(given.pop("peak_memory_bytes_by_rank", ()))
            return cls(**given, peak_memory_bytes_by_rank=by_rank)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a summary: {error}") from None

    def write(self, path: Path) -> None:
        path.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises RunError when there is none."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read summary {path}: {error}") from None


def summary_table(summary: Summary) -> "Table":
    """The summary for people: a figure and what it means, a row each."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(justify="left", style="dim")
    table.add_column(justify="right", style="bold")
    table.add_column(style="dim")
    for label, figure, note in _rows(summary):
        table.add_row(label, figure, note)
    return table


def _rows(summary: Summary) -> list[tuple[str, str, str]]:
    rows = [
        (
            "held-out",
            _number(summary.heldout_bits_per_byte, ".4f"),
            "bits per byte, text that the model never saw",
        ),
        ("training loss", _number(summary.train_loss, ".4f"), "nats per token"),
        ("trained", f"{format_count(summary.tokens)} tokens", f"in {summary.steps:,} steps"),
        ("model", f"{format_count(summary.num_params)}", "parameters"),
        ("speed", f"{format_count(summary.tokens_per_s)} tok/s", _mfu_note(summary.mfu)),
        ("took", format_seconds(summary.wall_s), _time_note(summary)),
        ("peak memory", format_bytes(summary.peak_memory_bytes), _memory_note(summary)),
    ]
    return [row for row in rows if row[1]]


def _mfu_note(mfu: float | None) -> str:
    return "" if mfu is None else f"MFU {mfu:.0%} of what this machine's matmuls reach"


def _time_note(summary: Summary) -> str:
    parts = [f"{format_seconds(summary.cpu_s)} of CPU time"]
    for name, seconds in (
        ("preparing data", summary.preparation_cpu_s),
        ("evaluating", summary.evaluation_cpu_s),
        ("compiling", summary.compile_s),
    ):
        if seconds >= 0.1:
            parts.append(f"{name} {format_seconds(seconds)}")
    return ", ".join(parts)


def _memory_note(summary: Summary) -> str:
    num_ranks = len(summary.peak_memory_bytes_by_rank)
    notes = [f"on the fullest of {num_ranks:,} ranks"] if num_ranks > 1 else []
    if summary.predicted_memory_bytes:
        gap = summary.peak_memory_bytes / summary.predicted_memory_bytes - 1
        notes.append(f"predicted {format_bytes(summary.predicted_memory_bytes)} ({gap:+.0%})")
    return ", ".join(notes)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
