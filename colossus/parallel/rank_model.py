"""This rank's part of the model, and what a step does with it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from colossus.data import IGNORED, Batch
from colossus.models import RouterLosses, chunked_cross_entropy
from colossus.models.attention import Portion
from colossus.models.moe import MixtureOfExperts
from colossus.parallel.apply import Part, apply, local_tensor, materialise, table_of
from colossus.parallel.collectives import all_gather, own_part
from colossus.parallel.context import attend_over, attended_index, sight_over
from colossus.parallel.loss import parallel_cross_entropy
from colossus.parallel.mesh import Mesh
from colossus.parallel.optimize import sum_sparse
from colossus.parallel.pipeline import Pipeline, StageRun
from colossus.parallel.sums import GradientSums, plan_sums
from colossus.spec.job import Job
from colossus.spec.model import ModelSpec
from colossus.spec.sharding import Placement

__all__ = ["RankModel"]


@dataclass(frozen=True, slots=True)
class Objective:
    """What a step differentiates: the sum of token losses, divided by the step's tokens."""

    num_tokens: int
    """Of the whole step, on all ranks."""
    z_loss: float = 0.0
    router_losses: RouterLosses | None = None


class RankModel:
    """The stages of this rank, its parameters as plain tensors, and their gradients summed over all ranks."""

    def __init__(
        self,
        spec: ModelSpec,
        job: Job,
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        chunk_tokens: int,
        compiled: bool = False,
    ) -> None:
        self.spec, self.job, self.mesh, self.dtype = spec, job, mesh, dtype
        self._chunk_tokens = chunk_tokens
        self.table = table_of(spec, job)
        self.parts = apply(spec, job, mesh, dtype=dtype, compiled=compiled)
        self._sources: dict[str, nn.Parameter] = {}
        self.placements: dict[str, Placement] = {
            name: self.table[name] for part in self.parts for name, _ in part.model.named_parameters()
        }
        self.parameters: dict[str, nn.Parameter] = {}
        """By name, what is here of each: plain tensors that share the model's memory. A tied embedding is on both
        ends of a pipeline."""
        self._share = job.share(mesh.rank)
        self._portion = self._make_portion()
        self._first_row = self.table.box("embedding.weight", mesh.rank, kept=False).offsets[0]
        self._pipeline = Pipeline(
            job,
            mesh.team("pp"),
            {part.stage.number: self._stage_run(part) for part in self.parts},
            self._share.num_micro_batches,
        )
        self.on_both_ends = frozenset(
            {"embedding.weight"} if spec.tied_embeddings and job.layout.pp > 1 else ()
        )
        """Of a pipeline: the same on its first and its last rank."""
        dense = {name: there for name, there in self.placements.items() if _has_dense_gradient(there)}
        self._sums = GradientSums(
            plan_sums(dense, mesh, on_both_ends=self.on_both_ends),
            mesh,
            replica_dtype=torch.bfloat16 if job.replica_sum == "bfloat16" else None,
        )
        self._micro_batches: list[Batch] = []
        self._objective = Objective(1)
        self._loss = torch.zeros((), device=mesh.device)
        self._counted = 0

    def materialise(self, seed: int | None) -> None:
        """Memory, and initial weights; without a seed, weights that nobody has filled in."""
        materialise(self.parts, self.table, self.mesh, seed)
        self._sources = {
            name: parameter for part in self.parts for name, parameter in part.model.named_parameters()
        }
        for part in self.parts:
            for name, parameter in part.parameters():
                if name in self._sums.names_ahead:
                    parameter.register_post_accumulate_grad_hook(partial(self._arrived, part, name))
        self.refresh()

    # --- a step ---

    def accumulate(self, batch: Batch, objective: Objective) -> Tensor:
        """Gradients of the whole step's objective into `parameters`, from this rank's `batch` of it.

        Returns the sum of token losses of this rank's tokens; 0 where the head is not.
        """
        self._objective = objective
        self._begin(batch)
        self._sums.reset()
        self._pipeline.train(self._message())
        gradients = self.refresh()
        for name, gradient in gradients.items():
            if gradient.is_sparse:
                self.parameters[name].grad = sum_sparse(
                    gradient, [t for g in ("tp", "shards", "replica") if (t := self.mesh.team(g)) is not None]
                )
        self._sums.finish(gradients)
        return self._loss

    def evaluate(self, batch: Batch) -> tuple[Tensor, int]:
        """Sum of token losses of this rank's tokens, and how many count; both 0 where the head is not."""
        self._objective = Objective(1)
        self._begin(batch)
        self._pipeline.evaluate(self._message())
        for part in self.parts:
            if part.is_sharded:
                part.model.reshard()
        return self._loss, self._counted

    def gradients(self) -> dict[str, Tensor]:
        """What is here of each, summed over all ranks."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def clear_gradients(self) -> None:
        for name, source in self._sources.items():
            source.grad = None
            self.parameters[name].grad = None

    def refresh(self) -> dict[str, Tensor]:
        """Points `parameters` at the model's memory and gradients, which sharding may have moved; the gradients."""
        gradients = {}
        for name, source in self._sources.items():
            local = local_tensor(source).detach()
            parameter = self.parameters.get(name)
            if parameter is None:
                parameter = self.parameters[name] = nn.Parameter(local, requires_grad=source.requires_grad)
            elif not _is_same_memory(parameter, local):
                parameter.data = local
            if source.grad is not None:
                parameter.grad = gradients[name] = local_tensor(source.grad)
        return gradients

    def loads(self) -> dict[str, Tensor]:
        """By the name of its mixture's module: how many of this rank's tokens each expert was given."""
        return {
            name: module.load
            for part in self.parts
            for name, module in part.model.named_modules()
            if isinstance(module, MixtureOfExperts)
        }

    # --- inside ---

    def _begin(self, batch: Batch) -> None:
        size = self._share.micro_batch_sequences
        self._micro_batches = [
            Batch(
                *(
                    array[i : i + size]
                    for array in (batch.tokens, batch.targets, batch.documents, batch.samples)
                )
            )
            for i in range(0, len(batch.samples), size)
        ]
        self._loss = torch.zeros((), device=self.mesh.device)
        self._counted = 0

    def _message(self) -> Tensor:
        rows, tokens = self._share.micro_batch_sequences, self._portion.held.shape[1]
        return torch.empty(rows, tokens, self.spec.hidden_size, dtype=self.dtype, device=self.mesh.device)

    def _make_portion(self) -> Portion:
        tokens, cp, tp = self.job.sequence_tokens, self.mesh.team("cp"), self.mesh.team("tp")
        everything = torch.arange(tokens, device=self.mesh.device)[None]
        if cp is None:
            return Portion(own_part(everything, 1, tp), everything, everything)
        exchange = self.job.context_exchange or "all-gather"
        attended = attended_index(tokens, cp.size, cp.place).to(self.mesh.device)
        held = own_part(attended, 1, tp)
        queries = everything if exchange == "all-to-all" else attended
        return Portion(held, attended, queries, attend_over(exchange, cp, tokens), sight_over(exchange))

    def _stage_run(self, part: Part) -> StageRun:
        return StageRun(
            forward=partial(self._forward, part),
            deferred=part.deferred,
            before_backward=partial(self._before_backward, part),
            after_weights=partial(_reduce_now, part),
        )

    def _forward(self, part: Part, number: int, hidden: Tensor | None) -> Tensor:
        batch = self._micro_batches[number]
        hidden = part.model(
            self._here(batch.tokens),
            self._here(batch.documents),
            dtype=self.dtype,
            portion=self._portion,
            router_losses=self._objective.router_losses,
            hidden=hidden,
        )
        return self._loss_of(part, hidden, batch) if part.stage.is_last else hidden

    def _loss_of(self, part: Part, hidden: Tensor, batch: Batch) -> Tensor:
        tp = self.mesh.team("tp")
        hidden = all_gather(hidden, 1, tp).flatten(0, 1)
        targets = self._here(batch.targets)[:, self._portion.attended[0]].flatten()
        if (batch.targets == IGNORED).any():
            counted = targets != IGNORED
            hidden, targets = hidden[counted], targets[counted]
        settings = {
            "chunk_tokens": self._chunk_tokens,
            "multiplier": self.spec.logit_multiplier,
            "soft_cap": self.spec.logit_soft_cap,
            "z_loss": self._objective.z_loss,
        }
        head = part.model.head_weight
        if tp is None:
            objective, loss = chunked_cross_entropy(hidden, head, targets, **settings)
        else:
            objective, loss = parallel_cross_entropy(
                hidden, head, targets, first_row=self._first_row, team=tp, **settings
            )
        self._loss = self._loss + loss
        self._counted += targets.numel()
        return objective / self._objective.num_tokens

    def _here(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.mesh.device)

    def _before_backward(self, part: Part, complete: bool) -> None:
        """Gradients are scattered with each micro-batch where they, or weights, are sharded; in a pipeline, and where
        only the optimizer is, once all are there."""
        part.is_complete = complete
        if not part.is_sharded:
            return
        alone = self.job.layout.pp == 1
        part.model.set_is_last_backward(complete)
        part.model.set_requires_gradient_sync(
            complete or (alone and self.job.sharding in ("gradients", "weights"))
        )
        part.model.set_reshard_after_backward(complete or (alone and self.job.sharding == "weights"))

    def _arrived(self, part: Part, name: str, parameter: nn.Parameter) -> None:
        """A backward pass has added to a gradient; sharding calls it when it has scattered one, on its own stream."""
        if part.is_complete:
            assert parameter.grad is not None
            self._sums.arrived(name, local_tensor(parameter.grad))


def _reduce_now(part: Part) -> None:
    """Scatters gradients that were complete only after the last backward pass of inputs.

    Torch has no public call for it; its own pipelines do the same.
    """
    part.is_complete = True
    if not part.is_sharded:
        return
    model = part.model
    model.set_is_last_backward(True)
    model.set_requires_gradient_sync(True)
    model.set_reshard_after_backward(True)
    root = fully_shard.state(model)
    for state in root._state_ctx.all_states:
        groups: Iterable = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in groups:
            if group is not None:
                # Some are in float32 already, those of earlier micro-batches; all that are scattered must be.
                for parameter in group.fsdp_params:
                    parameter.accumulate_unsharded_grad_if_needed()
                    parameter.to_accumulated_grad_if_needed()
                group.post_backward()
    root._root_post_backward_final_callback()


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Asked of storages: tensors of a dry run have no addresses."""
    storages = one.untyped_storage()._cdata, other.untyped_storage()._cdata
    return storages[0] == storages[1] and one.storage_offset() == other.storage_offset()


def _has_dense_gradient(placement: Placement) -> bool:
    return placement.parameter.role not in ("sparse_embedding", "balance")
