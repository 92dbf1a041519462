"""Token after token, with a cache of keys and values."""

from collections.abc import Generator, Iterator, Sequence
from itertools import islice

import torch

from colossus.data import Tokenizer
from colossus.generate.sampling import Sampling, next_token
from colossus.models import Cache, Decoder


def generate(
    model: Decoder, tokenizer: Tokenizer, prompt: str, sampling: Sampling, *, cached: bool = True
) -> Generator[str, None, int]:
    """What the model writes after `prompt`, in pieces as they come; the prompt itself is not repeated.

    Ends at `sampling.max_tokens`, before the first stop text, or where the model ends the document. Returns
    how many tokens the model was asked for, a closing one among them.
    """
    prompt_ids = [tokenizer.end_of_document, *map(int, tokenizer.encode(prompt))]
    num_tokens = 0

    def counted() -> Iterator[int]:
        nonlocal num_tokens
        for token in islice(generate_tokens(model, prompt_ids, sampling, cached=cached), sampling.max_tokens):
            num_tokens += 1
            yield token

    yield from _until_stop(_decoded(tokenizer, counted()), sampling.stop)
    return num_tokens


@torch.no_grad()
def generate_tokens(
    model: Decoder, prompt: Sequence[int], sampling: Sampling, *, cached: bool = True
) -> Iterator[int]:
    """Ids without end, after a prompt of at least one id: in training every document opened with END.

    The model sees the last tokens as they fit its context: when it is full, the older half is forgotten, so
    the cost of a token stays bounded. Without `cached` all is computed anew each time: slower, and the same.
    """
    context = model.spec.context_tokens
    device = model.embedding.weight.device
    generator = torch.Generator("cpu")
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    window = list(prompt)
    cache: Cache | None = None
    while True:
        if len(window) > context:
            window = window[-max(1, context // 2) :]
            cache = None
        if cached and cache is not None:
            new = window[cache.lengths[0] :]
        else:
            cache = model.new_cache() if cached else None
            new = window
        hidden = model(torch.tensor([new], device=device), cache=cache)
        token = next_token(model.logits(hidden[:, -1:])[0, 0].cpu(), sampling, generator)
        yield token
        window.append(token)


def _decoded(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    decoder = tokenizer.stream()
    for token in tokens:
        if token == tokenizer.end_of_document or token >= tokenizer.vocab_size:
            break
        yield decoder.push(token)
    yield decoder.finish()


def _until_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Passes text on up to the stop text that is whole first; holds back what may be the beginning of one."""
    longest = max(map(len, stop), default=1)
    held = ""
    for piece in pieces:
        held += piece
        found = [(held.find(text) + len(text), held.find(text)) for text in stop if text in held]
        if found:
            yield held[: min(found)[1]]
            return
        safe = max(0, len(held) - (longest - 1))
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held
