"""Replica groups of unequal speed, one of them slowed: with shares to match, they finish their steps together."""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

import pytest

from colossus.spec.job import Share
from tests.stories.processes import PLAIN
from tests.stories.rank_runs import Ranks

NUM_STEPS, NUM_SEQUENCES = 20, 12
MODEL = PLAIN.model_copy(
    update={
        "context_tokens": 64,
        "num_layers": 4,
        "hidden_size": 128,
        "mlp": PLAIN.mlp.model_copy(update={"intermediate_size": 512}),
    }
)

CLOCKS = """
import json
from colossus.parallel import pipeline, rank_model

if rank == 1:  # in proportion to what its work takes, however much else this machine has to do
    train = pipeline.Pipeline.train

    def three_times_as_long(*arguments):
        started = time.perf_counter()
        train(*arguments)
        time.sleep(2 * (time.perf_counter() - started))

    pipeline.Pipeline.train = three_times_as_long

accumulate, sum_gradients = rank_model.RankModel.accumulate, rank_model.sum_gradients
started = [0.0]

def starting(*arguments):
    started[0] = time.perf_counter()
    return accumulate(*arguments)

def summing(*arguments, **named):
    busy = time.perf_counter()
    sum_gradients(*arguments, **named)
    with open(f"{sys.argv[1]}/logs/clock-{rank}", "a") as file:
        print(json.dumps([busy - started[0], time.perf_counter() - busy]), file=file)

rank_model.RankModel.accumulate, rank_model.sum_gradients = starting, summing
"""


class Times(NamedTuple):
    """Of a replica group's steps, the median: at work, and waiting for the others in the sum of gradients."""

    busy_s: float
    waiting_s: float

    @property
    def waiting_share(self) -> float:
        return self.waiting_s / (self.busy_s + self.waiting_s)


@pytest.mark.timed
def test_groups_of_unequal_speed(tmp_path: Path) -> None:
    """An equal split leaves the fast group waiting. Shares to the speeds that it shows do not."""
    ranks = Ranks(tmp_path, (f"budget={NUM_STEPS} steps", "evaluation.every=1000 steps"), MODEL)
    half = NUM_SEQUENCES // 2
    fast, slow = trained(ranks, "equal", half, half)
    assert fast.busy_s < 0.75 * slow.busy_s
    assert fast.waiting_share > 0.25

    share = min(
        range(1, NUM_SEQUENCES),
        key=lambda n: max(n * fast.busy_s / half, (NUM_SEQUENCES - n) * slow.busy_s / half),
    )
    assert share > half
    fast_again, slow_again = trained(ranks, "shares", share, NUM_SEQUENCES - share)
    assert fast_again.waiting_s < 0.5 * fast.waiting_s
    assert max(fast_again.busy_s, slow_again.busy_s) < 0.9 * slow.busy_s


def trained(ranks: Ranks, name: str, *sequences: int) -> list[Times]:
    """A run of two groups with so many sequences each in a step; the second one takes three times as long for each."""
    shares = tuple(Share(num_micro_batches=count) for count in sequences)
    plan = ranks.plan(name, replica=2, shares=shares, sequence_tokens=64)
    run = ranks.run(name)
    ranks.colossus(*ranks.new(name, plan), in_ranks=CLOCKS)
    return [_times(run.path / "logs" / f"clock-{rank}") for rank in range(2)]


def _times(path: Path) -> Times:
    lines = [json.loads(line) for line in path.read_text().splitlines()][2:]
    return Times(*(statistics.median(column) for column in zip(*lines, strict=True)))
