"""Text to token shards, in stages that each leave a finished file: an interrupted preparation goes on where
it was.

    corpus/ manifest.json              written last; names the generation that is the corpus corpus-<plan>/
      one generation plan.json                first file: marks the folder as ours tokenizer.json
      source-000/train-00000.tokens, .index, heldout-00000.tokens, … work/                    surveys, hashes,
      verdicts, finished parts; removed before the manifest appears

The folder's name is a fingerprint of all that decides its content, so a changed source or setting leads to
another generation beside the old one, which readers keep until the new manifest replaces the old in one
rename.
"""

import errno
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from colossus.data import hub
from colossus.data.corpus import Corpus
from colossus.data.duplicates import resolve
from colossus.data.encode import SourceTotals, encode_source
from colossus.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    SourceRecord,
    TokenizerRecord,
)
from colossus.data.progress import Progress, SilentProgress
from colossus.data.readers import is_hub, listing_fingerprint
from colossus.data.sample import limit_variety, sampled_texts
from colossus.data.shards import SHARD_TOKENS, token_dtype
from colossus.data.storage import exclusive_lock, publish, return_free_memory, write_atomically
from colossus.data.survey import SourceChangedError, Survey, survey_source
from colossus.data.tokenizer import FILE_NAMES, Tokenizer
from colossus.errors import DataError
from colossus.spec.base import fingerprint
from colossus.spec.data import DataConfig, LoadedTokenizer, Source, TrainedTokenizer

LOCK_NAME = ".corpus.lock"
PLAN_NAME = "plan.json"
GENERATION = re.compile(r"corpus-[0-9a-f]{16}")
GENERATION_PARTS = re.compile(r"plan\.json.*|manifest\.json.*|tokenizer\..*|source-\d+|work")


def prepare(
    config: DataConfig,
    directory: Path,
    *,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Corpus:
    """Makes `directory` the corpus that `config` describes, and opens it.

    A corpus that is already up to date is only opened; one whose sources, tokenizer file or settings have
    changed is rebuilt beside the old and replaced in one rename. A preparation that was cut off goes on from
    its last finished stage or shard, and ends with the same bytes as one that was not. Of two processes, the
    second waits and opens. Memory stays bounded whatever the corpus's size.

    Raises DataError: text that cannot be read, a tokenizer that does not load, no text at all, a folder that
    holds something else, a disk that is full or cannot be written.
    """
    progress = progress or SilentProgress()
    directory = directory.absolute()
    try:
        refuse_inside_source(config, directory)
        plan = make_plan(config, shard_tokens)
        ready = up_to_date(directory, plan)
        if ready is not None:
            return ready
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / LOCK_NAME).exists():
            refuse_strangers(directory)  # before the lock leaves a file there
        waiting = f"waiting for another preparation of {directory}"
        with exclusive_lock(directory / LOCK_NAME, lambda: progress.stage(waiting, None)):
            refuse_strangers(directory)
            return up_to_date(directory, plan) or build(plan, directory, progress)
    except OSError as error:
        raise DataError(disk_trouble(error, directory)) from error


def refuse_inside_source(config: DataConfig, directory: Path) -> None:
    """Raises DataError when the corpus would lie in a folder that it is made of, and so change it by being
    made."""
    for source in config.sources:
        root = Path(source.path).expanduser()
        if not is_hub(source) and root.is_dir() and directory.resolve().is_relative_to(root.resolve()):
            raise DataError(
                f"the corpus folder {str(directory)!r} lies inside its own source {source.path!r}; "
                "choose a folder outside"
            )


def disk_trouble(error: OSError, directory: Path) -> str:
    """What the operating system refused, for the person who can do something about it."""
    what = f"cannot prepare a corpus in {str(directory)!r}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{what}. Make room (twice the text's size is enough) and prepare again: it goes on from here"
    if error.filename:
        what += f" ({error.filename})"
    return f"{what}. Choose a folder that can be written"


@dataclass(frozen=True)
class BuildPlan:
    """All that decides the content of a corpus."""

    config: DataConfig
    shard_tokens: int
    listings: tuple[str, ...]
    tokenizer: str | None
    """Fingerprint of the loaded tokenizer's file, None for one that is trained."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of everything here."""
        return fingerprint(self.description())

    @property
    def generation(self) -> str:
        """The folder that holds what this plan makes."""
        return f"corpus-{self.fingerprint}"

    def description(self) -> dict[str, object]:
        """What `plan.json` says."""
        return {
            "format_version": FORMAT_VERSION,
            "config": self.config.model_dump(mode="json"),
            "shard_tokens": self.shard_tokens,
            "listings": list(self.listings),
            "tokenizer": self.tokenizer,
        }


def make_plan(config: DataConfig, shard_tokens: int) -> BuildPlan:
    """Looks at the sources' listings and at the tokenizer file, which is loaded to find trouble early."""
    wanted = config.tokenizer
    return BuildPlan(
        config=config,
        shard_tokens=shard_tokens,
        tokenizer=Tokenizer.load(Path(wanted.path)).fingerprint
        if isinstance(wanted, LoadedTokenizer)
        else None,
        listings=tuple(listing_fingerprint(source) for source in config.sources),
    )


def up_to_date(directory: Path, plan: BuildPlan) -> Corpus | None:
    """The corpus in `directory` if it is whole and is what `plan` makes."""
    try:
        corpus = Corpus.open(directory)
    except DataError:
        return None
    return corpus if corpus.manifest.plan == plan.fingerprint else None


def refuse_strangers(directory: Path) -> None:
    """Raises DataError unless all that `directory` holds was made here: nothing else is ever replaced or
    removed."""
    if (directory / MANIFEST_NAME).exists():
        # A manifest of another format, or of something else, is not ours to replace.
        content = (directory / MANIFEST_NAME).read_bytes()
        try:
            known = isinstance(json.loads(content)["generation"], str)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise DataError(f"{str(directory / MANIFEST_NAME)!r} is not a corpus's; choose another folder")
        return
    for entry in sorted(directory.iterdir()):
        if not (entry.name == LOCK_NAME or is_generation(entry) or entry.name.startswith(MANIFEST_NAME)):
            raise DataError(
                f"{str(directory)!r} is not empty and not a corpus (it holds {entry.name!r}); "
                "choose an empty or a new folder"
            )


def is_generation(path: Path) -> bool:
    """Whether a folder was made by a preparation, finished or not: by its name and the names of all it
    holds."""
    if not (GENERATION.fullmatch(path.name) and path.is_dir()):
        return False
    return all(GENERATION_PARTS.fullmatch(entry.name) for entry in path.iterdir())


def remove_generation(path: Path) -> None:
    """Removes a generation, its plan first: one without a plan is not gone on with should this be cut off."""
    if path.exists():
        (path / PLAN_NAME).unlink(missing_ok=True)
        shutil.rmtree(path)


def build(plan: BuildPlan, directory: Path, progress: Progress) -> Corpus:
    """Runs the stages that are not finished yet. The caller holds the lock."""
    target, work = directory / plan.generation, directory / plan.generation / "work"
    if current_generation(directory) == plan.generation:
        # Same plan, yet not up to date: shards are damaged, so nothing of it can be trusted.
        (directory / MANIFEST_NAME).unlink()
        remove_generation(target)
    for stale in generations(directory):
        # Left by an unfinished preparation of something else, or by a removal that was cut off.
        is_wanted = stale.name == plan.generation and (stale / PLAN_NAME).exists()
        if not is_wanted and stale.name != current_generation(directory):
            remove_generation(stale)
    finished = target / MANIFEST_NAME
    if not finished.exists():
        target.mkdir(exist_ok=True)
        write_atomically(target / PLAN_NAME, json.dumps(plan.description(), indent=1).encode())
        work.mkdir(exist_ok=True)
        try:
            manifest = run_stages(plan, target, work, progress)
        except SourceChangedError:
            remove_generation(target)  # what was surveyed is not there any more
            raise
        write_atomically(finished, manifest.to_json())
    shutil.rmtree(work, ignore_errors=True)
    publish(finished, directory / MANIFEST_NAME)
    for stale in generations(directory):
        if stale.name != plan.generation:
            remove_generation(stale)
    return Corpus.open(directory)


def generations(directory: Path) -> Iterator[Path]:
    """The generations in `directory`, whole or not."""
    return (entry for entry in sorted(directory.iterdir()) if is_generation(entry))


def current_generation(directory: Path) -> str | None:
    """The generation that the manifest names, if there is one."""
    try:
        name = json.loads((directory / MANIFEST_NAME).read_bytes())["generation"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(name)


def run_stages(plan: BuildPlan, target: Path, work: Path, progress: Progress) -> Manifest:
    """Survey, de-duplication, tokenizer, shards; each stage is skipped where its result lies in `work`."""
    config = plan.config
    sources = tuple(
        local_source(source, index, work, progress) for index, source in enumerate(config.sources)
    )
    surveys = [
        survey_source(source, index, config, "" if is_hub(config.sources[index]) else listing, work, progress)
        for index, (source, listing) in enumerate(zip(sources, plan.listings, strict=True))
    ]
    refuse_empty(config, surveys)
    verdicts = work / "verdicts"
    if not verdicts.exists():
        progress.stage("finding duplicates", None)
        scratch = work / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        resolve([work / survey.hashes for survey in surveys], config.heldout_fraction, verdicts, scratch)
    tokenizer = make_tokenizer(config, surveys, target, work, progress)
    progress.stage("writing tokens", sum(survey.bytes for survey in surveys))
    totals = []
    first = 0
    for index, (source, survey) in enumerate(zip(sources, surveys, strict=True)):
        totals.append(
            encode_source(source, index, survey, first, tokenizer, target, work, plan.shard_tokens, progress)
        )
        first += survey.documents
    return make_manifest(plan, tokenizer, surveys, totals)


def local_source(source: Source, index: int, work: Path, progress: Progress) -> Source:
    """The source itself, or the copy of a hub dataset that was fetched for this preparation."""
    if not is_hub(source):
        return source
    copy = work / f"hub-{index:03}.jsonl.gz"
    if not copy.exists():
        hub.fetch(source, copy, progress)
    return Source(path=str(copy), weight=source.weight)


def refuse_empty(config: DataConfig, surveys: list[Survey]) -> None:
    """Raises DataError for a source without a single document, saying what was passed over instead."""
    for source, survey in zip(config.sources, surveys, strict=True):
        if not survey.documents:
            why = f"passed over: {survey.skipped_text}" if survey.skipped_text else f"{survey.files} files"
            raise DataError(f"source {source.path!r} has no text ({why}); name files that hold UTF-8 text")


def make_tokenizer(
    config: DataConfig, surveys: list[Survey], target: Path, work: Path, progress: Progress
) -> Tokenizer:
    """Loads the tokenizer kept by an earlier run of this stage, or makes it and keeps it."""
    if any((target / name).exists() for name in FILE_NAMES.values()):
        return Tokenizer.load(target)
    wanted = config.tokenizer
    if isinstance(wanted, TrainedTokenizer):
        progress.stage("training the tokenizer", None)
        texts = sampled_texts([work / survey.sample for survey in surveys], wanted.max_training_bytes)
        tokenizer = Tokenizer.train(limit_variety(texts), wanted.vocab_size)
        return_free_memory()  # of the learner, before encoding needs its own
    else:
        tokenizer = Tokenizer.load(Path(wanted.path))
    token_dtype(tokenizer.vocab_size)
    tokenizer.save(target)
    return tokenizer


def make_manifest(
    plan: BuildPlan, tokenizer: Tokenizer, surveys: list[Survey], totals: list[SourceTotals]
) -> Manifest:
    """Puts together what the stages found."""
    wanted = plan.config.tokenizer
    asked = wanted.vocab_size if isinstance(wanted, TrainedTokenizer) else tokenizer.vocab_size
    return Manifest(
        format_version=1,
        generation=plan.generation,
        plan=plan.fingerprint,
        config=plan.config,
        config_fingerprint=plan.config.fingerprint(),
        shard_tokens=plan.shard_tokens,
        token_dtype=token_dtype(tokenizer.vocab_size),
        tokenizer=TokenizerRecord(
            kind=tokenizer.kind,
            file_hash=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            asked_vocab_size=asked if asked != tokenizer.vocab_size else None,
            end_of_document=tokenizer.end_of_document,
        ),
        sources=tuple(
            SourceRecord(
                source=source,
                listing=listing,
                files=survey.files,
                documents=survey.documents,
                bytes=survey.bytes,
                duplicates=total.duplicates,
                duplicate_bytes=total.duplicate_bytes,
                skipped=survey.skipped,
                train=total.train,
                heldout=total.heldout,
            )
            for source, listing, survey, total in zip(
                plan.config.sources, plan.listings, surveys, totals, strict=True
            )
        ),
    )
