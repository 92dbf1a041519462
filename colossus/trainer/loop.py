"""Training is a generator of step reports. Start here.

    for report in train(config, state, reader):
        ...      # logging, evaluation, checkpoints and tests are ordinary consumers

The loop decides nothing about layout, precision or batch split: the plan has. Its only clock is the budget's.
"""

import math
import time
from collections.abc import Iterator

import psutil
import torch

from colossus.data import BatchReader
from colossus.errors import TrainingDiverged
from colossus.events import StepDone, StepSkipped
from colossus.optim import multiplier, set_learning_rates
from colossus.spec.duration import Progress
from colossus.spec.run import RunConfig
from colossus.trainer.execute import Executor
from colossus.trainer.state import AnyState


def train(config: RunConfig, state: AnyState, reader: BatchReader) -> Iterator[StepDone | StepSkipped]:
    """Steps from where `state` is to the end of the budget, a report after each. `state` is whole in between.

    Of many ranks each runs this loop, and they go through it alike.

    Raises TrainingDiverged after `config.max_skipped_steps` steps in a row with no finite loss or gradient.
    """
    executor: Executor = state.executor(config, reader)
    plan = executor.plan
    process = psutil.Process()
    clock = _Clock(state.progress)
    done = _done(config, state.progress)
    while done < 1:
        clock.step_begins()
        started = time.perf_counter()
        step = state.progress.steps
        scale = multiplier(config.schedule, step=step, done=done)
        set_learning_rates(executor.optimizers, scale)
        sums = executor.accumulate(step)
        norm = executor.gradient_norm()
        loss_value, norm_value = sums.loss.item() / sums.num_tokens, norm.item()
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite:
            if config.gradient_clip is not None and norm_value > config.gradient_clip:
                executor.scale_gradients(config.gradient_clip / norm)
            for optimizer in executor.optimizers:
                optimizer.step()
            state.skipped_in_a_row = 0
        else:
            state.skipped_in_a_row += 1
        executor.clear_gradients()
        busiest_expert = executor.take_expert_loads()
        state.progress = state.agree(clock.step_ends(step + 1, state.progress.tokens + sums.num_tokens))
        step_time_s = time.perf_counter() - started
        if finite:
            flops = config.model.flops_per_token(plan.sequence_tokens) * sums.num_tokens / executor.num_ranks
            yield StepDone(
                step=step,
                tokens=state.progress.tokens,
                seconds=state.progress.seconds,
                cpu_seconds=state.progress.cpu_seconds,
                step_time_s=step_time_s,
                loss=loss_value,
                gradient_norm=norm_value,
                learning_rate=executor.optimizers[0].param_groups[0]["lr"],
                tokens_per_s=sums.num_tokens / step_time_s,
                mfu=flops / step_time_s / plan.machine.matmul_flops[plan.dtype],
                memory_bytes=_memory_bytes(plan.machine.kind, process),
                busiest_expert=busiest_expert,
            )
        else:
            yield StepSkipped(
                step=step,
                loss=loss_value if math.isfinite(loss_value) else None,
                gradient_norm=norm_value if math.isfinite(norm_value) else None,
                first_sample=int(executor.samples[0]),
                num_samples=len(executor.samples),
                in_a_row=state.skipped_in_a_row,
            )
            if state.skipped_in_a_row >= config.max_skipped_steps:
                raise TrainingDiverged(
                    f"the loss or its gradient was not finite in {state.skipped_in_a_row} steps in a row, "
                    f"up to step {step}; none of them was applied. Their batches are in events.jsonl. A "
                    f"lower learning rate or a smaller gradient_clip may help; so may looking at that text"
                )
        done = _done(config, state.progress)


def _done(config: RunConfig, progress: Progress) -> float:
    """The used part of the budget. Exact in steps where those fix the end: all machines decay alike."""
    total = config.total_steps()
    return config.budget.done(progress) if total is None else progress.steps / total


class _Clock:
    """Wall time runs on between steps; CPU time counts in the steps alone: evaluating costs none of it."""

    def __init__(self, start: Progress) -> None:
        self._wall_s = start.seconds - time.perf_counter()
        self._cpu_s = start.cpu_seconds

    def step_begins(self) -> None:
        self._step_cpu_s = time.process_time()

    def step_ends(self, steps: int, tokens: int) -> Progress:
        self._cpu_s += time.process_time() - self._step_cpu_s
        return Progress(steps, tokens, self._wall_s + time.perf_counter(), self._cpu_s)


def _memory_bytes(kind: str, process: psutil.Process) -> int:
    return torch.cuda.max_memory_allocated() if kind == "cuda" else int(process.memory_info().rss)
