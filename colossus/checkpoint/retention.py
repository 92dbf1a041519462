"""Which checkpoints stay when a new one is on the disk."""

from pathlib import Path

from colossus.checkpoint.directory import discard, list_checkpoints
from colossus.checkpoint.manifest import read_header, size_problems
from colossus.errors import CheckpointError
from colossus.spec.run import Checkpoints


def retire(directory: Path | str, saved: int, keep: Checkpoints) -> list[int]:
    """Delete what need not be kept now that the checkpoint of step `saved` is durable; returns the steps
    deleted.

    Kept: the last `keep.keep_last` up to `saved`, multiples of `keep.keep_every_steps`, and later steps than
    `saved`: those belong to a course of the run that was left by going back, and go once the new course has
    passed them. One that can be seen to be damaged takes no place among the last ones, so it never pushes out
    a good one. Raises OSError if the directory cannot be listed; what cannot be deleted stays for the next
    time.
    """
    past = [checkpoint for checkpoint in list_checkpoints(directory) if checkpoint.step <= saved]
    last = {saved}
    for checkpoint in reversed(past):
        if len(last) == keep.keep_last:
            break
        if looks_whole(checkpoint.path):
            last.add(checkpoint.step)
    every = keep.keep_every_steps
    retired = [c for c in past if c.step < min(last) and not (every and c.step % every == 0)]
    for checkpoint in retired:
        discard(checkpoint)
    return [checkpoint.step for checkpoint in retired]


def looks_whole(path: Path) -> bool:
    """Whether the manifest is good and payloads have their sizes: cheap enough to ask after every save."""
    try:
        return not size_problems(path, read_header(path).file_bytes())
    except CheckpointError:
        return False
