"""Runs a rank's operations of a pipeline, in the order that the plan's schedule says; a rank alone is one of one stage.

The order is the planner's own (planner/schedule/order.py), so what was priced is what runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from colossus.parallel.collectives import Team
from colossus.parallel.deferred import Deferred
from colossus.planner.schedule.messages import Action, Receive, Send, stage_of, with_messages
from colossus.planner.schedule.order import Op, order
from colossus.spec.job import Job


@dataclass
class StageRun:
    """One stage that is here, as the pipeline runs it.

    `forward` takes a micro-batch's number and, but for the first stage, what the stage before put out, and returns what
    the next one wants; of the last stage, the objective, a scalar to differentiate. `message` is the shape and dtype of
    what passes between stages. `sync` is told before each backward pass whether the stage's gradients are complete with
    it, `reduce` is called when weight gradients that were put off are.
    """

    forward: Callable[[int, Tensor | None], Tensor]
    deferred: Deferred
    before_backward: Callable[[bool], None]
    after_weights: Callable[[], None]
    _inputs: dict[int, Tensor | None] = field(default_factory=dict)
    _outputs: dict[int, Tensor] = field(default_factory=dict)


class Pipeline:
    """The stages of this rank, and its part in the schedule."""

    def __init__(
        self, job: Job, team: Team | None, stages: Mapping[int, StageRun], num_micro_batches: int
    ) -> None:
        self.job, self.team, self.stages = job, team, stages
        self.num_micro_batches = num_micro_batches
        self._place = 0 if team is None else team.place
        schedule, pp, chunks = job.schedule, job.layout.pp, job.virtual_stages
        orders = order(schedule, pp, chunks, num_micro_batches)
        self._training = with_messages(schedule, chunks, orders)[self._place]
        self._last_backward = _last_backwards(self._training)
        passes = tuple(
            tuple(
                Op("forward", op.chunk, op.micro_batch)
                for op in rank
                if op.kind in ("forward", "forward_backward")
            )
            for rank in order("gpipe" if chunks == 1 else schedule, pp, chunks, num_micro_batches)
        )
        self._evaluating = with_messages(schedule, chunks, passes)[self._place]

    def train(self, message: Tensor) -> None:
        """All micro-batches of a step, forward and backward. `message`: a tensor like what passes between stages."""
        self._run(self._training, message)

    @torch.no_grad()
    def evaluate(self, message: Tensor) -> None:
        """All micro-batches, forward alone."""
        self._run(self._evaluating, message)
        for stage in self.stages.values():
            stage._inputs.clear()
            stage._outputs.clear()

    def _run(self, actions: Sequence[Action], message: Tensor) -> None:
        coming: dict[tuple[int, int, bool], tuple[list[dist.Work], Tensor]] = {}
        going: list[list[dist.Work]] = []
        here: dict[tuple[int, int, bool], Tensor] = {}
        """Outputs and gradients for stages that stand on this rank too."""

        def taken(stage: int, micro_batch: int, backward: bool) -> Tensor:
            if (key := (stage, micro_batch, backward)) in here:
                return here.pop(key)
            works, tensor = coming.pop(key)
            for work in works:
                work.wait()
            return tensor

        def forward(stage: int, micro_batch: int) -> None:
            run = self.stages[stage]
            hidden = None
            if stage > 0:
                hidden = taken(stage, micro_batch, False).requires_grad_(torch.is_grad_enabled())
            run._inputs[micro_batch] = hidden
            run._outputs[micro_batch] = output = run.forward(micro_batch, hidden)
            if stage + 1 in self.stages:
                here[stage + 1, micro_batch, False] = output.detach()

        def backward(stage: int, micro_batch: int, put_off: bool, complete: bool) -> None:
            run = self.stages[stage]
            output, hidden = run._outputs.pop(micro_batch), run._inputs.pop(micro_batch)
            gradient = taken(stage, micro_batch, True) if stage < self._last_stage else None
            run.before_backward(complete and not put_off)
            run.deferred.on = False
            if put_off:
                run.deferred.begin()
            output.backward(gradient)
            if hidden is not None:
                here_or_sent = hidden.grad
                assert here_or_sent is not None
                if stage - 1 in self.stages:
                    here[stage - 1, micro_batch, True] = here_or_sent
                else:
                    run._inputs[-1 - micro_batch] = here_or_sent

        for action in actions:
            match action:
                case Send(stage, micro_batch, is_backward, rank):
                    run = self.stages[stage]
                    tensor = (
                        run._inputs.pop(-1 - micro_batch)
                        if is_backward
                        else run._outputs[micro_batch].detach()
                    )
                    assert tensor is not None
                    going = [works for works in going if not all(work.is_completed() for work in works)]
                    going.append(self._exchange(dist.isend, tensor.contiguous(), rank))
                case Receive(stage, micro_batch, is_backward, rank):
                    tensor = torch.empty_like(message)
                    coming[stage, micro_batch, is_backward] = self._exchange(dist.irecv, tensor, rank), tensor
                case Op("forward", chunk, micro_batch):
                    forward(self._stage(chunk), micro_batch)
                case Op("forward_backward", chunk, micro_batch, second):
                    assert second is not None
                    forward(self._stage(chunk), micro_batch)
                    other = self._stage(1 - chunk)
                    backward(other, second, False, self._last_backward[1 - chunk] is action)
                case Op("backward_weight", chunk, _):
                    run = self.stages[self._stage(chunk)]
                    run.deferred.make_oldest()
                    if self._last_backward[chunk] is action:
                        run.after_weights()
                case Op(kind, chunk, micro_batch):
                    complete = self._last_backward[chunk] is action
                    backward(self._stage(chunk), micro_batch, kind == "backward_input", complete)
        for works in going:
            for work in works:
                work.wait()

    def _stage(self, chunk: int) -> int:
        return stage_of(self.job.schedule, self.job.layout.pp, self._place, chunk)

    @property
    def _last_stage(self) -> int:
        return self.job.layout.pp * self.job.virtual_stages - 1

    def _exchange(self, operation: Callable[..., dist.Work], tensor: Tensor, rank: int) -> list[dist.Work]:
        assert self.team is not None
        # Batched, though it is one: unbatched, NCCL would run sends and receives of a pair one after the other.
        peer = dist.P2POp(operation, tensor, self.team.ranks[rank], self.team.process_group)
        return dist.batch_isend_irecv([peer])


def _last_backwards(actions: Sequence[Action]) -> dict[int, Op]:
    """By chunk: the operation with which its gradients are complete."""
    last: dict[int, Op] = {}
    for action in actions:
        if isinstance(action, Op):
            if action.kind in ("backward", "backward_weight"):
                last[action.chunk] = action
            elif action.kind == "forward_backward":
                last[1 - action.chunk] = action
    return last
