"""A synthetic run, as events: what a real one would emit, in no time."""

import math
from collections.abc import Iterator

from colossus.events import (
    CheckpointFailed,
    CheckpointSaved,
    Decision,
    Evaluated,
    Event,
    RunFinished,
    RunStarted,
    StepDone,
    StepSkipped,
)

START_S = 1_700_000_000.0
STEP_TOKENS = 256


def step_done(step: int, step_s: float = 0.1) -> StepDone:
    return StepDone(
        time_s=START_S + (step + 1) * step_s,
        step=step,
        tokens=(step + 1) * STEP_TOKENS,
        seconds=(step + 1) * step_s,
        cpu_seconds=2 * (step + 1) * step_s,
        step_time_s=step_s,
        loss=3 + 4 * math.exp(-step / 50),
        gradient_norm=1.0,
        learning_rate=0.02,
        tokens_per_s=STEP_TOKENS / step_s,
        mfu=0.3,
        memory_bytes=2**30,
    )


def started(first_step: int = 0, step_s: float = 0.1) -> RunStarted:
    return RunStarted(
        time_s=START_S + first_step * step_s,
        first_step=first_step,
        num_params=1_000_000,
        host="h",
        process_id=7,
    )


def evaluated(step: int, bits: float, step_s: float = 0.1) -> Evaluated:
    return Evaluated(
        time_s=START_S + step * step_s,
        step=step,
        tokens=step * STEP_TOKENS,
        loss=3.0,
        bits_per_byte=bits,
        num_heldout_tokens=16_384,
        seconds=0.5,
    )


def saved(step: int) -> CheckpointSaved:
    return CheckpointSaved(time_s=START_S + step / 10, step=step, path="c", num_bytes=2**20, seconds=0.1)


def whole_run(num_steps: int = 1000) -> Iterator[Event]:
    """Decided, started, trained, faulty here and there, finished."""
    yield Decision(time_s=START_S - 1, what="dtype", choice="bfloat16", reason="it is faster here")
    yield started()
    for step in range(num_steps):
        yield step_done(step)
        if step % 100 == 99:
            yield evaluated(step + 1, 1.5 + 2 * math.exp(-step / 200))
        if step % 250 == 249:
            yield saved(step + 1)
        if step == 300:
            yield StepSkipped(
                time_s=START_S + 30.1,
                step=301,
                loss=None,
                gradient_norm=1.0,
                first_sample=1204,
                num_samples=4,
                in_a_row=1,
            )
        if step == 500:
            yield CheckpointFailed(time_s=START_S + 50.1, step=501, reason="the disk is full")
    yield RunFinished(time_s=START_S + num_steps / 10, step=num_steps, reason="budget")
