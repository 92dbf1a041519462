"""Optimizers on boxes of parameters do what they do on one process with the whole ones."""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from colossus.optim import Muon, Optimizers, build_optimizers, scale_gradients
from colossus.parallel.mesh import Mesh
from colossus.parallel.optimize import MatrixRounds, gradient_norm, sum_loads, sum_sparse
from colossus.spec.layout import Layout
from colossus.spec.matrices import Matrix, Split, deal
from colossus.spec.model import (
    AttentionSpec,
    FirstLayers,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NgramSpec,
    RouterSpec,
    SharedMlpSpec,
)
from colossus.spec.parameters import ParameterSpec
from colossus.spec.run import AdamW
from colossus.spec.run import Muon as MuonConfig
from colossus.spec.sharding import Box, Placement, sharding_table
from tests.parallel.ranks import run_ranks

ADAMW = AdamW(learning_rate=0.01, embedding_learning_rate=0.02, weight_decay=0.1)
MUON = MuonConfig(learning_rate=0.02, weight_decay=0.05, rest=ADAMW)
NUM_STEPS, LARGEST_NORM, BALANCING_STEP = 3, 5.0, 0.01

MODEL = ModelSpec(
    name="everything",
    vocab_size=50,
    context_tokens=16,
    num_layers=3,
    hidden_size=20,
    attention=AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=6, bias="all"),
    mlp=MoeSpec(
        num_experts=6,
        top_k=2,
        intermediate_size=12,
        router=RouterSpec(scoring="sigmoid", balancing_bias=True),
        shared=SharedMlpSpec(intermediate_size=9),
    ),
    first_layers=FirstLayers(num_layers=1, mlp=MlpSpec(intermediate_size=28)),
    ngrams=NgramSpec(orders=(2,), num_rows=11),
    tied_embeddings=True,
)


@dataclass(frozen=True)
class Case:
    layout: Layout
    expert_tp: int = 1
    sharded: bool = True
    state_dtype: torch.dtype = torch.float32
    round_elements: int = 2**26


CASES = {  # all of four ranks: starting processes is most of what this costs
    "copies": Case(Layout(shard=4), sharded=False),
    "shard 2": Case(Layout(replica=2, shard=2)),
    "shard 4": Case(Layout(shard=4)),
    "shard 2, cp 2": Case(Layout(shard=2, cp=2)),
    "tp 2": Case(Layout(replica=2, tp=2)),
    "tp 4, 2 key heads": Case(Layout(tp=4)),
    "tp 2, shard 2": Case(Layout(tp=2, shard=2)),
    "tp 2, shard 2, ep 2": Case(Layout(tp=2, shard=2, ep=2)),
    "tp 2, copies": Case(Layout(tp=2, shard=2), sharded=False),
    "ep 2": Case(Layout(replica=2, shard=2, ep=2)),
    "ep 2, shard 4": Case(Layout(shard=4, ep=2)),
    "expert_tp 2": Case(Layout(replica=2, tp=2), expert_tp=2),
    "expert_tp 2, shard 2": Case(Layout(tp=2, shard=2), expert_tp=2),
    "expert_tp 2, ep 2": Case(Layout(tp=2, shard=2, ep=2), expert_tp=2),
    "pp 2, tied": Case(Layout(pp=2, shard=2)),
    "many rounds": Case(Layout(tp=2, shard=2, ep=2), round_elements=900),
}


def random(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(shape, generator=generator)


def whole_numbers(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Sums of these are exact in any order."""
    return (3 * random(name, shape, seed)).round()


def sparse_gradient(spec: ParameterSpec, step: int, contributor: int) -> Tensor:
    """Names some rows twice; each contributor another number of them, and one of them none."""
    count = 2 * contributor
    values = whole_numbers(f"values {contributor}", (count, spec.shape[1]), step)
    rows = whole_numbers(f"rows {contributor}", (count,), step).long().remainder(spec.shape[0])
    return torch.sparse_coo_tensor(rows[None], values, spec.shape, check_invariants=True)


def load(name: str, size: int, step: int, contributor: int) -> Tensor:
    return whole_numbers(f"{name} load {contributor}", (size,), step)


def parameter_specs(model: ModelSpec) -> dict[str, ParameterSpec]:
    return {parameter.name: parameter for parameter in model.parameters()}


def mixtures(specs: dict[str, ParameterSpec]) -> dict[str, ParameterSpec]:
    return {name.removesuffix(".balance"): spec for name, spec in specs.items() if spec.role == "balance"}


def states(optimizers: Optimizers, parameters: dict[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    found = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    return {name: dict(found[p]) for name, p in parameters.items() if p in found}


@dataclass
class Result:
    boxes: dict[str, Box]
    values: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]]
    norms: list[float]
    work: int


def count_work(optimizers: Optimizers) -> list[int]:
    """How many elements Muon orthogonalises, as they come."""
    work: list[int] = []
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):

            def counted(matrices: Tensor, inner: Any = optimizer._orthogonalise) -> Tensor:
                work.append(matrices.numel())
                return inner(matrices)

            optimizer._orthogonalise = counted  # type: ignore[method-assign]
    return work


def alone(config: AdamW | MuonConfig, state_dtype: torch.dtype, num_contributors: int) -> Result:
    """Three steps on one process, in the plain way."""
    specs = parameter_specs(MODEL)
    parameters = {
        name: nn.Parameter(random(name, spec.shape, seed=-1), requires_grad=spec.role != "balance")
        for name, spec in specs.items()
    }
    loads = {name: torch.zeros(spec.shape) for name, spec in mixtures(specs).items()}
    optimizers = build_optimizers(
        parameters, specs, config, loads=loads, balancing_step=BALANCING_STEP, state_dtype=state_dtype
    )
    work, norms = count_work(optimizers), []
    for step in range(NUM_STEPS):
        for name, spec in specs.items():
            if spec.role == "sparse_embedding":
                parts = [sparse_gradient(spec, step, i) for i in range(num_contributors)]
                parameters[name].grad = torch.stack([part.to_dense() for part in parts]).sum(0).to_sparse(1)
            elif spec.role != "balance":
                parameters[name].grad = random(name, spec.shape, seed=step)
        for name, mine in loads.items():
            parts = [load(name, len(mine), step, i) for i in range(num_contributors)]
            mine.copy_(torch.stack(parts).sum(0))
        gradients = [p.grad.to_dense() for p in parameters.values() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        scale_gradients(parameters.values(), torch.tensor(LARGEST_NORM / norms[-1]))
        for optimizer in optimizers:
            optimizer.step()
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    boxes = {name: Box((0,) * value.dim(), tuple(value.shape)) for name, value in values.items()}
    return Result(boxes, values, states(optimizers, parameters), norms, sum(work))


def of_stage(specs: dict[str, ParameterSpec], mesh: Mesh) -> dict[str, ParameterSpec]:
    """The first stage has the layers but the last, and both ends have the tied embedding."""
    if mesh.layout.pp == 1:
        return specs
    last = (f"layers.{MODEL.num_layers - 1}.", "final_norm", "head")
    return {
        name: spec
        for name, spec in specs.items()
        if name == "embedding.weight" or name.startswith(last) == (mesh.here.pp == 1)
    }


def on_rank(case: Case, config: AdamW | MuonConfig, norms: list[float]) -> Result:
    """The same on this rank of many, from its boxes of the same gradients; clipped by one process's norms."""
    mesh = Mesh(case.layout, case.expert_tp)
    table = sharding_table(MODEL, case.layout, case.expert_tp, sharded=case.sharded)
    specs = of_stage(parameter_specs(MODEL), mesh)
    placements: dict[str, Placement] = {name: table[name] for name in specs}
    boxes = {name: table.box(name, mesh.rank) for name in specs}

    def cut(name: str, whole: Tensor) -> Tensor:
        offsets, shape = boxes[name]
        return whole[tuple(slice(o, o + s) for o, s in zip(offsets, shape, strict=True))].clone()

    parameters = {
        name: nn.Parameter(cut(name, random(name, spec.shape, -1)), requires_grad=spec.role != "balance")
        for name, spec in specs.items()
    }
    loads = {name: torch.zeros(spec.shape) for name, spec in mixtures(specs).items()}
    optimizers = build_optimizers(
        parameters,
        specs,
        config,
        loads=loads,
        balancing_step=BALANCING_STEP,
        state_dtype=case.state_dtype,
        rounds=MatrixRounds(parameters, placements, mesh, round_elements=case.round_elements),
    )
    teams = [team for group in ("tp", "shards", "replica") if (team := mesh.team(group)) is not None]
    contributor = mesh.here.replica * case.layout.stage_ranks + mesh.rank % case.layout.stage_ranks
    work, measured = count_work(optimizers), []
    for step in range(NUM_STEPS):
        for name, spec in specs.items():
            if spec.role == "sparse_embedding":
                parameters[name].grad = sum_sparse(sparse_gradient(spec, step, contributor), teams)
            elif spec.role != "balance":
                parameters[name].grad = cut(name, random(name, spec.shape, step))
        for name, mine in loads.items():
            mine.copy_(load(name, len(mine), step, contributor))
        sum_loads(loads.values(), teams)
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        ends = frozenset({"embedding.weight"} if case.layout.pp > 1 else ())
        measured.append(gradient_norm(gradients, placements, mesh, on_both_ends=ends).item())
        scale_gradients(parameters.values(), torch.tensor(LARGEST_NORM / norms[step]))
        for optimizer in optimizers:
            optimizer.step()
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    return Result(boxes, values, states(optimizers, parameters), measured, sum(work))


def tensors(result: Result) -> Iterator[tuple[str, Box, Tensor]]:
    """Parameters and what optimizers keep of them, with the box of each; and their steps, one number each."""
    for name, value in result.values.items():
        yield name, result.boxes[name], value
        for key, state in result.states.get(name, {}).items():
            box = result.boxes[name] if state.dim() else Box((), ())
            yield f"{name}.{key}", Box(box.offsets[: state.dim()], box.shape[: state.dim()]), state


def compare(whole: Result, ranks: list[Result], tolerance: float) -> None:
    """All of every tensor is on some rank, and what is there is in its place; copies are equal bit for bit,
    and one process's up to `tolerance`."""
    expected = {name: value for name, _, value in tensors(whole)}
    seen = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in expected.items()}
    first: dict[tuple[Any, ...], Tensor] = {}
    for result in ranks:
        for name, (offsets, shape), value in tensors(result):
            here = tuple(slice(o, o + s) for o, s in zip(offsets, shape, strict=True))
            assert tuple(value.shape) == shape, name
            assert value.dtype == expected[name].dtype
            assert torch.equal(first.setdefault((name, offsets, shape), value), value), f"copies of {name}"
            if value.numel():
                error = (value.float() - expected[name][here].float()).abs().max().item()
                assert error <= tolerance, f"{name} is off by {error:.1e}"
            seen[name][here] = True
    assert all(one.all() for one in seen.values())


NARROW = ["copies", "shard 4", "tp 2, shard 2", "expert_tp 2, ep 2"]


@pytest.mark.parametrize(
    ("name", "state_dtype"),
    [(name, torch.float32) for name in CASES] + [(name, torch.bfloat16) for name in NARROW],
)
def test_adamw_adagrad_and_balancing_are_those_of_one_process(name: str, state_dtype: torch.dtype) -> None:
    case = Case(**{**vars(CASES[name]), "state_dtype": state_dtype})
    whole = alone(ADAMW, state_dtype, case.layout.num_ranks // case.layout.pp)
    ranks = run_ranks(on_rank, 4, case, ADAMW, whole.norms)
    # On a CPU torch's fused AdamW rounds the ends of a tensor, which do not fill a vector, otherwise: by one last bit.
    compare(whole, ranks, tolerance=1e-7 if state_dtype == torch.float32 else 0.0)
    assert len({tuple(result.norms) for result in ranks}) == 1
    assert ranks[0].norms == pytest.approx(whole.norms, rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_muon_is_that_of_one_process(name: str) -> None:
    case = CASES[name]
    whole = alone(MUON, torch.float32, case.layout.num_ranks // case.layout.pp)
    ranks = run_ranks(on_rank, 4, case, MUON, whole.norms)
    compare(whole, ranks, tolerance=1e-6)
    # Each matrix is orthogonalised once in a replica group, by ranks that have equally much to do.
    work = [result.work for result in ranks[: case.layout.group_ranks]]
    assert sum(work) == whole.work
    if case.layout.pp == 1:
        assert max(work) < 1.35 * min(work)


def test_momentum_in_bfloat16_is_that_of_one_process() -> None:
    case = Case(Layout(tp=2, shard=2), state_dtype=torch.bfloat16)
    whole = alone(MUON, torch.bfloat16, 4)
    ranks = run_ranks(on_rank, 4, case, MUON, whole.norms)
    compare(whole, ranks, tolerance=1e-6)
    kept = ranks[0].states["layers.1.attention.query.weight"]["momentum"]
    assert kept.dtype == torch.bfloat16


# --- sums ---


def sums_on_rank(poisoned: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Of numbers whose sum depends on its order; of nothing; of what all but one rank have none of; a bad norm."""
    layout = Layout(replica=2, shard=2)
    mesh = Mesh(layout)
    teams = [team for group in ("shards", "replica") if (team := mesh.team(group)) is not None]
    rows = torch.arange(mesh.rank, 40).remainder(7)
    values = random(f"values {mesh.rank}", (len(rows), 5), 0)
    mine = torch.sparse_coo_tensor(rows[None], values, (9, 5), check_invariants=True)
    none = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 5), (9, 5))
    table = sharding_table(MODEL, layout)
    gradient = torch.zeros(table.box("embedding.weight", mesh.rank).shape)
    if mesh.rank == poisoned:
        gradient[-1, -1] = torch.nan
    norm = gradient_norm(
        {"embedding.weight": gradient}, {"embedding.weight": table["embedding.weight"]}, mesh
    )
    some = mine if mesh.rank == 2 else none
    return *(sum_sparse(one, teams).to_dense() for one in (mine, none, some)), norm.item()


def test_sums_of_sparse_gradients_are_equal_on_all_ranks_and_one_bad_number_shows_on_its_group() -> None:
    results = run_ranks(sums_on_rank, 4, 1)
    expected, alone = torch.zeros(9, 5), torch.zeros(9, 5)
    for rank in range(4):
        rows = torch.arange(rank, 40).remainder(7)
        values = random(f"values {rank}", (len(rows), 5), 0)
        expected.index_add_(0, rows, values)
        if rank == 2:
            alone.index_add_(0, rows, values)
    for total, nothing, only, _ in results:
        assert torch.equal(total, results[0][0])
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
        assert not nothing.any()
        assert torch.allclose(only, alone, rtol=1e-5, atol=1e-5)
    assert [math.isnan(norm) for *_, norm in results] == [True, True, False, False]


# --- dealing out ---


def matrices(team_sizes: tuple[int, ...], *shapes: tuple[int, int]) -> list[Matrix]:
    """Cut by rows, over one team after the other."""
    made = []
    for shape in shapes:
        splits, whole = [], shape
        for size in team_sizes:
            step = -(-whole[0] // size)
            sizes = tuple(max(0, min(step, whole[0] - part * step)) for part in range(size))
            splits.append(Split(whole, 0, sizes, 1))
            whole = (step, whole[1])
        made.append(Matrix(0, 0, shape, tuple(splits)))
    return made


@pytest.mark.parametrize("team_sizes", [(), (3,), (2, 4)])
@pytest.mark.parametrize("round_elements", [1, 500, 10**9])
def test_every_matrix_has_one_owner_and_the_owners_equal_work(
    team_sizes: tuple[int, ...], round_elements: int
) -> None:
    mixed = matrices(team_sizes, *[(8, 8)] * 11, *[(30, 8)] * 7, *[(16, 24)] * 5, (8, 100))
    rounds = deal(mixed, team_sizes, round_elements)
    # However little a round may hold, all ranks have something to do in it.
    assert len({places for _, places in rounds[0]}) == math.prod(team_sizes)
    dealt = [id(owned.matrix) for one in rounds for owned in one]
    assert sorted(dealt) == sorted(map(id, mixed))
    work: dict[tuple[int, ...], int] = {}
    for one in rounds:
        whole: dict[tuple[int, ...], int] = {}
        for matrix, places in one:
            work[places] = work.get(places, 0) + matrix.cost
            whole[places] = whole.get(places, 0) + math.prod(matrix.shape)
        assert max(whole.values()) <= max(round_elements, 8 * 100)
    assert all(0 <= place < size for places in work for place, size in zip(places, team_sizes, strict=True))
    assert len(work) == math.prod(team_sizes)
    mean = sum(work.values()) / len(work)
    assert max(work.values()) < max(4 / 3 * mean, max(matrix.cost for matrix in mixed) + mean)


class Exchanged(TorchDispatchMode):
    """Counts what this rank sends in all-to-alls."""

    def __init__(self) -> None:
        super().__init__()
        self.num_sent: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "alltoall_base" in str(function):
            self.num_sent.append(args[1].numel())
        return function(*args, **(kwargs or {}))


@pytest.fixture
def fake_world() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=1024, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_what_is_sent_can_be_seen_without_memory(fake_world: None) -> None:
    """On the first of 1,024 ranks: 64 layers' matrices over 8 × 8 ranks, one to each of them."""
    layout = Layout(replica=16, shard=8, tp=8)
    model = ModelSpec(
        name="large",
        vocab_size=128,
        context_tokens=64,
        num_layers=64,
        hidden_size=8192,
        attention=AttentionSpec(num_heads=64, num_kv_heads=64, head_dim=128),
        mlp=MlpSpec(intermediate_size=8192),
    )
    mesh, table = Mesh(layout), sharding_table(model, layout)
    specs = {name: spec for name, spec in parameter_specs(model).items() if spec.role == "matrix"}
    with FakeTensorMode(), Exchanged() as exchanged:
        parameters = {name: nn.Parameter(torch.empty(table.box(name, 0).shape)) for name in specs}
        for parameter in parameters.values():
            parameter.grad = torch.empty_like(parameter)
        rounds = MatrixRounds(parameters, {name: table[name] for name in specs}, mesh, round_elements=8192**2)
        (muon,) = build_optimizers(parameters, specs, MUON, rounds=rounds, dtype=torch.bfloat16)
        muon.step()
    # Seven matrices to a layer, so each rank owns seven of all, and puts one together in each round. Of its parts it
    # sends 7 of 8 to others, and then 7 of 8 of what it has of the matrices that came; and as much comes back.
    held = sum(parameter.numel() for parameter in parameters.values())
    assert exchanged.num_sent == [held // 7 * 7 // 8] * 4 * 7
