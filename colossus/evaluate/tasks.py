"""Tasks of lm-eval: found, run with a model of ours, and what came of them. This module needs lm-eval."""

import contextlib
import logging
import os
import random
import socket
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from colossus.data import Progress, SilentProgress
from colossus.errors import ColossusError, ConfigError, HubUnavailable, did_you_mean

INSTALL = "pip install 'colossus-llm[evaluate]'"
_ANSWER_S = 2.5
"""How long the hub may take to answer before data sets count as out of reach."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of one task or group."""

    task: str
    metric: str
    filter: str
    """What answers went through before they were compared; `none` mostly."""
    value: float
    standard_error: float | None
    higher_is_better: bool | None
    num_fewshot: int | None
    num_samples: int | None
    version: str


def check_lm_eval() -> None:
    """Raises ConfigError where the package is missing."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--tasks needs the package lm-eval ({error}): {INSTALL}") from error


def find_tasks(names: Sequence[str], include: Sequence[Path] = ()) -> list[Any]:
    """lm-eval's Task and Group objects: by name, or by the path of a .yaml file; data sets are loaded.

    Names are looked for in the folders `include` first, then among lm-eval's own, which takes it some seconds.
    Raises ConfigError for a task that there is not or that cannot be used, HubUnavailable for one whose data set
    is not on this machine and cannot be fetched.
    """
    check_lm_eval()
    from lm_eval.tasks import TaskManager

    for folder in include:
        if not folder.is_dir():
            raise ConfigError(f"--include {folder}: there is no such folder")
    for name in names:
        if _is_path(name) and not Path(name).is_file():
            raise ConfigError(f"task {name}: there is no such file")
    folders = [str(folder) for folder in include]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if any(not _is_path(name) and name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=folders)
    with _hub_or_not():
        return [found for name in names for found in _found(manager, name)]


def run_tasks(
    model: Any,
    tasks: Sequence[Any],
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    seed: int = 1234,
    progress: Progress | None = None,
) -> tuple[Metric, ...]:
    """Runs lm-eval's own evaluation of `model`, an lm-eval LM, over tasks of `find_tasks`.

    limit: so many documents of each task; below 1: that share of them. num_fewshot: examples in the prompt, where a
    task does not forbid it. seed: of the examples' choice, as in lm-eval. Raises ConfigError for what goes wrong in a
    task's own code or templates.
    """
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    progress = progress or SilentProgress()
    progress.stage("making requests", None)
    loaded = TaskManager(include_defaults=False).load(list(tasks))
    for task in loaded["tasks"].values():
        usual = task.get_config("num_fewshot")
        if usual is None or (num_fewshot is not None and usual != 0):
            task.set_config("num_fewshot", num_fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        with _quiet():
            results = evaluate(
                model,
                loaded,
                limit=limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                log_samples=False,
            )
    except ColossusError:
        raise
    except Exception as error:
        if _passed_through(error, type(model).__module__):
            raise  # ours, not the task's
        raise ConfigError(f"lm-eval could not run {_names(tasks)}: {_first_line(error)}") from error
    return _metrics(results)


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _found(manager: Any, name: str) -> list[Any]:
    if not _is_path(name) and name not in manager.all_tasks:
        near = did_you_mean(name, manager.all_tasks)
        hint = near if "Did you mean" in near else ""  # a list of thousands is no help
        raise ConfigError(
            f"there is no task {name!r} in lm-eval's or the included folders.{hint} A file of yours is named with its "
            f".yaml, a folder of them with --include"
        )
    try:
        with _quiet():
            found = manager.load([str(Path(name).resolve()) if _is_path(name) else name])
    except Exception as error:  # a task's own code may raise anything
        if _is_out_of_reach(error):
            raise HubUnavailable(
                f"task {name} needs a data set that is not on this machine and cannot be fetched from here: "
                f"{_first_line(error)}"
            ) from error
        raise ConfigError(f"task {name} cannot be used: {_first_line(error)}") from error
    groups = found.get("groups", {})
    inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    children = {one.name for group in groups.values() for one in group.get_all_groups()}
    tops = [group for key, group in groups.items() if key not in children]
    return [*tops, *(task for key, task in found["tasks"].items() if key not in inside)]


def _is_out_of_reach(error: BaseException | None) -> bool:
    """Whether the network, and not the task, is what failed."""
    names = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "DatasetNotFoundError", "HfHubHTTPError"}
    while error is not None:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, ConnectionError | TimeoutError) or kinds & {*names, "ConnectError"}:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _hub_or_not() -> Iterator[None]:
    """Where the hub does not answer, its libraries are told so: they use what is on this machine, and do not try for
    half a minute each time."""
    import datasets.config
    import huggingface_hub.constants

    if _hub_answers():
        yield
        return
    places = (
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
    )
    before = [getattr(module, name, False) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _hub_answers() -> bool:
    from colossus.data.hub import within

    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy's to say; a direct connection would tell nothing
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    try:
        within(
            _ANSWER_S,
            lambda: socket.create_connection((endpoint.hostname or "", port), _ANSWER_S).close(),
            "hub",
        )
    except HubUnavailable:
        return False
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's and its libraries' progress goes unsaid, their stray prints to stderr; warnings stay."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _passed_through(error: BaseException, module: str) -> bool:
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == module:
            return True
        trace = trace.tb_next
    return False


def _metrics(results: dict[str, Any]) -> tuple[Metric, ...]:
    found: list[Metric] = []
    tables = {**results.get("groups", {}), **results["results"]}
    for task, table in tables.items():
        for key, value in table.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = table.get(f"{metric}_stderr,{name}")
            samples = results.get("n-samples", {}).get(task, {}).get("effective", table.get("sample_len"))
            found.append(
                Metric(
                    task=task,
                    metric=metric,
                    filter=name,
                    value=float(value),
                    standard_error=float(error) if isinstance(error, int | float) else None,
                    higher_is_better=results.get("higher_is_better", {}).get(task, {}).get(metric),
                    num_fewshot=results.get("n-shot", {}).get(task),
                    num_samples=samples,
                    version=str(results.get("versions", {}).get(task, "")),
                )
            )
    return tuple(found)


def _names(tasks: Sequence[Any]) -> str:
    return ", ".join(str(getattr(task, "task_name", None) or getattr(task, "name", task)) for task in tasks)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
