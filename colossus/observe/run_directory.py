"""A run's directory: what is in it, how one is made, found and kept from being used twice at once.

runs/first-light-001/
  README.md          what each file is, and how to go on from here
  config.toml        everything that decides the run, with the plan
  plan.json          of a run of many ranks: its plan          machine.json      and the machine that they measured
  environment.json   machine, versions, command line        git.json   commit of the code, uncommitted changes
  events.jsonl       all that happened, one event a line
  checkpoints/       tokenizer/
  summary.json       sample.txt       curves.png       logs/ (what each of many ranks said)
"""

import contextlib
import fcntl
import json
import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TextIO

from colossus.errors import ConfigError, RunError, did_you_mean
from colossus.events import Event, RunFinished, RunStarted, read_events
from colossus.observe.environment import environment, git_state
from colossus.observe.readme import readme
from colossus.spec.config import from_toml, to_toml
from colossus.spec.plan import Plan
from colossus.spec.rank import Machine
from colossus.spec.run import RunConfig

State = Literal["starting", "running", "finished", "interrupted", "diverged", "crashed", "new"]
"""`new`: made of another's weights and not trained yet."""

ORIGIN_NAME = "started_from.txt"

_ENDS: dict[str, State] = {"interrupted": "interrupted", "diverged": "diverged"}
DEFAULT_RUNS = Path("runs")
_SOURCE_ROOT = Path(__file__).resolve().parents[2]
_SILENT_FOR_S = 600.0
"""A run on another host is taken for dead when its log has not grown for so long."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A directory that holds one run. Make one with `create`, find one with `open` or `all`."""

    path: Path

    # --- what is in it ---

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config_path(self) -> Path:
        return self.path / "config.toml"

    @property
    def plan_path(self) -> Path:
        return self.path / "plan.json"

    @property
    def machine_path(self) -> Path:
        return self.path / "machine.json"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    @property
    def sample_path(self) -> Path:
        return self.path / "sample.txt"

    @property
    def curves_path(self) -> Path:
        return self.path / "curves.png"

    @property
    def _lock_path(self) -> Path:
        return self.path / ".lock"

    # --- made, found ---

    @classmethod
    def create(cls, runs_directory: Path | str, name: str) -> Self:
        """A new directory `name-001`, `name-002`, …: one that no other process has, after the last one."""
        check_name(name)
        runs = Path(runs_directory)
        try:
            runs.mkdir(parents=True, exist_ok=True)
            number = _last_number(runs, name) + 1
            while True:
                path = runs / f"{name}-{number:03d}"
                try:
                    path.mkdir()  # atomic: of two processes one gets it, the other takes the next number
                    break
                except FileExistsError:
                    number += 1
            (path / "checkpoints").mkdir()
            (path / "tokenizer").mkdir()
        except OSError as error:
            raise RunError(f"cannot make a run directory in {runs}: {error.strerror or error}") from None
        return cls(path)

    @classmethod
    def open(cls, path_or_name: Path | str, runs_directory: Path | str = DEFAULT_RUNS) -> Self:
        """An existing run: by path, by name under `runs_directory`, or `latest`, the last active one.

        Raises RunError, with the nearest names, when there is none.
        """
        runs = Path(runs_directory)
        found = cls.all(runs)
        if str(path_or_name) == "latest":
            if not found:
                raise RunError(f"there are no runs in {runs} yet")
            return max(found, key=lambda run: run.last_active_s())
        for path in (Path(path_or_name), runs / path_or_name):
            if (path / "config.toml").is_file():
                return cls(path)
        if Path(path_or_name).is_dir():
            raise RunError(f"{path_or_name} is not a run: there is no config.toml in it")
        raise RunError(f"no run {str(path_or_name)!r} in {runs}.{_nearest(str(path_or_name), found)}")

    @classmethod
    def all(cls, runs_directory: Path | str = DEFAULT_RUNS) -> list[Self]:
        """All runs in a directory, by name."""
        return [cls(path.parent) for path in sorted(Path(runs_directory).glob("*/config.toml"))]

    # --- what it says about itself ---

    def write_description(self, config: RunConfig, command: Sequence[str] | None = None) -> None:
        """Writes README.md, config.toml, environment.json and, where the code is a git checkout, git.json."""
        self.write_config(config)
        _write_json(self.path / "environment.json", environment(command))
        if (git := git_state(_SOURCE_ROOT)) is not None:
            _write_json(self.path / "git.json", git)

    def write_config(self, config: RunConfig) -> None:
        """Writes the configuration and the README that follows from it; again once the plan is known."""
        _write_text(self.config_path, to_toml(config))
        _write_text(self.path / "README.md", readme(self.path, config))

    def config(self) -> RunConfig:
        """The configuration, with the plan that it was trained with."""
        try:
            return from_toml(self.config_path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            raise RunError(f"cannot read {self.config_path}: {error}") from None

    def write_plan(self, plan: Plan) -> None:
        """The plan that many ranks execute together."""
        _write_text(self.plan_path, plan.to_json())

    def plan(self) -> Plan:
        """The same. Raises ConfigError where it is not there, was cut short or was edited."""
        return Plan.load(self.plan_path)

    def write_machine(self, machine: Machine) -> None:
        """What many ranks take their machine to be able to."""
        _write_text(self.machine_path, machine.model_dump_json(indent=1) + "\n")

    def machine(self) -> Machine | None:
        """The same; None where nothing that can be read is there."""
        try:
            return Machine.model_validate_json(self.machine_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    @property
    def has_plan(self) -> bool:
        """Whether many ranks train it."""
        return self.plan_path.is_file()

    def events(self) -> Iterator[Event]:
        """All that happened so far; nothing when it has not begun."""
        if self.events_path.is_file():
            yield from read_events(self.events_path)

    # --- is it alive ---

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a process trains in the directory; the system lets go of it however the process ends.

        Raises RunError when another process holds it, naming that, and when nothing can be written here.
        """
        try:
            opened = self._lock_path.open("a+", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error.strerror or error}") from None
        with opened as file:
            self._acquire(file)
            file.seek(0)
            file.truncate()
            json.dump({"process_id": os.getpid(), "host": platform.node(), "since_s": time.time()}, file)
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)  # the file stays: a lock file that is removed can be locked twice

    def _acquire(self, file: TextIO) -> None:
        for _ in range(10):
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)  # `colossus runs` holds it for an instant while it looks
            except OSError:
                return None  # a file system without locks: the file's text still says who trains here
        holder = self.holder()
        who = f"process {holder[0]} on {holder[1]}" if holder else "another process"
        raise RunError(
            f"{self.path} is in use: {who} is training in it; stop that one first, or start a new run"
        )

    def holder(self) -> tuple[int, str] | None:
        """Process id and host that the lock file names; a killed process leaves its name there."""
        try:
            record = json.loads(self._lock_path.read_text(encoding="utf-8"))
            return int(record["process_id"]), str(record["host"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _locked_since_s(self) -> float:
        try:
            return float(json.loads(self._lock_path.read_text(encoding="utf-8"))["since_s"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def is_locked(self) -> bool:
        """Whether a process trains in it right now, as far as this host can tell."""
        try:
            with self._lock_path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        holder = self.holder()
        # The locks of another host do not reach here on every file system; a log that grows does.
        elsewhere = holder is not None and holder[1] != platform.node()
        return elsewhere and time.time() - self.last_active_s() < _SILENT_FOR_S

    def state(self, events: Sequence[Event] | None = None) -> State:
        """What has become of it, by its lock and the last start or end in the log, read here if not given."""
        marks = [event for event in (self.events() if events is None else events) if _is_mark(event)]
        last = marks[-1] if marks else None
        if self.is_locked():
            # Until its first step, a process that resumes has only its predecessor's marks in the log.
            return "running" if last is not None and last.time_s >= self._locked_since_s() else "starting"
        if last is None and (self.path / ORIGIN_NAME).is_file():
            return "new"
        if not isinstance(last, RunFinished):
            return "crashed"
        return _ENDS.get(last.reason, "finished")

    def last_active_s(self) -> float:
        """When it last wrote to its log or its configuration, in seconds since 1970."""
        times = [path.stat().st_mtime for path in (self.events_path, self.config_path) if path.is_file()]
        return max(times, default=0.0)

    def num_bytes(self) -> int:
        """Its size on disk."""
        total = 0
        for path in self.path.rglob("*"):
            with contextlib.suppress(OSError):  # checkpoints come and go while a run is on
                total += path.lstat().st_size if not path.is_dir() else 0
        return total


def check_name(name: str) -> None:
    """Raises ConfigError for what cannot name a run."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(
            f"{name!r} cannot name a run; use letters, digits, '.', '_' and '-', a letter or digit first"
        )


def _is_mark(event: Event) -> bool:
    return isinstance(event, RunStarted | RunFinished)


def _last_number(runs: Path, name: str) -> int:
    pattern = re.compile(re.escape(name) + r"-(\d{3,})")
    matches = (pattern.fullmatch(path.name) for path in runs.iterdir())
    return max((int(match[1]) for match in matches if match), default=0)


def _nearest(name: str, runs: Sequence[RunDirectory]) -> str:
    if not runs:
        return " There are none yet."
    hint = did_you_mean(Path(name).name, [run.name for run in runs])
    if "Did you mean" in hint or len(runs) <= 5:
        return hint
    newest = max(runs, key=lambda run: run.last_active_s())
    return f" There are {len(runs)}, the newest of them {newest.name}; see `colossus runs`."


def _write_json(path: Path, value: object) -> None:
    _write_text(path, json.dumps(value, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Whole or not at all, so that a crash leaves no half of a configuration."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
