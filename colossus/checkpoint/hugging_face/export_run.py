"""A run's weights as a Hugging Face directory."""

from dataclasses import dataclass
from pathlib import Path

from colossus.checkpoint.directory import list_checkpoints
from colossus.checkpoint.hugging_face.card import model_card
from colossus.checkpoint.hugging_face.new_directory import check_free
from colossus.checkpoint.hugging_face.write import SHARD_BYTES, Written, write_directory
from colossus.checkpoint.load import Loaded, Rejected, load, load_newest
from colossus.data.progress import Progress
from colossus.errors import CheckpointError, RunError
from colossus.observe.run_directory import ORIGIN_NAME, RunDirectory
from colossus.spec.model import Dtype, ModelSpec
from colossus.zoo.hugging_face import architecture_of


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, from the checkpoint of `step`; newer ones that were damaged and passed over."""

    written: Written
    step: int
    rejected: tuple[Rejected, ...]


def export_run(
    run: RunDirectory,
    directory: Path | str,
    *,
    dtype: Dtype = "float32",
    checkpoint: int | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Exported:
    """Write the run's newest good checkpoint, or that of step `checkpoint`, with tokenizer and model card.

    Every byte of the checkpoint is checked before the first is written. float32 is exact. Raises ConfigError if no
    Hugging Face architecture holds the model or `directory` is not empty, CheckpointError, RunError or DataError
    where the run lacks what it takes.
    """
    config = run.config()
    architecture_of(config.model)  # before a large checkpoint is read, not after
    check_free(Path(directory))
    if not run.tokenizer_path.is_dir():
        raise RunError(f"{run.path} has no tokenizer/, which belongs to the model; put it back")
    loaded, rejected = _load(run, config.model, checkpoint)
    written = write_directory(
        config.model,
        lambda name: loaded.tensors[f"model.{name}"],
        directory,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer=run.tokenizer_path,
        card=model_card(run, config, loaded.step, dtype, _origin(run)),
        one_of=lambda name, i: loaded.one_of(f"model.{name}", i),
        release=loaded.forget_pages,
        progress=progress,
    )
    return Exported(written, loaded.step, rejected)


def _origin(run: RunDirectory) -> str | None:
    try:
        return (run.path / ORIGIN_NAME).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _load(run: RunDirectory, model: ModelSpec, step: int | None) -> tuple[Loaded, tuple[Rejected, ...]]:
    if step is None:
        return load_newest(run.checkpoints_path, expect=model, prefix="model.")
    there = {checkpoint.step: checkpoint.path for checkpoint in list_checkpoints(run.checkpoints_path)}
    if step not in there:
        known = ", ".join(f"{one:,}" for one in there) or "none"
        raise CheckpointError(
            f"{run.path} has no checkpoint of step {step:,}; there are those of steps: {known}"
        )
    return load(there[step], expect=model, prefix="model."), ()
