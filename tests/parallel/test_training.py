"""Twenty steps under any layout: the losses, gradient norms and weights of one process, and equal copies throughout."""

import functools
import hashlib
import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from colossus.data import Batch
from colossus.events import StepDone
from colossus.parallel.mesh import Mesh
from colossus.spec.data import DataConfig, LoadedTokenizer
from colossus.spec.duration import Duration
from colossus.spec.job import Job, Share
from colossus.spec.model import Dtype, ModelSpec, MoeSpec, RouterSpec
from colossus.spec.rank import RankPlan
from colossus.spec.run import AdamW, Muon, RunConfig, WarmupStableDecay
from colossus.spec.run import Batch as BatchSize
from colossus.spec.sharding import Box
from colossus.trainer.loop import train
from colossus.trainer.ranks import RankState
from colossus.trainer.state import TrainState
from tests.parallel.layouts import dense, job, mixture
from tests.parallel.ranks import run_ranks
from tests.spec.configs import plan_for

NUM_STEPS = 20
OPTIMIZERS: dict[str, AdamW | Muon] = {
    "adamw": AdamW(learning_rate=0.003),
    "muon": Muon(learning_rate=0.01, weight_decay=0.05, rest=AdamW(learning_rate=0.003)),
}
DENSE = dense()
MIXTURE = mixture(
    mlp=MoeSpec(
        num_experts=8,
        top_k=2,
        intermediate_size=24,
        router=RouterSpec(scoring="sigmoid", balancing_bias=True),
    )
)


class Reader:
    """Samples that can be learnt: arithmetic progressions modulo the vocabulary, two documents in each."""

    def __init__(self, model: ModelSpec, sequence_tokens: int, global_batch_sequences: int) -> None:
        self._model, self._tokens, self._sequences = model, sequence_tokens, global_batch_sequences

    def read(self, step: int) -> Batch:
        return self.read_samples(step * self._sequences, self._sequences)

    def read_samples(self, first: int, count: int) -> Batch:
        samples = np.arange(first, first + count)
        rows = np.stack([self._row(int(sample)) for sample in samples])
        documents = np.zeros((count, self._tokens), np.int32)
        documents[:, self._tokens // 3 :] = 1
        return Batch(rows[:, :-1], rows[:, 1:], documents, samples)

    def _row(self, sample: int) -> np.ndarray:
        random = np.random.default_rng(sample)
        start, stride = random.integers(self._model.vocab_size), random.integers(1, 4)
        return (start + stride * np.arange(self._tokens + 1)) % self._model.vocab_size


@dataclass
class Course:
    """What became of a model. `digests`: of each parameter here, after each step."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, tuple[Box, torch.Tensor]]
    digests: list[dict[str, str]]


def config_of(
    model: ModelSpec, job: Job, optimizer: str, *, dtype: Dtype = "float32", clip: float | None = 1.0
) -> RunConfig:
    batch = BatchSize(sequences=job.global_batch_sequences, sequence_tokens=job.sequence_tokens)
    plan = plan_for(batch).model_copy(
        update={"dtype": dtype, "micro_batch_sequences": 1, "loss_chunk_tokens": 32}
    )
    config = RunConfig(
        name="course",
        model=model,
        data=DataConfig(tokenizer=LoadedTokenizer(path="nowhere")),
        batch=batch,
        budget=Duration(amount=NUM_STEPS, unit="steps"),
        optimizer=OPTIMIZERS[optimizer],
        schedule=WarmupStableDecay(warmup_steps=3),
        gradient_clip=clip,
        z_loss=1e-4,
    )
    return config.model_copy(update={"plan": plan})


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def reader_of(config: RunConfig) -> Any:
    return Reader(config.model, config.batch.sequence_tokens, config.batch.sequences)


def alone(config: RunConfig) -> Course:
    state = TrainState.new(config)
    reports = list(train(config, state, reader_of(config)))
    weights = {
        name: (Box((0,) * p.ndim, tuple(p.shape)), p.detach().clone())
        for name, p in state.model.named_parameters()
    }
    return Course(*_told(reports), weights, [])


def one_rank(config: RunConfig, job: Job, compiled: bool = False) -> Course:
    """This rank's part of the course."""
    assert config.plan is not None
    share = job.share(dist.get_rank())
    plan: RankPlan = config.plan.model_copy(
        update={
            "layout": job.layout,
            "compile": compiled,
            "micro_batch_sequences": share.micro_batch_sequences,
            "num_micro_batches": share.num_micro_batches,
        }
    )
    mesh = Mesh(job.layout, job.expert_tp)
    state = RankState(config, job, plan, mesh)
    reports, digests = [], []
    for report in train(config, state, reader_of(config)):
        reports.append(report)
        digests.append({name: digest(p) for name, p in state.model.parameters.items()})
    weights = {
        name: (state.model.table.box(name, mesh.rank), p.detach().clone())
        for name, p in state.model.parameters.items()
    }
    return Course(*_told(reports), weights, digests)


def _told(reports: list[Any]) -> tuple[list[float], list[float]]:
    assert all(isinstance(report, StepDone) for report in reports)
    assert len(reports) == NUM_STEPS
    return [report.loss for report in reports], [report.gradient_norm for report in reports]


def train_ranks(config: RunConfig, job: Job, compiled: bool = False) -> list[Course]:
    """The courses of all ranks, which agree with each other to the last bit."""
    courses = run_ranks(one_rank, job.layout.num_ranks, config, job, compiled)
    for course in courses[1:]:
        assert (course.losses, course.norms) == (courses[0].losses, courses[0].norms)
    for step in range(NUM_STEPS):
        copies: dict[tuple[str, Box], set[str]] = defaultdict(set)
        for course in courses:
            for name, digested in course.digests[step].items():
                copies[name, course.weights[name][0]].add(digested)
        different = [what for what, digests in copies.items() if len(digests) > 1]
        assert not different, f"after step {step} ranks have different copies of {different}"
    return courses


@functools.cache
def _reference(config: str, plan: str) -> Course:
    made = RunConfig.model_validate_json(config)
    return alone(made.model_copy(update={"plan": RankPlan.model_validate_json(plan)}))


def reference(config: RunConfig) -> Course:
    """One process's."""
    assert config.plan is not None
    plan = config.plan.model_dump_json()
    return _reference(config.model_copy(update={"plan": None}).model_dump_json(), plan)


def check(model: ModelSpec, job: Job, optimizer: str, *, tolerance: float, compiled: bool = False) -> None:
    """Losses and norms to `tolerance`, weights to ten times that of a parameter's largest element."""
    config = config_of(model, job, optimizer)
    wanted, courses = reference(config), train_ranks(config, job, compiled)
    assert wanted.losses[-1] < wanted.losses[0] - 0.3  # it learns
    assert courses[0].losses == pytest.approx(wanted.losses, rel=tolerance)
    assert courses[0].norms == pytest.approx(wanted.norms, rel=10 * tolerance)
    covered: dict[str, torch.Tensor] = {
        name: torch.zeros_like(weight, dtype=torch.bool) for name, (_, weight) in wanted.weights.items()
    }
    for rank, course in enumerate(courses):
        for name, ((offsets, shape), weight) in course.weights.items():
            here = tuple(slice(o, o + s) for o, s in zip(offsets, shape, strict=True))
            whole = wanted.weights[name][1]
            if weight.numel():
                off = ((weight - whole[here]).abs().max() / whole.abs().max().clamp_min(1e-6)).item()
                assert off < 10 * tolerance, f"rank {rank}, {name}: off by {off:.2e} of the largest"
            covered[name][here] = True
    assert all(one.all() for one in covered.values())


UNEQUAL = (
    Share(micro_batch_sequences=1, num_micro_batches=3),
    Share(micro_batch_sequences=2, num_micro_batches=2, recompute="full"),
)
Case = tuple[ModelSpec, dict[str, Any]]
TWO: dict[str, Case] = {
    "weights": (DENSE, {"shard": 2, "sharding": "weights"}),
    "optimizer": (DENSE, {"shard": 2, "sharding": "optimizer"}),
    "tp": (DENSE, {"tp": 2}),
    "zb-h1": (DENSE, {"pp": 2, "schedule": "zb-h1"}),
    "ring": (DENSE, {"cp": 2, "context_exchange": "ring"}),
    "unequal groups": (DENSE, {"replica": 2, "shares": UNEQUAL}),
    "mixture, ep": (MIXTURE, {"shard": 2, "ep": 2}),
    "mixture, weights": (MIXTURE, {"shard": 2, "sharding": "weights"}),
    "mixture, tp, ep": (MIXTURE, {"tp": 2, "ep": 2}),
    "mixture, pp": (MIXTURE, {"pp": 2, "schedule": "zb-h1"}),
    "mixture, ring": (MIXTURE, {"cp": 2, "context_exchange": "ring"}),
    "mixture, unequal groups": (MIXTURE, {"replica": 2, "shares": UNEQUAL}),
}
FOUR: dict[str, Case] = {
    "unequal groups of sharded weights": (
        DENSE,
        {"replica": 2, "shard": 2, "sharding": "weights", "shares": UNEQUAL},
    ),
    "pp + tp": (dense(tied_embeddings=True), {"pp": 2, "tp": 2}),
    "mixture, fsdp + tp + ep": (MIXTURE, {"shard": 2, "tp": 2, "ep": 4, "sharding": "weights"}),
    "mixture, replica + pp": (MIXTURE, {"replica": 2, "pp": 2, "schedule": "interleaved", "virtual_stages": 2}),
}  # fmt: skip


QUICK = {
    ("weights", "muon"),
    ("tp", "adamw"),
    ("zb-h1", "muon"),
    ("ring", "adamw"),
    ("unequal groups", "muon"),
    ("mixture, ep", "adamw"),
    ("mixture, unequal groups", "muon"),
}


def cases(chosen: dict[str, Case]) -> list[Any]:
    """Every layout with both optimizers; few of them in a short run of the tests."""
    return [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(chosen, OPTIMIZERS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "optimizer"), cases(TWO))
def test_on_two_ranks(name: str, optimizer: str) -> None:
    model, settings = TWO[name]
    check(model, job(model, **settings), optimizer, tolerance=1e-5)


@pytest.mark.parametrize(("name", "optimizer"), cases(FOUR))
def test_on_four_ranks(name: str, optimizer: str) -> None:
    model, settings = FOUR[name]
    check(model, job(model, **settings), optimizer, tolerance=1e-5)


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1"])
def test_an_order_of_the_same_work_changes_no_bit(schedule: Any) -> None:
    config = config_of(DENSE, job(DENSE, pp=2), "muon")
    one, other = (train_ranks(config, job(DENSE, pp=2, schedule=which)) for which in ("1f1b", schedule))
    for left, right in zip(one, other, strict=True):
        assert left.losses == right.losses
        assert left.digests == right.digests


@pytest.mark.parametrize("schedule", ["zbv", pytest.param("dualpipev", marks=pytest.mark.slow)])
def test_layers_on_other_ranks_change_no_bit_of_what_they_learn(schedule: Any) -> None:
    """But in the norm of the whole gradient, whose parts are added in another order: so without clipping by it."""
    plain = job(DENSE, pp=2, schedule="interleaved", virtual_stages=2)
    config = config_of(DENSE, plain, "adamw", clip=None)
    whole = job(DENSE, pp=2, schedule=schedule, virtual_stages=2)
    one, other = train_ranks(config, plain), train_ranks(config, whole)
    assert one[0].losses == other[0].losses
    assert one[0].norms == pytest.approx(other[0].norms, rel=1e-6)
    assert _by_name(one) == _by_name(other)


def _by_name(courses: list[Course]) -> list[dict[str, str]]:
    """Of all ranks together, after each step."""
    return [
        {name: digested for course in courses for name, digested in course.digests[step].items()}
        for step in range(NUM_STEPS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"shard": 2, "sharding": "weights"}, {"tp": 2}, {"pp": 2}, {"replica": 2, "shares": UNEQUAL}],
    ids=lambda settings: next(iter(settings)),
)
def test_in_bfloat16_it_is_as_close_as_bfloat16_is(settings: dict[str, Any]) -> None:
    """The losses of many ranks lie nearer to those of one process than eight bits of mantissa would tell apart."""
    made = job(DENSE, **settings)
    config = config_of(DENSE, made, "adamw", dtype="bfloat16")
    wanted, courses = (
        reference(config),
        train_ranks(config, made.model_copy(update={"precision": "bfloat16"})),
    )
    assert courses[0].losses == pytest.approx(wanted.losses, rel=2**-8)
    assert wanted.losses != reference(config_of(DENSE, made, "adamw")).losses


@pytest.mark.slow
def test_compiled_layers() -> None:
    model = dense(num_layers=2)
    check(model, job(model, tp=2), "adamw", tolerance=1e-5, compiled=True)
