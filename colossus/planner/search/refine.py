"""The last step of a search: pipelines of the best candidates are played as timelines, and one is chosen."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from colossus.planner.estimate.columns import Array
from colossus.planner.estimate.step import StepParts, head_s, stage_layers
from colossus.planner.schedule import makespan_s
from colossus.planner.schedule.order import SCHEDULES
from colossus.planner.schedule.times import StageTimes
from colossus.planner.search.best import Evaluated, Search
from colossus.planner.search.bounds import PER_MICRO_BATCH, Problem, execution

MOST_REFINED = 400
"""Timelines played for one choice; ties beyond are decided by the closed form."""


class Picked(NamedTuple):
    """The chosen row of what was evaluated, its pipeline played as a timeline."""

    row: int
    objective: float
    step_s: float
    parts: StepParts


def choose(
    problem: Problem,
    search: Search,
    evaluated: Evaluated,
    *,
    most: int = MOST_REFINED,
    fits: Callable[[int], bool] = lambda row: True,
) -> Picked | None:
    """The best row with its objective, step seconds and parts, pipelines played as timelines.

    With uneven stages the closed form may exceed the timeline by up to 3 %, so that rows beyond that need not be
    played. Of rows within 0.2 %, the smallest replica group wins (a failure takes the
    least away), then the most memory left. `fits` has the last word on a row's memory.
    """
    order = np.argsort(evaluated.objective, kind="stable")
    order = order[np.isfinite(evaluated.objective[order])]
    ranks = search.ranks[evaluated.candidates.layout]
    played: list[Picked] = []
    least = np.inf
    for row in map(int, order):
        if len(played) == most or evaluated.objective[row] > least * CLOSED_FORM_EXCESS:
            break
        if not fits(row):
            continue
        step_s, parts = refined_step_s(problem, search, evaluated, row)
        objective = float(evaluated.objective[row]) * step_s / float(evaluated.step_s[row])
        least = min(least, objective)
        played.append(Picked(row, objective, step_s, parts))
    if not played:
        return None
    close = [entry for entry in played if entry.objective <= least * TIE]
    return min(close, key=lambda entry: (ranks[entry.row], -evaluated.headroom_bytes[entry.row]))


TIE = 1.002
CLOSED_FORM_EXCESS = 1.03


def refined_step_s(
    problem: Problem, search: Search, evaluated: Evaluated, row: int
) -> tuple[float, StepParts]:
    """One candidate's step with its pipeline played as a timeline, every stage with its own layers; and its parts.

    The pool that sets the pace counts.
    """
    pace = int(np.argmax(evaluated.busy_s[row]))
    pool = problem.pools[pace]
    layout = problem.layouts.take(evaluated.candidates.layout[[row]])
    option = evaluated.candidates.option[[row], pace]
    count = evaluated.micro_batches[[row], pace]
    groups = evaluated.groups[[row]].sum(axis=1)
    parts = search.parts(pool, layout, option, groups, count)
    p = int(layout.pp[0])
    if p == 1:
        return float(parts.total_s[0]), parts
    v, m = int(layout.chunks[0]), int(count[0])
    schedule = SCHEDULES[int(layout.schedule[0])]
    choice = problem.options
    hardware, constants = problem.hardware(pool, layout.precision)
    x = execution(problem, layout, choice.micro_batch[option], choice.recompute[option], groups, count)
    most, first, last = (float(a[0]) for a in stage_layers(problem.shape.layers, layout.pp, layout.chunks))
    layers = np.array([first, *[most] * (p - 2), last])
    growing = sum(
        float(getattr(parts, name)[0]) for name in PER_MICRO_BATCH if name not in ("head_s", "pipeline_s")
    )
    head = float((head_s(problem.shape, x, hardware, constants) * constants.stack)[0])
    ends = np.maximum(layers * 1.0, 1e-9)
    per_layer = growing / m / _paced(parts, layers, head, m)
    whole = np.repeat((ends * per_layer / v)[:, None], v, axis=1)
    last_rank, last_chunk = (0, v - 1) if schedule in ("zbv", "dualpipev") else (p - 1, v - 1)
    again = {0: 0.0, 1: 0.05, 2: 0.5, 3: 1.0}[int(choice.recompute[option][0])]
    share = 1.0 / (3.0 + again)
    forward, weight = whole * share, whole * share
    back = whole * (1.0 + again) * share
    for times in (forward, back, weight):
        times[last_rank, last_chunk] += head / 3.0
    alone = float(np.max((forward + back + weight).sum(axis=1))) * m
    span = makespan_s(schedule, StageTimes(forward, back, weight), m)
    bubble = max(0.0, span - alone)
    parts = replace(parts, bubble_s=np.array([bubble]))
    return float(parts.total_s[0]), parts


def _paced(parts: StepParts, layers: Array, head: float, micro_batches: int) -> float:
    """Layers of the stage that sets the pace: the last one where the head shows in the parts, else the fullest."""
    return float(layers[-1]) if float(parts.head_s[0]) > 0.5 * head * micro_batches else float(layers.max())
