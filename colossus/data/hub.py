"""Hugging Face datasets, brought to this machine once: preparation reads its text several times."""

import gzip
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from colossus.data.progress import Progress
from colossus.data.readers import HUB_PREFIX
from colossus.data.storage import publish, temporary_name
from colossus.errors import DataError, HubUnavailable
from colossus.spec.data import Source

ANSWER_S = 2.5
"""How long the hub may take to say that a dataset exists."""

T = TypeVar("T")


def fetch(source: Source, path: Path, progress: Progress) -> None:
    """Streams the `train` split of `hf:owner/name` (or `hf:owner/name/config`) into `path`, gzipped JSON
    lines.

    Raises HubUnavailable, within seconds, when the `datasets` package or the network is missing or there is
    no such dataset; DataError when its records have no `text_field`.
    """
    name, configuration = _parts(source.path)
    datasets = _library(name)
    from huggingface_hub import HfApi  # comes with datasets

    within(ANSWER_S, lambda: HfApi().dataset_info(name, timeout=ANSWER_S), name)
    progress.stage(f"fetching {source.path}", None)
    records: Iterator[dict[str, Any]]
    try:
        records = iter(datasets.load_dataset(name, configuration, split="train", streaming=True))
        temporary = temporary_name(path)
        with gzip.open(temporary, "wb", compresslevel=1) as file:
            for record in records:
                if source.text_field not in record:
                    fields = ", ".join(sorted(record))
                    raise DataError(f"{source.path} has no field {source.text_field!r}; it has: {fields}")
                line = json.dumps({"text": record[source.text_field]}).encode() + b"\n"
                file.write(line)
                progress.advance(len(line))
    except DataError:
        raise
    except Exception as error:  # the library raises what its many back ends raise
        raise HubUnavailable(f"{source.path} cannot be read from the hub: {_first_line(error)}") from error
    publish(temporary, path)


def _parts(path: str) -> tuple[str, str | None]:
    parts = path.removeprefix(HUB_PREFIX).split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise DataError(f"{path!r} is no dataset name; write hf:owner/name or hf:owner/name/config")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def _library(name: str) -> Any:
    try:
        import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise HubUnavailable(
            f"hf:{name} needs the package 'datasets', which is not installed: "
            "pip install 'colossus-llm[hub]', or name files on this machine"
        ) from error
    return datasets


def within(seconds: float, question: Callable[[], T], name: str) -> T:
    """`question()`, or HubUnavailable when it fails or takes longer: a name look-up has no time limit of its
    own, so it runs in a thread that is left behind."""
    answers: list[T] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            answers.append(question())
        except Exception as error:  # whatever went wrong is told to the person below
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if answers:
        return answers[0]
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    why = _first_line(failures[0]) if failures else f"{endpoint} did not answer within {seconds:g} s"
    raise HubUnavailable(
        f"hf:{name} cannot be fetched from here ({why}); "
        "check the name and the network, or name files on this machine"
    ) from (failures[0] if failures else None)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
