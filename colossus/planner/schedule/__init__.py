"""Pipeline schedules: the order of every rank's operations, and the time and activations they take.

Start with `order.py`. `graph.py` knows what waits for what and finds the longest path; `steady.py` does so for many
sets of times and many micro-batches at once; `timeline.py` shows every operation; `bounds.py` needs no simulation.
"""

from colossus.planner.schedule.bounds import activations_in_flight, lower_bound_s
from colossus.planner.schedule.order import SCHEDULES, Kind, Op, Schedule, micro_batch_group, order
from colossus.planner.schedule.steady import makespan_s, makespans_s
from colossus.planner.schedule.timeline import Timeline, timeline
from colossus.planner.schedule.times import StageTimes

__all__ = [
    "SCHEDULES",
    "Kind",
    "Op",
    "Schedule",
    "StageTimes",
    "Timeline",
    "activations_in_flight",
    "lower_bound_s",
    "makespan_s",
    "makespans_s",
    "micro_batch_group",
    "order",
    "timeline",
]
