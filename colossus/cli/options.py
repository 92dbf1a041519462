"""Options that several commands share, and what they mean as settings of a configuration."""

import json
from pathlib import Path
from typing import Annotated

import typer

from colossus.errors import ConfigError
from colossus.units import parse_number

DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="PATH[=WEIGHT]",
        help="Text to train on: a file, directory, glob, 'stdlib' or 'hf:owner/name'. Repeat for a mixture; "
        "=WEIGHT is a source's share of the samples.",
    ),
]
TextFieldOption = Annotated[
    str | None,
    typer.Option(
        "--text-field", metavar="NAME", help="Field with the text in .jsonl and .parquet files. [text]"
    ),
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="FILE",
        help="Use this tokenizer.json or SentencePiece .model; else one is learned.",
    ),
]
VocabSizeOption = Annotated[
    int | None, typer.Option("--vocab-size", metavar="N", help="Entries of the tokenizer that is learned.")
]
StepsOption = Annotated[str | None, typer.Option(metavar="N", help="Train for so many steps.")]
TokensOption = Annotated[
    str | None, typer.Option(metavar="N", help="... for so many tokens: 500k, 10M, 1.5B.")
]
MinutesOption = Annotated[str | None, typer.Option(metavar="N", help="... for so many minutes of wall time.")]
CpuSecondsOption = Annotated[
    str | None,
    typer.Option(metavar="N", help="... until the process has used so many seconds of CPU time."),
]
RunNameOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The run's directory is NAME-001, -002, …")
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_DIR", help="A run's directory, its name, 'latest', or a Hugging Face directory."
    ),
]
TopKOption = Annotated[int | None, typer.Option(metavar="K", help="Choose among the K likeliest tokens.")]
TopPOption = Annotated[
    float | None, typer.Option(metavar="P", help="Choose among the likeliest that together make up P.")
]
TemperatureOption = Annotated[
    float, typer.Option(metavar="T", help="0: always the likeliest token; 1: as the model says.")
]
SamplingSeedOption = Annotated[
    int | None, typer.Option(metavar="N", help="The same seed writes the same text.")
]
StopOption = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Stop before it. Repeatable.")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change any setting of the run. Repeatable."),
]
RunsOption = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Directory that holds the runs.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object to stdout; everything else goes to stderr.")
]


def data_settings(data: list[str] | None, text_field: str | None) -> list[str]:
    """The settings that `--data` and `--text-field` stand for."""
    if not data:
        if text_field is not None:
            raise ConfigError("--text-field says where the text is in --data; give --data too")
        return []
    sources = []
    for text in data:
        path, weight = split_weight(text)
        keys = [f"path = {toml_string(path)}"]
        if weight is not None:
            keys.append(f"weight = {weight}")
        if text_field is not None:
            keys.append(f"text_field = {toml_string(text_field)}")
        sources.append("{" + ", ".join(keys) + "}")
    return [f"data.sources=[{', '.join(sources)}]"]


def split_weight(text: str) -> tuple[str, float | None]:
    """`"web=3"` → `("web", 3.0)`. What exists as a path is one, even if it is called `year=2024`."""
    path, equals, weight = text.rpartition("=")
    if not equals or not path or Path(text).exists():
        return text, None
    try:
        return path, float(weight)
    except ValueError:
        return text, None


def tokenizer_settings(tokenizer: Path | None, vocab_size: int | None) -> list[str]:
    """The settings of the tokenizer alone; the model's vocabulary is `train`'s business."""
    if tokenizer is not None and vocab_size is not None:
        raise ConfigError(
            "--tokenizer and --vocab-size contradict each other: a tokenizer from a file has its size already"
        )
    if tokenizer is not None:
        return ["data.tokenizer.kind=file", f"data.tokenizer.path={toml_string(str(tokenizer))}"]
    if vocab_size is not None:
        return ["data.tokenizer.kind=bpe", f"data.tokenizer.vocab_size={vocab_size}"]
    return []


def budget_settings(given: dict[str, str | None]) -> list[str]:
    """The one budget among `--steps`, `--tokens`, `--minutes` and `--cpu-seconds`, by unit; none is fine."""
    chosen = {unit: amount for unit, amount in given.items() if amount is not None}
    if len(chosen) > 1:
        options = " and ".join(f"--{unit.replace('_', '-')} {amount}" for unit, amount in chosen.items())
        raise ConfigError(f"{options} contradict each other: a run has one budget, so give one of them")
    for unit, amount in chosen.items():
        _check_positive(f"--{unit.replace('_', '-')}", amount)
    return [f"budget={toml_string(f'{amount} {unit}')}" for unit, amount in chosen.items()]


def _check_positive(option: str, text: str) -> None:
    try:
        number = parse_number(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
    if number <= 0:
        raise ConfigError(f"{option} is {text}; it must be above 0")


def toml_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # JSON's escapes are TOML's
