"""The learning rate's multiplier over a run."""

import math

from colossus.spec.run import Cosine, WarmupStableDecay


def multiplier(schedule: WarmupStableDecay | Cosine, *, step: int, done: float) -> float:
    """What the peak learning rate is multiplied with at `step`, when `done` (0 to 1) of the budget is used.

    Driven by the used part of the budget, so that it ends with the budget whatever that is counted in. The
    last step of a run of n steps starts at done = (n-1)/n, so its multiplier is just above the final one.
    """
    done = min(max(done, 0.0), 1.0)
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if isinstance(schedule, Cosine):
        decay = (1 + math.cos(math.pi * done)) / 2
    elif schedule.decay_fraction == 0:
        decay = 1.0
    else:
        decay = min(1.0, (1 - done) / schedule.decay_fraction)
    return warmup * (schedule.final_scale + (1 - schedule.final_scale) * decay)
