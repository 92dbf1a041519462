"""`colossus data prepare` and `colossus data show`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from colossus.cli.group import Group
from colossus.cli.options import (
    DataOption,
    JsonOption,
    RunsOption,
    TextFieldOption,
    TokenizerOption,
    VocabSizeOption,
    data_settings,
    tokenizer_settings,
)

if TYPE_CHECKING:
    from colossus.data import Corpus
    from colossus.spec.data import DataConfig

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Turn text into token shards, and look at them. `colossus train` does it by itself; "
    "these commands do it ahead, once for many runs.",
)


@app.command(
    epilog="""\b
Examples:
  colossus data prepare --vocab-size 2048
  colossus data prepare corpora/mix --data books/ --data 'web/*.jsonl.zst=3' --vocab-size 16384
  colossus data prepare corpora/wiki --data hf:wikitext --tokenizer tokenizer.json
"""
)
def prepare(
    corpus: Annotated[
        Path | None,
        typer.Argument(
            metavar="CORPUS", help="Directory to write. [where `train` looks for just this corpus]"
        ),
    ] = None,
    data: DataOption = None,
    text_field: TextFieldOption = None,
    tokenizer: TokenizerOption = None,
    vocab_size: VocabSizeOption = None,
    runs: RunsOption = Path("runs"),
    json: JsonOption = False,
) -> None:
    """Read text, learn or load a tokenizer, and write token shards.

    An interrupted preparation goes on where it was; one that is up to date is left as it is.
    """
    import colossus.data as corpora

    config = _data_config([*data_settings(data, text_field), *tokenizer_settings(tokenizer, vocab_size)])
    directory = corpus or corpora.corpus_directory(config, runs)
    with corpora.RichProgress() as progress:
        prepared = corpora.prepare(config, directory, progress=progress)
    _show(prepared, json)


@app.command()
def show(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="A directory that `prepare` wrote.")],
    json: JsonOption = False,
) -> None:
    """Show what is in a corpus: sources, documents, tokens, duplicates, what was passed over and why."""
    from colossus.data import Corpus

    _show(Corpus.open(corpus), json)


def _data_config(changes: list[str]) -> "DataConfig":
    from colossus.spec.config import override
    from colossus.spec.data import DataConfig

    return override(DataConfig(), [change.removeprefix("data.") for change in changes])


def _show(corpus: "Corpus", json: bool) -> None:
    if json:
        typer.echo(corpus.manifest.model_dump_json())
        return
    from rich.table import Table

    from colossus.cli.screen import screen
    from colossus.units import format_bytes, format_count

    manifest = corpus.manifest
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("source", "share", "documents", "text", "tokens", "held out", "duplicates"):
        table.add_column(name, justify="left" if name == "source" else "right", no_wrap=name != "source")
    weights = sum(record.source.weight for record in manifest.sources)
    for record in manifest.sources:
        table.add_row(
            record.source.path,
            f"{record.source.weight / weights:.0%}",
            f"{record.documents:,}",
            format_bytes(record.bytes),
            format_count(record.train.tokens),
            format_count(record.heldout.tokens),
            f"{record.duplicates:,}",
        )
    console = screen()
    console.print(f"{corpus.directory}\n", style="bold", soft_wrap=True)
    console.print(table)
    text_bytes = sum(r.train.bytes + r.heldout.bytes for r in manifest.sources)
    tokens = manifest.train_tokens + manifest.heldout_tokens
    console.print(
        f"\n{format_count(manifest.train_tokens)} training tokens, "
        f"{format_count(manifest.heldout_tokens)} held out; "
        f"tokenizer of {manifest.tokenizer.vocab_size:,} entries, "
        f"{text_bytes / max(tokens, 1):.2f} bytes per token"
    )
    for record in manifest.sources:
        for reason, count in record.skipped.items():
            console.print(f"{record.source.path}: {count:,} passed over: {reason}", style="yellow")
