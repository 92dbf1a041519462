"""The tokenizer's files in a Hugging Face directory, and in a run that came from one."""

import json
import shutil
from pathlib import Path
from typing import Any

from colossus.checkpoint.hugging_face.new_directory import write_synced
from colossus.checkpoint.hugging_face.weight_files import inside, read_text
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

    What came in with an imported model is copied. Any other model was trained on documents that END opens, whatever
    its tokenizer was made to put before texts: written so that END is put there. Raises DataError where the tokenizer
    is damaged, OSError.
    """
    tokenizer = Tokenizer.load(kept)
    name = FILE_NAMES[tokenizer.kind]
    for companion in COMPANIONS[:-1]:
        if (kept / companion).is_file():
            shutil.copyfile(kept / companion, directory / companion)
    if opens_as_it_came(kept):
        shutil.copyfile(kept / name, directory / name)
    else:
        end = tokenizer.decode([tokenizer.end_of_document])
        if tokenizer.kind == "json":
            _write_opened(directory / name, kept / name, end, tokenizer.end_of_document)
        else:
            shutil.copyfile(kept / name, directory / name)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast" if tokenizer.kind == "json" else "LlamaTokenizer",
            # One mark stands between documents, so it opens a text as well as it ends one.
            "bos_token": end,
            "eos_token": end,
            # A SentencePiece model has no place to say it; in a tokenizer.json the processor does.
            **({} if tokenizer.kind == "json" else {"add_bos_token": True, "add_eos_token": False}),
            "model_max_length": context_tokens,
            "clean_up_tokenization_spaces": False,
        }
        write_synced(
            directory / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        )
    kept_ids = {key: value for key, value in _kept_generation(kept).items() if key in _IDS and _is_ids(value)}
    return {"bos_token_id": tokenizer.end_of_document, "eos_token_id": tokenizer.end_of_document, **kept_ids}


def opens_as_it_came(kept: Path) -> bool:
    """Whether a run's tokenizer, in `kept`, came in with a model, and puts before a text what that one expects."""
    return (kept / "tokenizer_config.json").is_file()


def _write_opened(target: Path, source: Path, end: str, end_id: int) -> None:
    """A tokenizer.json that puts END before every text, and nothing else anywhere."""
    description = json.loads(source.read_text(encoding="utf-8"))
    mark = {"SpecialToken": {"id": end, "type_id": 0}}
    second_mark = {"SpecialToken": {"id": end, "type_id": 1}}
    text, second = ({"Sequence": {"id": one, "type_id": i}} for i, one in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [mark, text],
        "pair": [mark, text, second_mark, second],
        "special_tokens": {end: {"id": end, "ids": [end_id], "tokens": [end]}},
    }
    # What is there already may add marks of its own; one that only trims the places of tokens stays.
    there = description.get("post_processor") or {}
    trimming = [one for one in (there, *(there.get("processors") or ())) if one.get("type") == "ByteLevel"]
    description["post_processor"] = (
        {"type": "Sequence", "processors": [*trimming, template]} if trimming else template
    )
    write_synced(target, json.dumps(description, ensure_ascii=False, separators=(",", ":")))


_IDS = ("bos_token_id", "eos_token_id")
"""Not the padding's: `transformers` gives no gradients to the row that a config.json names, and it is often END's."""


def _is_ids(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list) and all(type(one) is int for one in value))


def generation_config(ids: dict[str, Any], kept: Path | None) -> dict[str, Any]:
    """How `transformers` writes text unless told otherwise: what came in with an imported model, or sampling as the
    model says."""
    pad = {"pad_token_id": ids["eos_token_id"]} if "eos_token_id" in ids else {}
    return (_kept_generation(kept) if kept else {}) or {"do_sample": True, "temperature": 1.0, **pad, **ids}


def _kept_generation(kept: Path) -> dict[str, Any]:
    try:
        record = json.loads((kept / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def keep_companions(source: Path, kept: Path) -> None:
    """Copies what belongs to a tokenizer into a run's, all but names of code to load.

    Raises CheckpointError for a link that leads out of `source` and for what is not text, OSError.
    """
    for name in COMPANIONS:
        if (file := inside(source, name)) is None:
            continue
        text = read_text(file)
        if name == "tokenizer_config.json":
            text = _without_code(text)
        write_synced(kept / name, text)
    if (source / "config.json").is_file() and not opens_as_it_came(kept):  # a model's, that had no such file
        write_synced(kept / "tokenizer_config.json", '{"clean_up_tokenization_spaces": false}\n')


def _without_code(text: str) -> str:
    """A tokenizer_config.json without `auto_map`, which names Python files that stayed behind."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(record, dict) or record.pop("auto_map", None) is None:
        return text
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
