"""What `colossus plan` is asked for, from its options: a Goal, a sequence length, and what was taken for granted."""

import math
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any, Literal, get_args

from colossus.errors import ConfigError, did_you_mean
from colossus.units import format_count, parse_number

if TYPE_CHECKING:
    from colossus.spec.goal import Goal
    from colossus.spec.model import ModelSpec

TOKENS_PER_PARAMETER = 20
"""Where nothing says how far to train: compute-optimal, roughly (arXiv:2203.15556)."""
DEFAULT_SEQUENCE_TOKENS = 8192
_MOST = 1e18
"""Tokens, dollars or watts above this are a slip of the keyboard."""
_Objective = Literal["time", "cost", "energy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of `colossus plan` that make a goal, as they were written."""

    tokens: str | None = None
    goal: str | None = None
    by: str | None = None
    objective: str = "time"
    sequence: str | None = None
    fix: tuple[str, ...] = ()
    max_batch: str | None = None
    deadline: str | None = None
    budget: str | None = None
    max_power: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What the options mean."""

    goal: "Goal"
    sequence_tokens: int
    by: date | None
    """Train as many tokens as can be until then; the goal's tokens are only where to start from."""
    notes: tuple[str, ...]
    """What was taken because nothing was said."""


def asked(model: "ModelSpec", options: Options, today: date) -> Asked:
    """Raises ConfigError, one sentence, for what cannot be read and what contradicts."""
    from colossus.planner.search.space import check_fixed
    from colossus.spec.config import validated
    from colossus.spec.goal import Goal

    _refuse_contradictions(options)
    notes: list[str] = []
    sequence = _sequence(model, options.sequence)
    plain: dict[str, Any] = {"objective": _objective(options.objective), "fixed": fixed(options.fix)}
    by = None if options.by is None else _day(options.by, today)
    if options.goal is not None:
        plain["loss"] = _loss(options.goal)
    elif options.tokens is not None:
        plain["tokens"] = _count("--tokens", options.tokens)
    else:
        plain["tokens"] = TOKENS_PER_PARAMETER * model.num_active_params()
        if by is None:
            notes.append(
                f"tokens: {format_count(plain['tokens'])}, {TOKENS_PER_PARAMETER} for each active parameter, as "
                f"neither --tokens nor --goal says how far to train"
            )
    if options.max_batch is not None:
        plain["max_global_batch_sequences"] = _batch(options.max_batch, sequence)
    if options.deadline is not None:
        plain["deadline_days"] = _amount("--deadline", options.deadline, ("days", "day", "d"), "90")
    if options.budget is not None:
        budget = options.budget.strip().removeprefix("$")
        plain["budget_usd"] = _amount("--budget", budget, ("usd", "dollars"), "50M")
    if options.max_power is not None:
        plain["max_power_watts"] = _watts(options.max_power)
    goal = validated(Goal, plain)
    check_fixed(goal)
    return Asked(goal, sequence, by, tuple(notes))


def _refuse_contradictions(options: Options) -> None:
    ends = {"--tokens": options.tokens, "--goal": options.goal, "--by": options.by}
    given = [f"{name} {text}" for name, text in ends.items() if text is not None]
    if len(given) > 1:
        raise ConfigError(
            f"{' and '.join(given)} contradict each other: each says how far to train; give one of them"
        )
    if options.by is not None and options.deadline is not None:
        raise ConfigError(
            f"--by {options.by} is a deadline already, so it takes no --deadline {options.deadline} beside it"
        )
    if options.by is not None and options.objective != "time":
        raise ConfigError(
            f"--by {options.by} asks for as many tokens as can be, which is the objective time, "
            f"not --objective {options.objective}"
        )


def fixed(texts: tuple[str, ...]) -> dict[str, int | str]:
    """`("tp=8", "precision=fp8")` → `{"tp": 8, "precision": "fp8"}`. The planner says what a plan has."""
    found: dict[str, int | str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name or not value:
            raise ConfigError(f"--fix {text} is not NAME=VALUE; write for example --fix tp=8")
        name = name.replace("-", "_")
        if name in found and str(found[name]) != value:
            raise ConfigError(f"--fix {name}={found[name]} and --fix {name}={value} contradict each other")
        whole = value.isascii() and value.isdecimal() and len(value) < 18
        if whole and int(value) == 0:
            raise ConfigError(f"--fix {name}={value} cannot be: it must be 1 or more")
        found[name] = int(value) if whole else value
    return found


# --- single options ---


def _number(option: str, text: str, example: str) -> float:
    try:
        number = -1.0 if text.strip().startswith("-") else parse_number(text)
    except ValueError:
        raise ConfigError(
            f"{option}: {text!r} is not a number; write for example {option}{'=' if ' ' in option else ' '}{example}"
        ) from None
    except OverflowError:
        number = math.inf
    if not 0 < number <= _MOST:
        raise ConfigError(f"{option} is {text}; it must be above 0 and at most {_MOST:.0e}")
    return number


def _count(option: str, text: str, example: str = "15T") -> int:
    number = _number(option, text, example)
    if number != int(number):
        raise ConfigError(f"{option} is {text}; it must be a whole number")
    return int(number)


def _amount(option: str, text: str, words: tuple[str, ...], example: str) -> float:
    """A number that may have one of `words` after it."""
    number = text.strip()
    for word in words:
        if number.lower().endswith(word):
            number = number[: -len(word)]
            break
    return _number(option, number.strip(), example)


def _objective(text: str) -> str:
    known = get_args(_Objective)
    if text not in known:
        raise ConfigError(f"--objective {text} is none.{did_you_mean(text, known)}")
    return text


def _loss(text: str) -> float:
    name, equals, value = (part.strip() for part in text.partition("="))
    if name != "loss" or not equals:
        raise ConfigError(
            f"--goal {text} cannot be read; write for example --goal loss=1.9, in nats per token"
        )
    return _number("--goal loss", value, "1.9")


def _sequence(model: "ModelSpec", text: str | None) -> int:
    if text is None:
        return min(model.context_tokens, DEFAULT_SEQUENCE_TOKENS)
    return _count("--sequence", text, "8192")


def _batch(text: str, sequence_tokens: int) -> int:
    """Sequences. Written as tokens, or as sequences with the word."""
    words = text.strip().lower().removesuffix("sequences").removesuffix("sequence").strip()
    if words != text.strip().lower():
        return _count("--max-batch", words, "'2048 sequences'")
    tokens = _count("--max-batch", text, "16M")
    if tokens < sequence_tokens:
        raise ConfigError(
            f"--max-batch {text} tokens is less than one sequence of {sequence_tokens:,}; to count sequences, write "
            f"--max-batch '{text} sequences'"
        )
    return tokens // sequence_tokens


def _watts(text: str) -> float:
    number = text.strip()
    if not number.lower().endswith("w"):
        raise ConfigError(f"--max-power {text} has no unit; write for example --max-power 150MW")
    return _number("--max-power", number[:-1].strip(), "150MW")


def _day(text: str, today: date) -> date:
    try:
        day = date.fromisoformat(text.strip())
    except ValueError:
        raise ConfigError(f"--by {text} is not a day; write for example --by 2027-03-01") from None
    if day <= today:
        raise ConfigError(f"--by {day} is not after today, {today}; name a later day")
    return day
