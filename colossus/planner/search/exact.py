"""Memory of the few candidates that may be picked, counted for our own trainer to what its ranks hold."""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from colossus.planner.estimate.execution import EXCHANGES, RECOMPUTE, SHARDING
from colossus.planner.estimate.layers import fastest_exchange
from colossus.planner.estimate.memory import memory_constants
from colossus.planner.estimate.rank_memory import How, enough_micro_batches, rank_memory
from colossus.planner.estimate.step import stage_layers
from colossus.planner.one_rank.plan import loss_chunk_tokens
from colossus.planner.schedule.order import SCHEDULES
from colossus.planner.search.best import Evaluated, Search
from colossus.planner.search.bounds import Problem, execution, limit_bytes
from colossus.planner.search.space import PRECISIONS, Layouts
from colossus.spec.job import Job, Share
from colossus.spec.layout import Coordinates, Layout
from colossus.spec.model import BYTES_PER_ELEMENT, Dtype, ModelSpec, MoeSpec
from colossus.spec.plan import ContextExchange
from colossus.spec.run import OPTIMIZERS, OptimizerKind


def fits(model: ModelSpec, search: Search, evaluated: Evaluated) -> Callable[[int], bool]:
    """Whether a row's ranks fit their chips, in every pool that it uses.

    What the search took for a row's memory, times the least that counting has come to of that for rows like it, spares
    counting most of those that do not.
    """
    problem, room = search.problem, search.headroom_bytes(evaluated.candidates)
    least: dict[object, float] = {}

    def row_fits(row: int) -> bool:
        place = int(evaluated.candidates.layout[row])
        layout = problem.layouts.take(np.array([place]))
        for number, pool in enumerate(problem.pools):
            if evaluated.groups[row, number] == 0:
                continue
            limit = limit_bytes(pool)
            taken_for = limit - float(room[row, number])
            recompute = problem.options.recompute[evaluated.candidates.option[row, number]]
            alike = (float(recompute), float(layout.schedule[0]), float(layout.tp[0]), float(layout.cp[0]))
            if taken_for * least.get(alike, 0.0) > limit:
                return False
            held = sum(pool_memory(model, problem, evaluated, row, number).values())
            least[alike] = min(least.get(alike, math.inf), held / taken_for)
            if held > limit:
                return False
        return True

    return row_fits


def pool_memory(
    model: ModelSpec, problem: Problem, evaluated: Evaluated, row: int, pool: int
) -> dict[str, int]:
    """Bytes on the fullest rank of the row's groups of one pool, by what holds them."""
    layout = problem.layouts.take(evaluated.candidates.layout[[row]])
    option = int(evaluated.candidates.option[row, pool])
    schedule, pp = SCHEDULES[int(layout.schedule[0])], int(layout.pp[0])
    count = int(evaluated.micro_batches[row, pool])
    count = enough_micro_batches(schedule, pp, count)
    axes = {name: int(getattr(layout, name)[0]) for name in ("pp", "shard", "cp", "tp", "ep")}
    replica = min(2, int(evaluated.groups[row].sum()))
    share = Share(
        num_groups=replica,
        micro_batch_sequences=int(problem.options.micro_batch[option]),
        num_micro_batches=count,
        recompute=RECOMPUTE[int(problem.options.recompute[option])],
    )
    return fullest_rank_bytes(
        model,
        Job(
            layout=Layout(replica=replica, **axes),
            expert_tp=int(layout.expert_tp[0]),
            context_exchange=exchange(problem, layout, int(evaluated.candidates.option[row, 0])),
            sharding=SHARDING[int(layout.sharding[0])],
            schedule=schedule,
            virtual_stages=int(layout.chunks[0]),
            stage_layers=layers_of_stages(problem, layout),
            sequence_tokens=problem.sequence,
            precision=PRECISIONS[int(layout.precision[0])],
            optimizer_state=problem.optimizer_state,
            shares=(share,),
        ),
        problem.optimizer,
        on_cpu=problem.pools[pool].chip.generation == "cpu",
    )


def layers_of_stages(problem: Problem, layout: Layouts) -> tuple[int, ...]:
    """Layers of each pipeline rank."""
    most, first, last = (int(a[0]) for a in stage_layers(problem.shape.layers, layout.pp, layout.chunks))
    stages = int(layout.pp[0])
    return (last,) if stages == 1 else (first, *[most] * (stages - 2), last)


def exchange(problem: Problem, layout: Layouts, option: int) -> ContextExchange | None:
    """The fastest for the first pool's groups; others hardly differ."""
    if layout.cp[0] == 1:
        return None
    one, choice = np.ones(1), problem.options
    x = execution(problem, layout, one * choice.micro_batch[option], one * choice.recompute[option], one, one)
    hardware, constants = problem.hardware(problem.pools[0], layout.precision)
    return EXCHANGES[int(fastest_exchange(problem.shape, x, hardware, constants)[0])]


@lru_cache(maxsize=65_536)
def fullest_rank_bytes(
    model: ModelSpec, job: Job, optimizer: OptimizerKind = "adamw", *, on_cpu: bool = False
) -> dict[str, int]:
    """By what holds it, on the fullest rank of a replica group of `job`'s first share, with what the device's context
    and communicators take; on a CPU, what a process takes before it has a model."""
    dtype: Dtype = "float32" if job.precision in ("float32", "tf32") else "bfloat16"
    layout = job.layout
    tokens = job.shares[0].micro_batch_sequences * job.sequence_tokens // layout.cp
    how = How(
        dtype=dtype,
        chunk_tokens=loss_chunk_tokens(model, tokens, "cpu" if on_cpu else "cuda", tp=layout.tp),
        optimizer=OPTIMIZERS[optimizer],
        state_bytes=BYTES_PER_ELEMENT[job.optimizer_state],
        router_losses=True,
        on_cpu=on_cpu,
    )
    held = max(
        (
            rank_memory(model, job, layout.rank(Coordinates(0, place, 0, layout.cp - 1, 0)), how)
            for place in _places(model, job)
        ),
        key=lambda parts: sum(parts.values()),
    )
    constants = memory_constants()
    counted = {str(kind): size for kind, size in held.items()}
    if on_cpu:
        return {**counted, "context": int(constants["cpu_process_bytes"])}
    return {
        **counted,
        "communication": int(constants["communicator_bytes"] * _num_communicators(job)),
        "context": int(constants["context_bytes"]),
    }


def _places(model: ModelSpec, job: Job) -> Iterator[int]:
    """On the axis `pp`: of places that hold the same kinds of layers the first, which has most in flight, and the last,
    on which most weight gradients may wait."""
    kinds: dict[object, list[int]] = {}
    for place in range(job.layout.pp):
        stages = [stage for stage in job.stages if stage.rank == place]
        mixtures = [
            sum(isinstance(model.mlp_of(layer), MoeSpec) for layer in stage.layers) for stage in stages
        ]
        layers = [(stage.is_first, stage.is_last, stage.num_layers) for stage in stages]
        kind = (*mixtures, *layers)
        kinds.setdefault(kind, []).append(place)
    for places in kinds.values():
        yield from sorted({places[0], places[-1]})


def _num_communicators(job: Job) -> int:
    """Of tensor, context, data and expert parallelism one each; a pipeline's two directions."""
    layout = job.layout
    data = layout.replica * layout.shard > 1
    return sum((layout.tp > 1, layout.cp > 1, 2 * (layout.pp > 1), data, layout.ep > 1))
