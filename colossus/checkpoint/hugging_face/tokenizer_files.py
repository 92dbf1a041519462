"""The tokenizer's files in a Hugging Face directory, and in a run that came from one."""

import json
import shutil
from pathlib import Path
from typing import Any

from colossus.checkpoint.hugging_face.new_directory import write_synced
from colossus.data.tokenizer import FILE_NAMES, Tokenizer

COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Kept beside an imported run's tokenizer, so that they come out again as they went in."""


def write_tokenizer(directory: Path, kept: Path, context_tokens: int) -> dict[str, Any]:
    """Writes the tokenizer of a run, in `kept`, for `transformers`; returns its special tokens' ids by field.

    What came in with an imported model is copied. Raises DataError where the tokenizer is damaged, OSError.
    """
    tokenizer = Tokenizer.load(kept)
    name = FILE_NAMES[tokenizer.kind]
    shutil.copyfile(kept / name, directory / name)
    for companion in COMPANIONS[:-1]:
        if (kept / companion).is_file():
            shutil.copyfile(kept / companion, directory / companion)
    if not (directory / "tokenizer_config.json").exists():
        end = tokenizer.decode([tokenizer.end_of_document])
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast" if tokenizer.kind == "json" else "LlamaTokenizer",
            # One mark stands between documents, so it opens a text as well as it ends one.
            "bos_token": end,
            "eos_token": end,
            "model_max_length": context_tokens,
            "clean_up_tokenization_spaces": False,
        }
        write_synced(
            directory / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        )
    return {"bos_token_id": tokenizer.end_of_document, "eos_token_id": tokenizer.end_of_document}


def generation_config(ids: dict[str, Any], kept: Path | None) -> dict[str, Any]:
    """How `transformers` writes text unless told otherwise: what came in with an imported model, or sampling as the
    model says."""
    if kept is not None and (file := kept / "generation_config.json").is_file():
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            return record
    return {"do_sample": True, "temperature": 1.0, **ids}


def keep_companions(source: Path, kept: Path) -> None:
    """Copies what belongs to a tokenizer into a run's. Raises OSError."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, kept / name)
