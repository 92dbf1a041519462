"""Text after a prompt, or after many."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from colossus.data import Tokenizer
from colossus.generate.engine import Engine, Row
from colossus.generate.load import Borders
from colossus.generate.sampling import Sampling
from colossus.generate.text import FinishReason, TextWriter
from colossus.models import Decoder

MAX_ROWS = 16
"""Sequences that are continued at once unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote after a prompt. `num_tokens` counts a closing one, too."""

    text: str
    num_tokens: int
    finish_reason: FinishReason


def prompt_ids(tokenizer: Tokenizer, prompt: str, borders: Borders) -> list[int]:
    """A prompt as the model has met texts: after what opens one. Never empty."""
    ids = [*borders.opening, *map(int, tokenizer.encode(prompt))]
    return ids or [tokenizer.end_of_document]


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    *,
    borders: Borders | None = None,
    cached: bool = True,
) -> Generator[str, None, int]:
    """What the model writes after `prompt`, in pieces as they come; the prompt itself is not repeated.

    Ends at `sampling.max_tokens`, before the first stop text, or where the model ends the document. Returns
    how many tokens the model was asked for, a closing one among them. `borders` are those of a run if not given.
    """
    borders = borders or Borders.of_run(tokenizer)
    writer = TextWriter(tokenizer, sampling, borders.ends)
    for token in generate_tokens(model, prompt_ids(tokenizer, prompt, borders), sampling, cached=cached):
        piece = writer.push(token)
        if piece:
            yield piece
        if writer.finish_reason is not None:
            break
    return writer.num_tokens


def generate_tokens(
    model: Decoder, prompt: Sequence[int], sampling: Sampling, *, cached: bool = True
) -> Iterator[int]:
    """Ids without end, after a prompt of at least one id: in training every document opened with END."""
    engine = Engine(model, cached=cached)
    engine.join(prompt, sampling)
    while True:
        yield engine.step()[0].token


def generate_batch(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling | Sequence[Sampling],
    *,
    borders: Borders | None = None,
    max_rows: int = MAX_ROWS,
) -> list[Completion]:
    """What `generate` writes after each prompt, `max_rows` of them at once; one sampling for all, or one for each.

    A prompt's text is the same whatever stands beside it, but for ties that rounding decides.
    """
    borders = borders or Borders.of_run(tokenizer)
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    waiting = deque(enumerate(zip(prompts, samplings, strict=True)))
    completions: dict[int, Completion] = {}
    engine = Engine(model)
    active: dict[Row, tuple[int, TextWriter, list[str]]] = {}
    while waiting or active:
        while waiting and len(active) < max_rows:
            index, (prompt, one) = waiting.popleft()
            row = engine.join(prompt_ids(tokenizer, prompt, borders), one)
            active[row] = (index, TextWriter(tokenizer, one, borders.ends), [])
        for written in engine.step():
            index, writer, pieces = active[written.row]
            pieces.append(writer.push(written.token))
            if writer.finish_reason is not None:
                completions[index] = Completion("".join(pieces), writer.num_tokens, writer.finish_reason)
                engine.leave(written.row)
                del active[written.row]
    return [completions[index] for index in range(len(prompts))]
