"""A model as lm-eval knows one. This module needs lm-eval; `colossus.evaluate` does not."""

import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from colossus.data import IGNORED, Progress, SilentProgress
from colossus.errors import ConfigError
from colossus.evaluate.score import score
from colossus.generate import LoadedModel, Sampling
from colossus.generate.engine import Engine, Row
from colossus.generate.template import render
from colossus.generate.text import TextWriter

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts (None where there are none), and the tokens of context and continuation."""

DEFAULT_MAX_TOKENS = 256
"""Written where a task does not say how many; lm-eval's own number."""

_logger = logging.getLogger(__name__)


class ColossusLM(TemplateLM):
    """Answers lm-eval's three kinds of requests.

    A text is opened as the model knows it: by END where it was trained here, else by what its tokenizer's files put
    there. Rows of unequal length are padded at the right, where no token sees it; requests are sorted by length, so
    that there is little of it. Answers do not depend on `batch`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        context_tokens: int | None = None,
        batch: int = 8,
        dtype: torch.dtype = torch.float32,
        progress: Progress | None = None,
    ) -> None:
        """context_tokens: the longest input; None: what the model was made for. batch: rows at a time."""
        super().__init__()
        self.loaded = loaded
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.max_length = context_tokens or loaded.model.spec.context_tokens
        self.batch_size = batch
        self.dtype = dtype
        self._progress = progress or SilentProgress()
        self._opening = list(loaded.borders.opening)
        self._controls = loaded.tokenizer.controls()
        self._chatting = False

    # --- texts and tokens ---

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.end_of_document

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text of which every token is asked for."""
        return self._opening[-1] if self._opening else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's caches of requests: another tokenizer or template is another name."""
        return f"{self.loaded.name}-{self.tokenizer.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Opened unless `add_special_tokens` is False, or the text spells out what opens it, as templates do."""
        ids = self._encode(string)
        if add_special_tokens is False or ids[: len(self._opening)] == self._opening:
            return ids
        return [*self._opening, *ids]

    def _encode(self, text: str) -> list[int]:
        if not self._chatting:
            return [int(token) for token in self.tokenizer.encode(text)]
        # A rendered chat is steered by control tokens; anywhere else their spellings are text.
        ids: list[int] = []
        for part in self._cut_at_controls(text):
            if part in self._controls:
                ids.append(self._controls[part])
            elif part:
                ids += map(int, self.tokenizer.encode_without_controls(part))
        return ids

    def _cut_at_controls(self, text: str) -> list[str]:
        if not self._controls:
            return [text]
        longest_first = sorted(self._controls, key=len, reverse=True)
        return re.split(f"({'|'.join(map(re.escape, longest_first))})", text)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.loaded.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The model's own template. From here on control tokens in a text are taken for what they are."""
        if self.loaded.chat_template is None:
            raise ConfigError(f"{self.loaded.name} has no chat template; leave out --chat")
        self._chatting = True
        return render(
            self.loaded.chat_template,
            chat_history,
            self.loaded.special_tokens,
            add_generation_prompt=add_generation_prompt,
        )

    # --- how likely a text is ---

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation its log-probability, and whether it is what greedy decoding would write.

        What is longer than the model's context loses its beginning.
        """
        too_long = max((len(continuation) for _, _, continuation in requests), default=0)
        if too_long > self.max_length:
            raise ConfigError(
                f"a continuation has {too_long:,} tokens, and {self.loaded.name} reads {self.max_length:,} at "
                f"a time; this task is not for this model"
            )
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        self._progress.stage(f"{len(requests):,} continuations", len(requests))
        order = self._longest_first([len(one[1]) + len(one[2]) for one in requests])
        for part in (order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)):
            rows = [requests[number] for number in part]
            inputs, targets = self._padded(rows)
            scores = score(self.model, inputs, targets, dtype=self.dtype)
            counted = targets != IGNORED
            sums = scores.log_probabilities.sum(1)
            greedy = (scores.is_likeliest | ~counted).all(1)
            for row, number in enumerate(part):
                answers[number] = float(sums[row]), bool(greedy[row])
                texts = requests[number][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[number])
            self._progress.advance(len(part))
        return answers

    def _padded(self, rows: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 [rows, longest]; only continuations are targets."""
        texts = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in rows]
        longest = max(len(text) for text in texts) - 1
        inputs = np.full((len(rows), max(1, longest)), self.eot_token_id, np.int64)
        targets = np.full_like(inputs, IGNORED)
        for row, (text, (_, _, continuation)) in enumerate(zip(texts, rows, strict=True)):
            inputs[row, : len(text) - 1] = text[:-1]
            if continuation:
                targets[row, len(text) - 1 - len(continuation) : len(text) - 1] = continuation
        return inputs, targets

    @staticmethod
    def _longest_first(lengths: Sequence[int]) -> list[int]:
        """Numbers of requests: rows of like length go together, and what does not fit into memory fails at once."""
        return sorted(range(len(lengths)), key=lambda number: -lengths[number])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of every token of each text, in windows as long as the context; an empty text has 0."""
        texts = [instance.args[0] for instance in requests]
        owners: list[int] = []
        encoded: list[Encoded] = []
        for number, text in enumerate(texts):
            for window in get_rolling_token_windows(
                token_list=self._encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                owners.append(number)
                encoded.append((None, *make_disjoint_window(window)))
        answers = [0.0] * len(texts)
        for number, (log_probability, _) in zip(owners, self._loglikelihood_tokens(encoded), strict=True):
            answers[number] += log_probability
        for text, answer in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return answers

    # --- writing ---

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop text, its own end, or the most tokens.

        A context that leaves too little room for them loses its beginning; where the most tokens alone would fill the
        model's context, they are half of it.
        """
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, instance in enumerate(requests):
            groups.setdefault(repr(instance.args[1]), []).append(number)
        self._progress.stage(f"{len(requests):,} texts to write", len(requests))
        for numbers in groups.values():
            sampling = self._sampling(requests[numbers[0]].args[1])
            room = self.max_length - sampling.max_tokens
            prompts = [
                (self.tok_encode(requests[number].args[0]) or [self.prefix_token_id])[-room:]
                for number in numbers
            ]
            for place, text in self._written(prompts, sampling):
                answers[numbers[place]] = text
                self.cache_hook.add_partial("generate_until", requests[numbers[place]].args, text)
                self._progress.advance(1)
        return answers

    def _written(self, prompts: Sequence[list[int]], sampling: Sampling) -> Iterator[tuple[int, str]]:
        """Numbers of prompts and what follows them, as they get done: the next prompt takes a free row."""
        engine = Engine(self.model)
        waiting = iter(self._longest_first([len(prompt) for prompt in prompts]))
        texts = [""] * len(prompts)
        rows: dict[int, tuple[Row, TextWriter]] = {}
        while True:
            for number in itertools.islice(waiting, self.batch_size - len(rows)):
                writer = TextWriter(self.tokenizer, sampling, self.loaded.borders.ends)
                rows[number] = engine.join(prompts[number], sampling), writer
            if not rows:
                return
            tokens = {id(written.row): written.token for written in engine.step()}
            for number, (row, writer) in list(rows.items()):
                texts[number] += writer.push(tokens[id(row)])
                if writer.finish_reason is not None:
                    engine.leave(row)
                    del rows[number]
                    yield number, texts[number]

    def _sampling(self, asked: dict[str, Any]) -> Sampling:
        kwargs = normalize_gen_kwargs(asked, DEFAULT_MAX_TOKENS)
        until = kwargs.get("until") or []
        most = int(kwargs["max_gen_toks"])
        if most >= self.max_length:
            _logger.warning(
                "a task asks for %s tokens of a model that sees %s; it gets half of that",
                most,
                self.max_length,
            )
            most = max(1, self.max_length // 2)
        top_k = kwargs.get("top_k")
        return Sampling(
            temperature=float(kwargs["temperature"]) if kwargs["do_sample"] else 0.0,
            top_k=int(top_k) if top_k else None,
            top_p=kwargs.get("top_p"),
            max_tokens=most,
            seed=0,
            stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        )
