"""The loop against one written out, and what it does when numbers go bad."""

import math
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from colossus.errors import TrainingDiverged
from colossus.events import StepDone, StepSkipped
from colossus.models import build
from colossus.spec.duration import Duration
from colossus.spec.run import AdamW, Cosine
from colossus.trainer.state import TrainState
from tests.helpers import tiny
from tests.trainer.runs import (
    SEQUENCES,
    TOKENS,
    Reader,
    bits,
    poisoned,
    random_batch,
    same_bits,
    small_run,
    steps,
)

NAN, INF = math.nan, math.inf


def test_a_run_is_the_loop_that_one_would_write() -> None:
    adamw = AdamW(learning_rate=0.02, weight_decay=0.1)
    schedule = Cosine(warmup_steps=2, final_scale=0.1)
    config = small_run(
        model=tiny(), optimizer=adamw, schedule=schedule, gradient_clip=0.5, budget=Duration.parse("6 steps")
    )
    reports = list(steps(config, TrainState.new(config)))

    model = build(config.model, seed=config.seed)
    decayed = [parameter for name, parameter in model.named_parameters() if _decays(name)]
    others = [parameter for name, parameter in model.named_parameters() if not _decays(name)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(6):
        rate = 0.02 * min(1, (step + 1) / 2) * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 6)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = random_batch(step)
        logits = model.logits(model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.documents)))
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        report = reports[step]
        assert isinstance(report, StepDone)
        assert report.loss == pytest.approx(loss.item(), rel=1e-4)
        assert report.gradient_norm == pytest.approx(norm.item(), rel=1e-3)
        assert report.learning_rate == pytest.approx(rate)
        assert (report.step, report.tokens) == (step, (step + 1) * SEQUENCES * TOKENS)


def _decays(name: str) -> bool:
    return "attention." in name or "mlp." in name or name == "head.weight"


def test_it_learns() -> None:
    config = small_run(budget=Duration.parse("60 steps"))

    class Same(Reader):
        def read(self, step: int) -> object:
            return random_batch(0)

    losses = [report.loss for report in steps(config, TrainState.new(config), Same())]
    assert losses[0] > math.log(config.model.vocab_size) - 0.5
    assert losses[-1] < 0.5


def test_equal_configurations_give_equal_bits() -> None:
    config = small_run()
    one, other = TrainState.new(config), TrainState.new(config)
    first, second = list(steps(config, one)), list(steps(config, other))
    assert [report.loss for report in first] == [report.loss for report in second]
    assert same_bits(bits(one), bits(other))


def test_a_state_taken_over_goes_on_bit_by_bit() -> None:
    config = small_run()
    whole, first_half, second_half = (TrainState.new(config) for _ in range(3))
    losses = [report.loss for report in steps(config, whole)]
    assert [report.loss for report in islice(steps(config, first_half), 4)] == losses[:4]
    second_half.load(bits(first_half), first_half.facts())
    assert [report.loss for report in steps(config, second_half)] == losses[4:]
    assert same_bits(bits(whole), bits(second_half))


@pytest.mark.parametrize(
    ("budget", "num_steps"), [("3 steps", 3), ("1 tokens", 1), ("120 tokens", 2), ("121 tokens", 3)]
)
def test_a_budget_ends_with_the_step_that_reaches_it(budget: str, num_steps: int) -> None:
    config = small_run(budget=Duration.parse(budget))
    assert len(list(steps(config, TrainState.new(config)))) == num_steps


@pytest.mark.parametrize("budget", ["0.3 seconds", "0.2 cpu_seconds"])
def test_a_budget_of_time_ends_too(budget: str) -> None:
    config = small_run(budget=Duration.parse(budget))
    state = TrainState.new(config)
    reports = list(steps(config, state))
    assert reports
    assert config.budget.done(state.progress) >= 1
    times = [report.seconds for report in reports]
    assert times == sorted(times)


def test_no_clipping_where_none_is_asked_for() -> None:
    unclipped, loose = (small_run(gradient_clip=clip) for clip in (None, 1e9))
    states = TrainState.new(unclipped), TrainState.new(loose)
    for config, state in zip((unclipped, loose), states, strict=True):
        list(steps(config, state))
    assert same_bits(bits(states[0]), bits(states[1]))


# --- numbers that are none ---

DENSE, SPARSE = "layers.0.mlp.up.weight", "ngram_embedding.weight"
every_poison = pytest.mark.parametrize(
    ("where", "value"),
    [("loss", NAN), ("loss", INF), (DENSE, NAN), (DENSE, -INF), (SPARSE, NAN), (SPARSE, INF)],
)


@every_poison
def test_a_bad_step_is_not_applied_and_names_its_batch(where: str, value: float) -> None:
    config = small_run(budget=Duration.parse("5 steps"))
    state, reader = TrainState.new(config), Reader()
    with poisoned(state, reader, where, value, at={2}):
        running = steps(config, state, reader)
        assert all(isinstance(next(running), StepDone) for _ in range(2))
        before = bits(state)
        skipped = next(running)
        assert same_bits(bits(state), before)
        assert isinstance(skipped, StepSkipped)
        assert (skipped.step, skipped.in_a_row) == (2, 1)
        assert (skipped.first_sample, skipped.num_samples) == (2 * SEQUENCES, SEQUENCES)
        assert (skipped.loss is None) == (where == "loss")
        assert skipped.gradient_norm is None
        after = next(running)
        assert isinstance(after, StepDone)
        assert not same_bits(bits(state), before)
        assert (after.step, after.tokens) == (3, 4 * SEQUENCES * TOKENS)
    assert all(torch.isfinite(tensor).all() for tensor in bits(state).values())


@every_poison
def test_too_many_bad_steps_in_a_row_end_the_run(where: str, value: float) -> None:
    config = small_run(max_skipped_steps=3)
    state, reader = TrainState.new(config), Reader()
    reports = []
    with poisoned(state, reader, where, value, at=set(range(1, 8))):
        running = steps(config, state, reader)
        reports.append(next(running))
        before = bits(state)
        reports += [next(running) for _ in range(3)]
        with pytest.raises(TrainingDiverged, match="3 steps in a row, up to step 3"):
            next(running)
    assert [type(report) for report in reports] == [StepDone, *[StepSkipped] * 3]
    assert [report.in_a_row for report in reports[1:]] == [1, 2, 3]
    assert same_bits(bits(state), before)


def test_a_good_step_between_bad_ones_starts_the_count_anew() -> None:
    config = small_run(max_skipped_steps=3)
    state, reader = TrainState.new(config), Reader()
    with poisoned(state, reader, "loss", NAN, at={0, 1, 3, 4, 6}):
        reports = list(steps(config, state, reader))
    assert [getattr(report, "in_a_row", 0) for report in reports] == [1, 2, 0, 1, 2, 0, 1, 0]


def test_the_count_goes_on_after_a_restart() -> None:
    config = small_run(max_skipped_steps=3)
    state, reader = TrainState.new(config), Reader()
    with poisoned(state, reader, "loss", NAN, at=set(range(8))):
        list(islice(steps(config, state, reader), 2))
    resumed = TrainState.new(config)
    resumed.load(bits(state), state.facts())
    with poisoned(resumed, reader, "loss", NAN, at=set(range(8))), pytest.raises(TrainingDiverged):
        list(steps(config, resumed, reader))
    assert resumed.progress.steps == 3


def test_a_poisoned_weight_never_spreads() -> None:
    config = small_run(max_skipped_steps=2)
    state = TrainState.new(config)
    with torch.no_grad():
        state.model.layers[0].mlp.up.weight[0, 0] = NAN
    before = bits(state)
    with pytest.raises(TrainingDiverged):
        list(steps(config, state))
    for name, tensor in bits(state).items():
        assert np.array_equal(tensor.numpy(), before[name].numpy(), equal_nan=True), name
