"""A plan tried out where its machines are not: the real step of its ranks, on tensors that have shapes and no data.

A rank of the fleet differs from others by its pipeline stage and by its pool. One of each kind is put in a world of the
plan's true size, whose other ranks are not there and answer at once; it builds its part of the model as it would, and
does a step: forward, backward, optimizer. That it composes, what it holds and what it exchanges is seen, not estimated.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from colossus.data import Batch
from colossus.errors import ColossusError, ConfigError
from colossus.models import RouterLosses
from colossus.optim import Optimizers, build_optimizers, scale_gradients
from colossus.parallel.memory import MemoryTracer
from colossus.parallel.mesh import Mesh
from colossus.parallel.optimize import MatrixRounds, gradient_norm, sum_loads
from colossus.parallel.rank_model import Objective, RankModel
from colossus.parallel.record import CollectiveRecorder
from colossus.planner.estimate.collectives import Exchange, collectives
from colossus.planner.one_rank.plan import loss_chunk_tokens
from colossus.planner.schedule.messages import stage_of
from colossus.planner.schedule.order import order
from colossus.spec.job import Job
from colossus.spec.layout import Coordinates
from colossus.spec.model import Dtype, ModelSpec, MoeSpec
from colossus.spec.plan import Plan
from colossus.spec.run import OPTIMIZERS, AdamW, Muon

DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Role:
    """Ranks that do alike: those of a pool that hold the same kinds and numbers of layers."""

    pool: int
    stage: int
    """On the axis `pp`: the first that is such."""
    rank: int
    """Who stands for them."""
    num_ranks: int
    layers: tuple[int, ...]
    """Of each of the rank's (virtual) stages."""
    is_first: bool
    is_last: bool


@dataclass(frozen=True, slots=True)
class RoleProof:
    """What was seen of a role."""

    role: Role
    num_micro_batches: int
    """Of the step that was run."""
    num_params: dict[str, int]
    """What the rank keeps, by what it is: dense weights, experts, embeddings and head."""
    memory_bytes: dict[str, int]
    """At the peak of the step, by what it is."""
    issued: tuple[Exchange, ...]
    priced: tuple[Exchange, ...]
    """Of as many micro-batches."""
    whole_step: tuple[Exchange, ...]
    """Priced, of all of a step's micro-batches."""
    seconds: float

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory_bytes.values())

    @property
    def differences(self) -> dict[Exchange, int]:
        """Exchanges that were issued more (or, below 0, less) often than they were priced."""
        found: Counter[tuple[object, ...]] = Counter()
        for sign, exchanges in ((1, self.issued), (-1, self.priced)):
            for one in exchanges:
                found[one[:3]] += sign * one.times
        return {Exchange(*key, abs(count)): count for key, count in found.items() if count}  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Proof:
    """That a plan's ranks can do a step, and what each kind of them holds and exchanges in it."""

    plan: Plan
    dtype: Dtype
    roles: tuple[RoleProof, ...]
    seconds: float


def prove(plan: Plan, *, num_processes: int = 1) -> Proof:
    """Runs a step of each role of `plan`. Raises ConfigError, with a sentence, where a rank could not."""
    started = time.perf_counter()
    _check(plan)
    found = roles(plan)
    if num_processes == 1 or len(found) == 1:
        proofs = [prove_role(plan, role) for role in found]
    else:
        with ProcessPoolExecutor(min(num_processes, len(found)), mp_context=get_context("spawn")) as pool:
            proofs = list(pool.map(prove_role, [plan] * len(found), found))
    return Proof(plan, dtype_of(plan), tuple(proofs), time.perf_counter() - started)


def dtype_of(plan: Plan) -> Dtype:
    """What matmuls run in here: narrower ones than bfloat16 are taken for it."""
    return "float32" if plan.precision in ("float32", "tf32") else "bfloat16"


def _check(plan: Plan) -> None:
    if any(parameter.role == "sparse_embedding" for parameter in plan.model.input_parameters()):
        raise ConfigError(
            f"{plan.model.name} has tables of which a step touches few rows: which, tokens tell, and a dry run "
            f"has none. A model without ngrams and recall can be proven"
        )


# --- roles ---


def roles(plan: Plan) -> tuple[Role, ...]:
    """All that there are, pool by pool and stage by stage; pools whose ranks would run the same step are one."""
    job, layout = Job.of(plan), plan.layout
    found: list[Role] = []
    seen: set[object] = set()
    first_group = 0
    for pool, share in enumerate(job.shares):
        by_kind: dict[object, list[int]] = {}
        for place in range(layout.pp):
            by_kind.setdefault(_kind(job, plan.model, place), []).append(place)
        for kind, places in by_kind.items():
            stages = [stage for stage in job.stages if stage.rank == places[0]]
            traced = enough_micro_batches(job, places[0], share.num_micro_batches)
            key = (kind, share.micro_batch_sequences, traced, share.recompute)
            if key in seen:
                continue
            seen.add(key)
            found.append(
                Role(
                    pool=pool,
                    stage=places[0],
                    rank=layout.rank(Coordinates(first_group, places[0], 0, 0, 0)),
                    num_ranks=share.num_groups * len(places) * layout.stage_ranks,
                    layers=tuple(stage.num_layers for stage in stages),
                    is_first=any(stage.is_first for stage in stages),
                    is_last=any(stage.is_last for stage in stages),
                )
            )
        first_group += share.num_groups
    return tuple(found)


def _kind(job: Job, model: ModelSpec, place: int) -> object:
    """What makes stages differ: layers of each kind, and what stands at the ends."""
    return tuple(
        (
            stage.is_first,
            stage.is_last,
            sum(1 for layer in stage.layers if isinstance(model.mlp_of(layer), MoeSpec)),
            stage.num_layers,
        )
        for stage in job.stages
        if stage.rank == place
    )


def enough_micro_batches(job: Job, place: int, there: int) -> int:
    """The fewest with which the rank at `place` of a pipeline holds as many at once as it does of all `there`, so that
    memory is seen at its peak; what follows repeats. At least two: the second adds to the first one's gradients."""
    most = _most_held(job, place, there)
    for count in range(min(2, there), there):
        with suppress(ConfigError):  # schedules that want more, or other numbers of them
            if _most_held(job, place, count) == most:
                return count
    return there


def _most_held(job: Job, place: int, num_micro_batches: int) -> tuple[int, int]:
    """Micro-batches times layers that a rank has seen forward and not yet backward, at most; and the same counted until
    their weights' gradients are made, where these are put off."""
    layers = {stage.number: stage.num_layers for stage in job.stages}
    schedule, pp = job.schedule, job.layout.pp
    weigh = {chunk: 1 + layers[stage_of(schedule, pp, place, chunk)] for chunk in range(job.virtual_stages)}
    held = waiting = most_held = most_waiting = 0
    for op in order(schedule, pp, job.virtual_stages, num_micro_batches)[place]:
        if op.kind in ("forward", "forward_backward"):
            held += weigh[op.chunk]
            most_held, most_waiting = max(most_held, held), max(most_waiting, held + waiting)
        match op.kind:
            case "forward_backward":
                held -= weigh[1 - op.chunk]
            case "backward":
                held -= weigh[op.chunk]
            case "backward_input":
                held, waiting = held - weigh[op.chunk], waiting + weigh[op.chunk]
            case "backward_weight":
                waiting -= weigh[op.chunk]
    return most_held, most_waiting


# --- one role ---


def prove_role(plan: Plan, role: Role) -> RoleProof:
    """Puts the role's rank in a world of the plan's size and runs a step of it."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    job, model = Job.of(plan), plan.model
    share = job.shares[role.pool]
    traced = enough_micro_batches(job, role.stage, share.num_micro_batches)
    shares = list(job.shares)
    shares[role.pool] = share.model_copy(update={"num_micro_batches": traced})
    # Transformer Engine is for CUDA, and would do the same products.
    float8 = "tensorwise" if job.float8 == "transformer_engine" else job.float8
    here = job.model_copy(update={"shares": tuple(shares), "float8": float8})
    dtype = dtype_of(plan)
    tokens = share.micro_batch_sequences * job.sequence_tokens // job.layout.cp
    chunk_tokens = loss_chunk_tokens(model, tokens, "cuda", tp=job.layout.tp)
    try:
        with fake_world(job.layout.num_ranks, role.rank):
            seen = _run(model, here, dtype, chunk_tokens, OPTIMIZERS[plan.optimizer])
    except ColossusError:
        raise
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"rank {role.rank:,} of the plan, on pipeline stage {role.stage} of {job.layout.pp}, cannot run: {lines[0]}"
        ) from error
    settings = {
        "dtype": dtype, "chunk_tokens": chunk_tokens, "optimizer": plan.optimizer, "router_losses": True,
    }  # fmt: skip
    return RoleProof(
        role=role,
        num_micro_batches=traced,
        num_params=seen.num_params,
        memory_bytes=seen.memory_bytes,
        issued=seen.exchanges,
        priced=collectives(model, here, role.rank, **settings),  # type: ignore[arg-type]
        whole_step=collectives(model, job, role.rank, **settings),  # type: ignore[arg-type]
        seconds=time.perf_counter() - started,
    )


@contextmanager
def fake_world(num_ranks: int, rank: int) -> Iterator[None]:
    """This process as one rank of many, of which the others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class _Seen:
    num_params: dict[str, int]
    memory_bytes: dict[str, int]
    exchanges: tuple[Exchange, ...]


def _run(model: ModelSpec, job: Job, dtype: Dtype, chunk_tokens: int, config: AdamW | Muon) -> _Seen:
    # Meshes and sharding look at numbers, which fake tensors do not have: the model is built before they are.
    mesh = Mesh(job.layout, job.expert_tp)
    rank_model = RankModel(model, job, mesh, dtype=DTYPES[dtype], chunk_tokens=chunk_tokens)
    memory, recorder = MemoryTracer(), CollectiveRecorder(mesh)
    for part in rank_model.parts:
        memory.watch(part.model)
        if not part.stage.is_last:  # what follows is no loss
            part.model.register_forward_hook(lambda *_: setattr(memory, "phase", "activations"))
    with FakeTensorMode(allow_non_fake_inputs=True), memory:
        rank_model.materialise(None)
        optimizers = build_optimizers(
            rank_model.parameters,
            {name: placement.parameter for name, placement in rank_model.placements.items()},
            config,
            loads=rank_model.loads(),
            dtype=DTYPES[dtype],
            state_dtype=DTYPES[job.optimizer_state],
            rounds=MatrixRounds(rank_model.parameters, rank_model.placements, mesh),
        )
        _make_state(rank_model, optimizers)
        memory.own("weights", rank_model.parameters.values())
        memory.own(
            "optimizer",
            (value for one in optimizers for state in one.state.values() for value in state.values()),
        )
        memory.own("weights", (b for part in rank_model.parts for b in part.model.buffers()))
        memory.reset_peak()
        some = torch.zeros(())
        objective = Objective(job.step_tokens, 0.0, RouterLosses(some, some))
        with recorder:
            loss = rank_model.accumulate(_batch(job, mesh.rank), objective)
            memory.phase = "workspace"
            memory.own("gradients", rank_model.gradients().values())
            norm = exchange_after_backward(rank_model, loss)
            scale_gradients(rank_model.parameters.values(), 1 / norm.clamp(min=1.0))
            for optimizer in optimizers:
                optimizer.step()
            rank_model.clear_gradients()
    return _Seen(
        _num_params(rank_model),
        {kind: size for kind, size in memory.peak_parts.items() if size},
        recorder.exchanges(),
    )


def exchange_after_backward(model: RankModel, loss: Tensor) -> Tensor:
    """What ranks tell each other once their gradients are summed: experts' loads, the loss, the gradient's norm, which
    is returned."""
    mesh = model.mesh
    if loads := list(model.loads().values()):
        sum_loads(loads, [t for g in ("tp", "shards", "replica") if (t := mesh.team(g)) is not None])
    total = loss.double()
    for group in ("group", "replica"):
        if (team := mesh.team(group)) is not None:
            dist.all_reduce(total, group=team.process_group)
    return gradient_norm(model.gradients(), model.placements, mesh, on_both_ends=model.on_both_ends)


def _make_state(model: RankModel, optimizers: Optimizers) -> None:
    """What optimizers make in their first step: the one that is looked at is a later one."""
    for parameter in model.parameters.values():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    for parameter in model.parameters.values():
        parameter.grad = None


def _batch(job: Job, rank: int) -> Batch:
    count = job.share(rank).rank_sequences
    tokens = np.zeros((count, job.sequence_tokens), np.int64)
    return Batch(tokens, tokens, tokens.astype(np.int32), np.arange(count))


def _num_params(model: RankModel) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, parameter in model.parameters.items():
        spec = model.placements[name].parameter
        kind = "experts" if spec.expert else "tables" if spec.role in ("embedding", "head") else "dense"
        counts[kind] += parameter.numel()
    return dict(counts)


__all__: Sequence[str] = ("Proof", "Role", "RoleProof", "prove", "roles")
