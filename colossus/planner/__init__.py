"""From a model, a machine and a goal to a plan. No torch."""

from colossus.planner.one_rank import plan_one_rank, step_memory

__all__ = ["plan_one_rank", "step_memory"]
