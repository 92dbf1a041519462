"""From a model, a machine and a goal to a plan. No torch."""

from colossus.planner.one_rank.memory import step_memory
from colossus.planner.one_rank.plan import plan_one_rank

__all__ = ["plan_one_rank", "step_memory"]
