"""A loaded model's loss over text: rows for people and programs."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from colossus.data import Corpus, Progress, SilentProgress, Tokenizer, corpus_directory
from colossus.data.readers import Skips
from colossus.errors import ConfigError, DataError
from colossus.evaluate.pieces import File, check_readable, held_out_pieces, text_pieces
from colossus.evaluate.settings import Settings, is_run
from colossus.evaluate.text import TextLoss, text_losses
from colossus.evaluate.windows import Piece
from colossus.generate import LoadedModel
from colossus.observe.run_directory import RunDirectory
from colossus.spec.data import Source


@dataclass(frozen=True, slots=True)
class Measured:
    """The loss over each text by name, and how it came about."""

    rows: tuple[tuple[str, TextLoss], ...]
    settings: Settings
    opening: str
    """What documents begin with, as it is spelled."""
    skipped: str = ""
    """What was passed over in folders, and why; empty where nothing was."""

    @property
    def total(self) -> TextLoss:
        """Over all rows."""
        return reduce(add, (loss for _, loss in self.rows))

    @property
    def documents(self) -> str:
        """A sentence without its full stop."""
        return (
            f"{self.opening} opens each document, whose end is a token of no bytes; no document sees another"
        )

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "context_tokens": self.settings.context_tokens,
            "stride_tokens": self.settings.stride_tokens,
            "dtype": self.settings.dtype,
            "windows": self.settings.windows,
            "documents": self.documents,
            "rows": [{"name": name, **_figures(loss)} for name, loss in self.rows],
            "total": _figures(self.total),
            "skipped": self.skipped,
        }


def _figures(loss: TextLoss) -> dict[str, Any]:
    return {
        "bits_per_byte": loss.bits_per_byte,
        "loss": loss.loss,
        "perplexity": loss.perplexity if math.isfinite(loss.perplexity) else None,
        "nats": loss.nats,
        "num_tokens": loss.num_tokens,
        "num_bytes": loss.num_bytes,
        "num_documents": loss.num_documents,
    }


def measure_text(
    loaded: LoadedModel,
    sources: Sequence[Source],
    settings: Settings,
    *,
    max_bytes: int | None = None,
    by_file: bool = False,
    progress: Progress | None = None,
) -> Measured:
    """A row for each source, or for each file. max_bytes: of each source, from its beginning.

    Raises DataError for what cannot be read: a file that was named must be text; what a folder holds beside text is
    skipped and said.
    """
    check_readable(sources)
    progress = progress or SilentProgress()
    progress.stage(f"evaluating {', '.join(source.path for source in sources)}", None)
    skips = Skips()
    files: list[File] = []
    opening = loaded.borders.opening or (loaded.tokenizer.end_of_document,)
    pieces = text_pieces(sources, loaded.tokenizer, files, opening=opening, max_bytes=max_bytes, skips=skips)
    losses = _losses(loaded, pieces, settings, progress)
    rows = []
    for index, source in enumerate(sources):
        own = [(file.name, losses[owner]) for owner, file in enumerate(files) if file.source == index]
        rows += own if by_file else [(source.path, reduce(add, (loss for _, loss in own)))]
    return Measured(tuple(rows), settings, loaded.tokenizer.decode(opening), str(skips))


def measure_held_out(
    loaded: LoadedModel, settings: Settings, *, progress: Progress | None = None
) -> Measured:
    """The run's own held-out text, a row for each source of its corpus.

    With the settings of its training the total is the closing figure of its training. Raises ConfigError for a model
    that is no run, DataError where the corpus is gone, is another one now, or holds nothing out.
    """
    if not is_run(loaded):
        raise ConfigError(
            f"{loaded.path} is not a run, so there is no held-out text of its own; give --data or --tasks"
        )
    corpus = _corpus(loaded)
    progress = progress or SilentProgress()
    progress.stage("evaluating the run's held-out text", corpus.heldout_tokens)
    files: list[File] = []
    losses = _losses(loaded, held_out_pieces(corpus, files), settings, progress)
    rows = tuple((file.name, losses[owner]) for owner, file in enumerate(files) if owner in losses)
    end = loaded.tokenizer.decode([corpus.end_of_document])
    return Measured(rows, settings, end)


def _losses(
    loaded: LoadedModel, pieces: Iterable[Piece], settings: Settings, progress: Progress
) -> dict[int, TextLoss]:
    return text_losses(
        loaded.model,
        pieces,
        context_tokens=settings.context_tokens,
        stride_tokens=settings.stride_tokens,
        sequences=settings.batch,
        padding=loaded.tokenizer.end_of_document,
        dtype=settings.torch_dtype,
        chunk_tokens=settings.chunk_tokens,
        progress=progress,
    )


def _corpus(loaded: LoadedModel) -> Corpus:
    run = RunDirectory(loaded.path)
    directory: Path = corpus_directory(run.config().data, run.path.resolve().parent)
    try:
        corpus = Corpus.open(directory)
    except DataError as error:
        raise DataError(
            f"{error}. `colossus train --resume {run.path}` prepares it; --data measures any other text"
        ) from error
    if corpus.tokenizer.fingerprint != Tokenizer.load(run.tokenizer_path).fingerprint:
        raise DataError(
            f"{run.path} was trained with another tokenizer than its corpus in {directory} has now: its text has "
            f"changed since. Put the text back, or give --data"
        )
    return corpus
