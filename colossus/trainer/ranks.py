"""One rank of many: its state, and how it does its part of a step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from colossus.checkpoint import Box, ProcessGroupRanks, Saver, Shard
from colossus.data import IGNORED, Batch, BatchReader, Corpus, Tokenizer, heldout_windows
from colossus.models import RouterLosses
from colossus.optim import Optimizers, build_optimizers, scale_gradients
from colossus.parallel.mesh import Mesh
from colossus.parallel.optimize import MatrixRounds, gradient_norm, sum_loads
from colossus.parallel.rank_model import Objective, RankModel
from colossus.spec.duration import Progress
from colossus.spec.job import Job
from colossus.spec.layout import Group
from colossus.spec.rank import RankPlan
from colossus.spec.run import RunConfig
from colossus.trainer.evaluate import HeldOut, held_out
from colossus.trainer.execute import Executor
from colossus.trainer.precision import DTYPES
from colossus.trainer.step import Sums, router_losses, worst_load


class RankState:
    """What a rank holds of a run: boxes of the weights and of the optimizer's state, and how far the run has come."""

    def __init__(self, config: RunConfig, job: Job, plan: RankPlan, mesh: Mesh) -> None:
        self.config, self.job, self.plan, self.mesh = config, job, plan, mesh
        self.progress = Progress()
        self.skipped_in_a_row = 0
        self.leads = mesh.rank == 0
        self.model = RankModel(
            config.model,
            job,
            mesh,
            dtype=DTYPES[plan.dtype],
            chunk_tokens=plan.loss_chunk_tokens,
            compiled=plan.compile,
        )
        self.model.materialise(config.seed)
        self.optimizers: Optimizers = build_optimizers(
            self.model.parameters,
            {name: placement.parameter for name, placement in self.model.placements.items()},
            config.optimizer,
            loads=self.model.loads(),
            balancing_step=config.routing.balancing_step,
            dtype=DTYPES[plan.dtype],
            state_dtype=DTYPES[job.optimizer_state],
            rounds=MatrixRounds(self.model.parameters, self.model.placements, mesh),
        )
        self._optimizers = {
            parameter: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    # --- what ranks agree on ---

    def executor(self, config: RunConfig, reader: BatchReader) -> Executor:
        return OneOfMany(self, reader)

    def agree(self, progress: Progress) -> Progress:
        clock = torch.tensor([progress.seconds, progress.cpu_seconds], dtype=torch.float64)
        seconds, cpu_seconds = self.over_all(clock if self.leads else torch.zeros_like(clock)).tolist()
        return Progress(progress.steps, progress.tokens, seconds, cpu_seconds)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        return tuple(count > 0 for count in self.over_all(torch.tensor(flags, dtype=torch.float64)).tolist())

    def each(self, number: int) -> tuple[int, ...]:
        mine = torch.zeros(self.job.layout.num_ranks, dtype=torch.float64)
        mine[self.mesh.rank] = number
        return tuple(int(one) for one in self.over_all(mine).tolist())

    def over_all(self, numbers: Tensor) -> Tensor:
        """The sum of some numbers over all ranks: within replica groups, then across."""
        numbers = numbers.to(self.mesh.device)
        for group in ("group", "replica"):
            if (team := self.mesh.team(group)) is not None:
                dist.all_reduce(numbers, group=team.process_group)
        return numbers

    # --- on disk ---

    def saver(self, directory: Path, config: RunConfig) -> "Saver | NotSaving":
        """The ranks of the first replica group write; the others hold copies."""
        if self.mesh.here.replica > 0:
            return NotSaving()
        team = self.mesh.team("group")
        ranks = None if team is None else ProcessGroupRanks(team.process_group)
        return Saver(directory, keep=config.checkpoints, model=config.model, ranks=ranks)

    def tensors(self) -> dict[str, Shard]:
        """Of what several ranks hold, the first one writes it."""
        shards = {}
        for name, parameter in self.model.parameters.items():
            if not self._is_mine(name):
                continue
            shape, offsets = self.model.placements[name].parameter.shape, self._offsets(name)
            shards[f"model.{name}"] = Shard(shape, offsets, parameter.detach())
            for key, value in self._optimizer_of(name).state.get(parameter, {}).items():
                if value.shape == parameter.shape:
                    shards[f"optimizer.{name}.{key}"] = Shard(shape, offsets, value)
                elif not any(offsets):  # a counter, or a number per row of what is not split
                    shards[f"optimizer.{name}.{key}"] = Shard.whole(value)
        return shards

    def facts(self) -> dict[str, Any]:
        return {"progress": asdict(self.progress), "skipped_in_a_row": self.skipped_in_a_row}

    def wanted(self) -> dict[str, Box]:
        """What this rank asks of a checkpoint, whatever layout it was written under."""
        boxes = {}
        for name, parameter in self.model.parameters.items():
            shape, offsets = self.model.placements[name].parameter.shape, self._offsets(name)
            box = Box(shape, offsets, tuple(parameter.shape), parameter.dtype)
            boxes[f"model.{name}"] = box
            for key, kind in _STATE[type(self._optimizer_of(name)).__name__].items():
                match kind:
                    case "like":
                        state = replace(box, dtype=DTYPES[self.job.optimizer_state])
                        boxes[f"optimizer.{name}.{key}"] = state
                    case "scalar":
                        boxes[f"optimizer.{name}.{key}"] = Box.whole((), torch.float32)
                    case "rows":
                        boxes[f"optimizer.{name}.{key}"] = Box.whole(shape[:1], parameter.dtype)
        return boxes

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Takes over the boxes of a checkpoint."""
        for full_name, tensor in tensors.items():
            kind, _, name = full_name.partition(".")
            if kind == "model":
                self.model.parameters[name].copy_(tensor)
                continue
            name, _, key = name.rpartition(".")
            parameter = self.model.parameters[name]
            self._optimizer_of(name).state[parameter][key] = tensor.to(parameter.device)
        self.progress = Progress(**facts["progress"])
        self.skipped_in_a_row = facts["skipped_in_a_row"]

    def _is_mine(self, name: str) -> bool:
        placement = self.model.placements[name]
        if name == "embedding.weight" and not any(part.stage.is_first for part in self.model.parts):
            return False  # tied: the first stage's is written
        groups: tuple[Group, ...] = ("tp", "shards")
        if placement.parameter.expert:
            groups = ("ep", "expert_tp", "expert_shards")
        return placement.is_first_copy(self.mesh.mates, groups)

    def _offsets(self, name: str) -> tuple[int, ...]:
        return self.model.table.box(name, self.mesh.rank).offsets

    def _optimizer_of(self, name: str) -> torch.optim.Optimizer:
        return self._optimizers[self.model.parameters[name]]

    # --- held-out text, samples ---

    def compile(self) -> None:
        """Layers were compiled when they were made: it goes below sharding."""

    def sample(self, tokenizer: Tokenizer, seed: int) -> str | None:
        return None

    def heldout(
        self, corpus: Corpus, plan: RankPlan, *, max_tokens: int | None, stop: Callable[[], bool] | None
    ) -> HeldOut | None:
        windows = heldout_windows(corpus, self.job.sequence_tokens)
        stride = 1 if max_tokens is None else max(1, -(-windows.num_tokens // max_tokens))
        chosen = range(0, windows.num_windows, stride)
        at_once = self.job.global_batch_sequences
        first, count = self.job.samples(self.mesh.rank)
        nats = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for start in range(0, len(chosen), at_once):
            (stopped,) = self.any(stop is not None and stop())
            if stopped:
                return None
            rows = [
                windows.read(n, 1)
                for n in chosen[start + first : min(start + first + count, start + at_once)]
            ]
            loss, counted = self.model.evaluate(_filled(rows, count, self.job.sequence_tokens))
            if self.mesh.mates("tp").place == 0:
                nats += torch.tensor([float(loss), counted], dtype=torch.float64, device=nats.device)
        total, num_tokens = self.over_all(nats).tolist()
        return held_out(total, int(num_tokens), windows)


def _filled(rows: Sequence[Batch], count: int, num_tokens: int) -> Batch:
    """`count` rows, those that are not there with nothing to predict."""
    empty = np.zeros((count - len(rows), num_tokens), np.int64)
    return Batch(
        np.concatenate([*(row.tokens for row in rows), empty]),
        np.concatenate([*(row.targets for row in rows), np.full_like(empty, IGNORED)]),
        np.concatenate([*(row.documents for row in rows), empty.astype(np.int32)]),
        np.arange(count),
    )


_STATE = {
    "AdamW": {"exp_avg": "like", "exp_avg_sq": "like", "step": "scalar"},
    "NarrowAdamW": {"exp_avg": "like", "exp_avg_sq": "like", "step": "scalar"},
    "Muon": {"momentum": "like", "step": "scalar"},
    "RowAdagrad": {"square_sum": "rows"},
    "Balancing": {},
}
"""What each optimizer keeps of a parameter: a tensor like it, one number, or one per row."""


class NotSaving:
    """A rank that has nothing to write: another replica group does."""

    busy = False

    def save(self, *_: Any) -> None: ...

    def poll(self) -> list[Any]:
        return []

    wait = poll

    def __enter__(self) -> "NotSaving":
        return self

    def __exit__(self, *_: object) -> None: ...


class OneOfMany:
    """This rank's part of each step."""

    def __init__(self, state: RankState, reader: BatchReader) -> None:
        self.plan, self.optimizers, self.num_ranks = state.plan, state.optimizers, state.job.layout.num_ranks
        self._state, self._reader = state, reader
        self.samples: Sequence[int] = ()

    def accumulate(self, step: int) -> Sums:
        state, job, config = self._state, self._state.job, self._state.config
        self.samples = range(step * job.global_batch_sequences, (step + 1) * job.global_batch_sequences)
        first, count = job.samples(state.mesh.rank)
        batch = self._reader.read_samples(self.samples[0] + first, count)
        losses: RouterLosses | None = router_losses(config.routing, job.step_tokens, state.mesh.device)
        loss = state.model.accumulate(batch, Objective(job.step_tokens, config.z_loss, losses))
        if state.mesh.mates("tp").place > 0:
            loss = torch.zeros_like(loss)  # all tensor-parallel ranks have the same
        if loads := list(state.model.loads().values()):
            sum_loads(
                loads, [t for g in ("tp", "shards", "replica") if (t := state.mesh.team(g)) is not None]
            )
        return Sums(state.over_all(loss.double()), job.step_tokens)

    def gradient_norm(self) -> Tensor:
        model = self._state.model
        return gradient_norm(model.gradients(), model.placements, model.mesh, on_both_ends=model.on_both_ends)

    def scale_gradients(self, factor: Tensor) -> None:
        scale_gradients(self._state.model.parameters.values(), factor)

    def clear_gradients(self) -> None:
        self._state.model.clear_gradients()

    def take_expert_loads(self) -> float | None:
        loads = self._state.model.loads()
        worst = torch.tensor([worst_load(loads.values()) or 0.0], dtype=torch.float64)
        team = self._state.mesh.team("pp")
        if team is not None:
            worst = worst.to(self._state.mesh.device)
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=team.process_group)
        return worst.item() or None
