"""The one function that turns the single-device model into this rank's part of the distributed one.

In this order, and why:

 1. build on the meta device: no memory, whatever the size
 2. cut the pipeline: keep this rank's stages, so that all that follows is small
 3. cut parameters to what this rank computes with: their shapes are the sharding table's
 4. FP8: the matmul itself; scales are of what is here, row by row unless the plan says otherwise
 5. put off weight gradients, where the schedule wants it: around the matmul alone
 6. tensor and expert parallelism: exchanges go around the modules that compute with parts
 7. recompute: around the exchanges, which are made again with what they surround; with it compile each layer, inside of
    what is made again as a whole, around single operators that are
 8. shard what is kept (FSDP2): outermost, for it must see whole layers come and go
"""

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from colossus.models import Decoder
from colossus.models.build import initial_values, reset_buffers
from colossus.models.float8 import Float8Use, recipe_of, use_float8
from colossus.models.moe import MixtureOfExperts
from colossus.parallel.deferred import Deferred, defer_weight_gradients
from colossus.parallel.expert import split_experts
from colossus.parallel.mesh import Mesh
from colossus.parallel.recompute import prepare_layer
from colossus.parallel.tensor import split_tensors
from colossus.spec.compose import ZERO_BUBBLE, check_job
from colossus.spec.job import Job
from colossus.spec.layout import Group
from colossus.spec.model import ModelSpec
from colossus.spec.sharding import ShardingTable, sharding_table
from colossus.spec.stages import Stage

__all__ = ["Part", "apply", "materialise", "table_of"]


class Part:
    """One stage of this rank: the decoder with what is left of it, and the weight gradients that it puts off."""

    def __init__(self, stage: Stage, model: Decoder) -> None:
        self.stage, self.model, self.deferred = stage, model, Deferred()
        self.float8: Float8Use | None = None
        """Which matmuls run in FP8, and why the others do not."""
        self.is_complete = False
        """Whether the backward pass at hand is the last one that adds to its gradients."""

    @property
    def is_sharded(self) -> bool:
        return isinstance(self.model, FSDPModule)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()


def table_of(model: ModelSpec, job: Job) -> ShardingTable:
    return sharding_table(model, job.layout, job.expert_tp, sharded=job.sharding != "none")


def apply(
    model: ModelSpec, job: Job, mesh: Mesh, *, dtype: torch.dtype, compiled: bool = False
) -> tuple[Part, ...]:
    """This rank's stages in order, without data yet. Raises ConfigError for what cannot be combined."""
    check_job(model, job, compiled=compiled)
    table = table_of(model, job)
    recipe = recipe_of(job.precision, job.float8)
    recompute = job.share(mesh.rank).recompute
    parts = []
    for stage in job.stages:
        if stage.rank != mesh.here.pp:
            continue
        with torch.device("meta"):
            decoder = Decoder(model)
        part = Part(stage, decoder)
        _cut_pipeline(decoder, stage)
        _cut_parameters(decoder, table, mesh)
        if recipe is not None:
            part.float8 = use_float8(
                decoder, recipe, exclude=_there(job.wide_matmuls, decoder), device=mesh.device
            )
        if job.schedule in ZERO_BUBBLE:
            defer_weight_gradients(decoder, part.deferred)
        if (tp := mesh.team("tp")) is not None:
            first_row = table.box("embedding.weight", mesh.rank, kept=False).offsets[0]
            split_tensors(decoder, tp, first_row=first_row)
        split_experts(decoder, mesh)
        for layer in decoder.layers:
            # The compiler follows no exchange that depends on what tokens choose, or that runs beside other things.
            is_one_graph = not layer.is_mixture and job.context_exchange != "ring"
            prepare_layer(layer, recompute, compiled=compiled, is_one_graph=is_one_graph)
        if job.sharding != "none":
            _shard(decoder, job, mesh, table, dtype)
        parts.append(part)
    return tuple(parts)


def _cut_pipeline(model: Decoder, stage: Stage) -> None:
    """Layers keep their numbers in the names of their parameters."""
    for number in range(len(model.layers)):
        if number not in stage.layers:
            del model.layers._modules[str(number)]
    if not stage.is_first:
        model.position_embedding = model.ngram_embedding = model.recall_embedding = None
        model.embedding_norm = nn.Identity()
        if not (stage.is_last and model.spec.tied_embeddings):
            model.embedding = None
    if not stage.is_last:
        model.final_norm = nn.Identity()
        model.head = None


def _cut_parameters(model: Decoder, table: ShardingTable, mesh: Mesh) -> None:
    for name, parameter in list(model.named_parameters()):
        shape = table[name].box(mesh.mates, kept=False).shape
        if shape != tuple(parameter.shape):
            owner, _, last = name.rpartition(".")
            made = nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(owner), last, made)


def _there(patterns: tuple[str, ...], model: Decoder) -> tuple[str, ...]:
    """Those that name something of this stage."""
    names = [name for name, _ in model.named_modules()]
    return tuple(pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names))


# --- sharding ---


def _shard(model: Decoder, job: Job, mesh: Mesh, table: ShardingTable, dtype: torch.dtype) -> None:
    """FSDP2 units: experts, routers (whose weights stay float32), layers, and the rest together."""
    dense, expert = mesh.team("shards"), mesh.team("expert_shards")
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups: tuple[Group, ...] = ("shards", "expert_shards")
    left_out = {p for p, name in names.items() if not any(table[name].cut(group) for group in groups)}
    if len(left_out) == len(names):
        return
    gathered_each_time = job.sharding == "weights" and job.layout.pp == 1
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)

    def shard(module: nn.Module, group: Group, policy: MixedPrecisionPolicy, again: bool) -> None:
        def place(parameter: nn.Parameter) -> Shard:
            cut = table[names[parameter]].cut(group)
            return Shard(0 if cut is None else cut.dim)

        fully_shard(
            module,
            mesh=mesh.device_mesh(group),
            reshard_after_forward=again,
            shard_placement_fn=place,
            mp_policy=policy,
            ignored_params={p for p in left_out if p in set(module.parameters())},
        )

    for layer in model.layers:
        if isinstance(layer.mlp, MixtureOfExperts):
            if expert is not None:
                shard(layer.mlp.experts, "expert_shards", narrow, gathered_each_time)
            if dense is not None and dtype != torch.float32:
                shard(layer.mlp.router, "shards", wide, gathered_each_time)
        if dense is not None:
            shard(layer, "shards", narrow, gathered_each_time)
    shard(model, "shards" if dense is not None else "expert_shards", narrow, False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums, not means: every gradient is divided by the step's tokens already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


# --- data ---


@torch.no_grad()
def materialise(parts: tuple[Part, ...], table: ShardingTable, mesh: Mesh, seed: int | None) -> None:
    """Memory on the mesh's device, and initial weights: functions of (seed, name), whatever the layout. Without a seed
    they are left as they come."""
    specs = {name: placement.parameter for name, placement in table.placements.items()}
    for part in parts:
        part.model.to_empty(device=mesh.device)
        for name, parameter in part.model.named_parameters() if seed is not None else ():
            local = local_tensor(parameter)
            spec = replace(specs[name], name=name)
            local.copy_(initial_values(spec, seed, table.box(name, mesh.rank)))
        reset_buffers(part.model)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What is here of a tensor that may be sharded; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
