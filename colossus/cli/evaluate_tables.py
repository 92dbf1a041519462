"""What `colossus evaluate` shows to people, from what it gives to programs."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def text_table(record: dict[str, Any]) -> "Iterator[Table | Text]":
    """A row for each text, the total, and how it was measured."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("text", overflow="fold")
    for name in ("bits/byte", "nats/token", "perplexity", "tokens", "bytes", "documents"):
        table.add_column(name, justify="right")
    rows = record["rows"]
    for row in [*rows, *([] if len(rows) == 1 else [{"name": "all", **record["total"]}])]:
        perplexity = row["perplexity"]
        table.add_row(
            Text(row["name"]),
            f"{row['bits_per_byte']:.4f}",
            f"{row['loss']:.4f}",
            "over 1e308"
            if perplexity is None
            else f"{perplexity:,.2f}"
            if perplexity < 1e6
            else f"{perplexity:.3e}",
            f"{row['num_tokens']:,}",
            f"{row['num_bytes']:,}",
            f"{row['num_documents']:,}",
        )
    yield table
    yield Text(f"\n{record['windows']}. {record['documents']}. {record['dtype']}.", style="dim")


def task_table(records: Sequence[dict[str, Any]]) -> "Table":
    """A row for each metric; what stands in the row above is not said again."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task", overflow="fold")
    for name in ("metric", "filter"):
        table.add_column(name)
    for name in ("value", "± standard error", "examples", "documents"):
        table.add_column(name, justify="right")
    before = None
    for row in records:
        better = {True: " ↑", False: " ↓"}.get(row["higher_is_better"], "")
        error, fewshot, samples = row["standard_error"], row["num_fewshot"], row["num_samples"]
        table.add_row(
            Text("" if row["task"] == before else row["task"]),
            Text(row["metric"] + better),
            Text(row["filter"]),
            f"{row['value']:.4f}",
            "" if error is None else f"{error:.4f}",
            "" if fewshot is None else f"{fewshot}",
            "" if samples is None else f"{samples:,}",
        )
        before = row["task"]
    return table
