"""What can go wrong, as a tree. Every message says what was asked, what collides, and what would work.

    ColossusError
    ├── ConfigError          what a person wrote cannot be: unknown key, wrong type, contradiction
    ├── DataError            text, tokenizer or token shards
    │   └── HubUnavailable   a Hugging Face name without network or without the `hub` extra
    ├── CheckpointError      a checkpoint is missing, damaged, or of another model
    ├── RunError             a run directory is missing or cannot be used
    ├── RankFailed           one process of a run failed, or does not end
    └── TrainingDiverged     non-finite losses or gradients too many times in a row

The command line prints the message of a ColossusError without a traceback and exits with status 1
(2 for a ConfigError, as for a wrong option).
"""

import difflib
from collections.abc import Iterable


class ColossusError(Exception):
    """Base of every error that is written for the person who meets it."""


class ConfigError(ColossusError):
    """What was asked for cannot be: an unknown key, a wrong type, an impossible value, a contradiction."""


class DataError(ColossusError):
    """Text cannot be read, a tokenizer does not fit, or token shards are missing or damaged."""


class HubUnavailable(DataError):
    """A dataset was asked for by its hub name and cannot be fetched from here."""


class CheckpointError(ColossusError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class RunError(ColossusError):
    """A run directory is missing, is not one, or is in use."""


class RankFailed(ColossusError):
    """One of a run's processes failed and all have been ended, or some did not end with the others.

    `ranks` are those that the run failed by: the first one to fail, or all that did not end.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


class TrainingDiverged(ColossusError):
    """Too many steps in a row had a non-finite loss or gradient."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'width'?"`, or the whole list when nothing is close; for the end of a message."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(names)}." if names else ""
