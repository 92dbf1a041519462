"""Colossus: one training system for language models, from a laptop to a fleet.

The names below are the public interface. Those that need torch are imported when they are first used, so that
planning and watching work where torch is not installed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colossus.checkpoint.continued import continued
    from colossus.checkpoint.hugging_face import export_run, import_run, open_directory
    from colossus.checkpoint.upcycle import upcycle_run, upcycled
    from colossus.generate import Sampling, load_model, load_run
    from colossus.hardware.fleet_text import parse_fleet
    from colossus.observe.run_directory import RunDirectory
    from colossus.observe.summary import Summary
    from colossus.planner.plan import make_plan
    from colossus.spec.config import from_toml, run_config, to_toml
    from colossus.spec.duration import Duration
    from colossus.spec.fleet import Fleet
    from colossus.spec.goal import Goal
    from colossus.spec.model import ModelSpec
    from colossus.spec.plan import Plan
    from colossus.spec.rank import RankPlan
    from colossus.spec.run import RunConfig
    from colossus.trainer.run import resume
    from colossus.trainer.run import start as train
    from colossus.zoo import find as find_model

_HOMES = {
    "Duration": ("colossus.spec.duration", "Duration"),
    "Fleet": ("colossus.spec.fleet", "Fleet"),
    "Goal": ("colossus.spec.goal", "Goal"),
    "ModelSpec": ("colossus.spec.model", "ModelSpec"),
    "Plan": ("colossus.spec.plan", "Plan"),
    "RankPlan": ("colossus.spec.rank", "RankPlan"),
    "RunConfig": ("colossus.spec.run", "RunConfig"),
    "RunDirectory": ("colossus.observe.run_directory", "RunDirectory"),
    "Sampling": ("colossus.generate", "Sampling"),
    "Summary": ("colossus.observe.summary", "Summary"),
    "continued": ("colossus.checkpoint.continued", "continued"),
    "export_run": ("colossus.checkpoint.hugging_face", "export_run"),
    "find_model": ("colossus.zoo", "find"),
    "from_toml": ("colossus.spec.config", "from_toml"),
    "import_run": ("colossus.checkpoint.hugging_face", "import_run"),
    "load_model": ("colossus.generate", "load_model"),
    "load_run": ("colossus.generate", "load_run"),
    "make_plan": ("colossus.planner.plan", "make_plan"),
    "open_directory": ("colossus.checkpoint.hugging_face", "open_directory"),
    "parse_fleet": ("colossus.hardware.fleet_text", "parse_fleet"),
    "resume": ("colossus.trainer.run", "resume"),
    "run_config": ("colossus.spec.config", "run_config"),
    "to_toml": ("colossus.spec.config", "to_toml"),
    "train": ("colossus.trainer.run", "start"),
    "upcycle_run": ("colossus.checkpoint.upcycle", "upcycle_run"),
    "upcycled": ("colossus.checkpoint.upcycle", "upcycled"),
}

__all__ = [
    "Duration",
    "Fleet",
    "Goal",
    "ModelSpec",
    "Plan",
    "RankPlan",
    "RunConfig",
    "RunDirectory",
    "Sampling",
    "Summary",
    "continued",
    "export_run",
    "find_model",
    "from_toml",
    "import_run",
    "load_model",
    "load_run",
    "make_plan",
    "open_directory",
    "parse_fleet",
    "resume",
    "run_config",
    "to_toml",
    "train",
    "upcycle_run",
    "upcycled",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"colossus has no public name {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
