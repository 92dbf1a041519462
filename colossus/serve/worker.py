"""The one thread that runs the model. Requests wait in a bounded queue and become rows of one batch."""

import asyncio
import sys
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from colossus.data import Tokenizer
from colossus.generate import Engine, Sampling
from colossus.generate.engine import Row, Written
from colossus.generate.text import FinishReason, TextWriter
from colossus.models import Decoder


class Busy(Exception):
    """The queue is full."""


class Stopping(Exception):
    """The server is ending and takes nothing more."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, and how likely the model took it to be: its natural logarithm, after the model's own distribution."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to an answer. The last has a reason to finish."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None
    choice: Choice | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine broke down while this was being written."""

    reason: str


class Job:
    """One answer to be written; its pieces come through `pieces`, on the event loop of whoever asked."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        ends: frozenset[int],
        num_logprobs: int | None = None,
    ) -> None:
        self.prompt, self.sampling, self.ends, self.num_logprobs = prompt, sampling, ends, num_logprobs
        self.pieces: asyncio.Queue[Piece | Failed] = asyncio.Queue()
        self.cancelled = False
        self._loop = asyncio.get_running_loop()

    def give(self, piece: Piece | Failed) -> None:
        """From the worker's thread."""
        self._loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


class Worker:
    """Runs jobs, at most `max_rows` at once and `max_waiting` in the queue."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, *, max_rows: int, max_waiting: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._active: dict[Row, tuple[Job, TextWriter]] = {}
        self._stopping = False
        self._engine = Engine(model)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def num_active(self) -> int:
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of them or none. Raises Busy where they do not fit the queue, Stopping at the end."""
        with self._changed:
            if self._stopping:
                raise Stopping
            if len(self._waiting) + len(jobs) > self.max_waiting:
                raise Busy
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for them any more: their rows are free at the next step."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def stop(self) -> None:
        """Takes no more jobs, and ends the thread once those at hand are done."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    # --- in the thread ---

    def _run(self) -> None:
        while self._admit():
            try:
                self._step()
            except Exception:
                traceback.print_exc(file=sys.stderr)
                for job, _ in self._active.values():
                    job.give(Failed("the model failed on this request; the server's log says how"))
                self._active = {}
                self._engine = Engine(self._model)  # what the old one holds may be half of a step

    def _admit(self) -> bool:
        """Waits until there is something to do; drops and takes jobs. False at the end."""
        with self._changed:
            while True:
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
                if self._waiting or self._active:
                    break
                if self._stopping:
                    return False
                self._changed.wait()
            taken = [
                self._waiting.popleft()
                for _ in range(min(len(self._waiting), self.max_rows - len(self._active)))
            ]
            gone = [row for row, (job, _) in self._active.items() if job.cancelled]
        for row in gone:
            self._leave(row)
        for job in taken:
            row = self._engine.join(job.prompt, job.sampling)
            self._active[row] = (job, TextWriter(self._tokenizer, job.sampling, job.ends))
        return True

    def _step(self) -> None:
        for written in self._engine.step():
            job, writer = self._active[written.row]
            text = writer.push(written.token)
            job.give(Piece(text, writer.num_tokens, writer.finish_reason, _choice(written, job.num_logprobs)))
            if writer.finish_reason is not None:
                self._leave(written.row)

    def _leave(self, row: Row) -> None:
        self._engine.leave(row)
        del self._active[row]


def _choice(written: Written, num_logprobs: int | None) -> Choice | None:
    if num_logprobs is None:
        return None
    with torch.inference_mode():
        logprobs = written.logits.float().log_softmax(-1)
        likeliest = logprobs.topk(min(num_logprobs, len(logprobs)))
        pairs = tuple(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True))
        return Choice(written.token, float(logprobs[written.token]), pairs)
