"""The ranks of a run as processes of this machine: started together, watched, and ended together."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from json import dumps
from pathlib import Path
from queue import Empty, SimpleQueue
from shutil import rmtree
from types import FrameType, TracebackType
from typing import Any

from colossus.errors import ConfigError, RankFailed
from colossus.launch import child, guardian
from colossus.launch.environment import Place
from colossus.launch.failure import (
    LOG_FILE,
    Reported,
    how_it_ended,
    is_lost_peer,
    last_lines,
    read_report,
    shortened,
)
from colossus.launch.stream import shown

_ADDRESS = "127.0.0.1"
_REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOPPED_CODES = {sign * number + shell for number in _REQUESTS for sign, shell in ((-1, 0), (1, 128))}

_SETTLE_S = 0.3  # after a failure, for others that failed at the same time to be seen
_SETTLE_LOST_PEER_S = 3.0  # after one that was caused by another, for that other one to end
_KILLED_S = 10.0  # for the kernel to end what was killed; longer only in uninterruptible sleep


@dataclass(frozen=True, slots=True)
class RankProcess:
    """One rank's command, and what is its own. `environment` comes on top of ours and of the rank's place."""

    argv: tuple[str, ...]
    log_path: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    num_threads: int = 1
    cpus: tuple[int, ...] | None = None
    """The cores it may run on; None: any."""


class Ending(Enum):
    """How a run ended in which no rank failed."""

    FINISHED = "every rank ended by itself"
    STOPPED = "asked by a signal, every rank ended"
    KILLED = "ended at once by a second signal"


def rank_processes(
    argv: Sequence[str],
    num_ranks: int,
    log_directory: Path,
    *,
    environment: Mapping[str, str] | None = None,
    num_threads: int | None = None,
) -> tuple[RankProcess, ...]:
    """One command for all ranks. By default they share this machine's cores evenly, at least one thread each."""
    threads = num_threads or max(1, len(_cores()) // max(1, num_ranks))
    return tuple(
        RankProcess(
            argv=tuple(argv),
            log_path=log_directory / f"rank-{rank:05}.log",
            environment=environment or {},
            num_threads=threads,
        )
        for rank in range(num_ranks)
    )


def run_ranks(
    ranks: Sequence[RankProcess], *, stop_grace_s: float = 5.0, end_grace_s: float = 30.0
) -> Ending:
    """Runs all ranks to their end; raises RankFailed for the first that fails, after all others were ended.

    Rank 0's output goes to ours too. SIGINT, SIGTERM or SIGHUP reaches every rank as one SIGTERM, a second one
    kills them. A rank that is told to end for another's failure has `stop_grace_s` before it is killed. Healthy
    ranks may take as long as they like, but once one has ended, each of the rest has `end_grace_s` after it.
    No process of the run is left when this returns, nor when the launcher is itself killed.
    """
    _check(ranks)
    for rank in ranks:
        rank.log_path.parent.mkdir(parents=True, exist_ok=True)
        rank.log_path.write_bytes(b"")
    job = _Job(ranks, stop_grace_s, end_grace_s)
    with _requests(job.events.put) as renew, ExitStack() as stack:
        watch = stack.enter_context(_Guardian())
        streams = stack.enter_context(shown(watch.folder, ranks[0].log_path))
        stack.callback(job.kill)
        store = _rendezvous()
        if not job.start(watch, streams, store.port):
            return Ending.STOPPED
        renew()
        return job.run()


def _check(ranks: Sequence[RankProcess]) -> None:
    if not ranks:
        raise ConfigError("A run has at least one rank; 0 were asked for.")
    if len({rank.log_path for rank in ranks}) < len(ranks):
        raise ConfigError(
            f"{len(ranks)} ranks write {len({r.log_path for r in ranks})} logs: each needs its own."
        )
    for number, rank in enumerate(ranks):
        if not rank.argv:
            raise ConfigError(f"Rank {number} has no command to run.")
        if rank.num_threads < 1:
            raise ConfigError(f"Rank {number} was given {rank.num_threads} threads; it needs at least 1.")
        if rank.cpus is not None and not (rank.cpus and set(rank.cpus) <= _cores()):
            raise ConfigError(
                f"Rank {number} cannot run on cores {list(rank.cpus)}: "
                f"this process may use {_spans(_cores())} of this machine."
            )


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _rendezvous() -> Any:
    """The store at which ranks meet, kept by the launcher: a port that is bound is free and stays so.

    And it outlives every rank, so that the failure of rank 0 does not look like one of the store in all others.
    """
    import torch.distributed as dist

    listener = socket.create_server((_ADDRESS, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(  # type: ignore[attr-defined]
        _ADDRESS, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


# --- signals ---


@dataclass(frozen=True, slots=True)
class _Request:
    """Somebody asked the run to end."""


@contextmanager
def _requests(put: Callable[[_Request], None]) -> Iterator[Callable[[], None]]:
    """Signals that ask for an end become events. Yields what takes them over again, after others took them.

    What is ignored stays ignored (nohup). Outside the main thread, where Python takes no signals, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    possible = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    before = {number: signal.getsignal(number) for number in possible}
    before = {number: handler for number, handler in before.items() if handler is not None}

    def note(number: int, frame: FrameType | None) -> None:
        put(_Request())

    def restore() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)

    def take() -> None:
        restore()
        for number in _REQUESTS:
            if before.get(number) != signal.SIG_IGN:
                signal.signal(number, note)

    try:
        take()
        yield take
    finally:
        restore()


@contextmanager
def _torch_takes_no_requests() -> Iterator[None]:
    """Torch's starter of processes takes over signals for good, and raises from wherever the process then is.

    Which ones is said by a variable of the environment; here, one that nobody sends.
    """
    name = "TORCHELASTIC_SIGNALS_TO_HANDLE"
    before = os.environ.get(name)
    os.environ[name] = "SIGURG"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


# --- the guardian ---


class _Guardian:
    """The process that kills what is left of the run, however the launcher ends; see guardian.py."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="colossus-launch-"))
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            # -P: the folder of the script has modules of ours, and not of the standard library's names.
            [sys.executable, "-P", guardian.__file__, self.mark, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def started(self, pid: int) -> None:
        self._tell(f"+{pid}\n")

    def ended(self, pid: int) -> None:
        self._tell(f"-{pid}\n")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with self._lock, suppress(OSError):  # somebody killed it: then we sweep ourselves
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()

    def __enter__(self) -> "_Guardian":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        if self._process.wait() != 0:
            guardian.sweep(self.mark)
            rmtree(self.folder, ignore_errors=True)


# --- the ranks ---


@dataclass(frozen=True, slots=True)
class _Ended:
    """A rank's process has ended. `code` as Popen gives it, `time_s` since 1970."""

    rank: int
    code: int
    time_s: float


class _Job:
    """The ranks while they run. One thread for each waits for its end; all else happens in the caller's."""

    def __init__(self, ranks: Sequence[RankProcess], stop_grace_s: float, end_grace_s: float) -> None:
        self._ranks = ranks
        self._stop_grace_s, self._end_grace_s = stop_grace_s, end_grace_s
        self.events: SimpleQueue[_Ended | _Request] = SimpleQueue()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._ended: dict[int, _Ended] = {}
        self._reports: dict[int, Path] = {}
        self._num_requests = 0

    def start(self, watch: _Guardian, streams: tuple[Path, Path], port: int) -> bool:
        """Starts all; False where a signal came in between."""
        # Of torch's elastic launcher this takes the part that starts processes: each in its own session, with
        # error files in the known place. Not LocalElasticAgent: its worth is to restart ranks and to gather
        # machines, and restarts are the supervisor's here, on a new layout. It looks every 0.1 s, so that of
        # several failures it cannot tell the first; it gives ranks 30 s to end; and it leaves data workers behind.
        from torch.distributed.elastic.multiprocessing import (
            DefaultLogsSpecs,
            SignalException,
            Std,
            SubprocessContext,
            start_processes,
        )

        try:
            with _torch_takes_no_requests():
                context = start_processes(
                    name="colossus",
                    entrypoint=sys.executable,
                    args={rank: self._arguments(rank, streams) for rank in range(len(self._ranks))},
                    envs={
                        rank: self._environment(rank, port, watch.mark) for rank in range(len(self._ranks))
                    },
                    logs_specs=DefaultLogsSpecs(log_dir=str(watch.folder), redirects=Std.NONE, tee=Std.NONE),
                )
        except SignalException:  # a torch that does not know the variable, in the middle of starting them
            return False
        except OSError as error:
            raise RankFailed(
                f"{len(self._ranks)} ranks cannot be started on {socket.gethostname()}: {error.strerror}. "
                f"Fewer ranks may work, or a higher limit of processes (`ulimit -u`).",
                tuple(range(len(self._ranks))),
            ) from error
        assert isinstance(context, SubprocessContext)
        self._reports = {rank: Path(path) for rank, path in context.error_files.items()}
        self._processes = {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}
        for rank, process in self._processes.items():
            watch.started(process.pid)
            threading.Thread(target=self._wait_for, args=(rank, process, watch), daemon=True).start()
        return True

    def _arguments(self, rank: int, streams: tuple[Path, Path]) -> tuple[str, ...]:
        own = self._ranks[rank]
        out, err = streams if rank == 0 else (own.log_path, own.log_path)
        settings = {"parent": os.getpid(), "stdout": str(out), "stderr": str(err), "cpus": own.cpus}
        return ("-I", "-S", child.__file__, dumps(settings), *own.argv)

    def _environment(self, rank: int, port: int, mark: str) -> dict[str, str]:
        own = self._ranks[rank]
        place = Place(rank, len(self._ranks), local_rank=rank, address=_ADDRESS, port=port)
        defaults = {
            "PYTHONUNBUFFERED": "1",  # the last lines before a kill are the ones that one wants to read
            "PYTHONFAULTHANDLER": "1",  # a crash in compiled code shows where Python was
            **_loopback(),
        }
        return {
            **{name: value for name, value in defaults.items() if name not in os.environ},
            **place.variables(),
            "LOCAL_WORLD_SIZE": str(len(self._ranks)),
            "OMP_NUM_THREADS": str(own.num_threads),
            "TORCHELASTIC_RUN_ID": mark,
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # no rank opens the port: the launcher has
            guardian.MARK: mark,
            LOG_FILE: str(own.log_path.absolute()),
            **own.environment,
        }

    def _wait_for(self, rank: int, process: "subprocess.Popen[bytes]", watch: _Guardian) -> None:
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        else:
            process.wait()
        time_s = time.time()
        # What it has started ends with it. Before its number is given back, so that it is no other group's.
        guardian.kill_group(process.pid)
        code = process.wait()
        watch.ended(process.pid)
        self.events.put(_Ended(rank, code, time_s))

    def run(self) -> Ending:
        deadline = None
        stopped = False
        while running := self._running():
            event = self._next(deadline)
            if isinstance(event, _Request):
                if self._num_requests > 1:
                    return Ending.KILLED
                self._terminate(running)
            elif event is None:
                if stopped:
                    return Ending.STOPPED
                raise self._hanging(running)
            elif not self._in_order(event):
                raise self._failed(event)
            elif event.code == 0 and not stopped:
                deadline = time.monotonic() + self._end_grace_s
            elif not stopped:
                # It took the signal before it had learnt to end in good order: the others wait for it in vain.
                stopped, deadline = True, time.monotonic() + self._stop_grace_s
        return Ending.STOPPED if self._num_requests else Ending.FINISHED

    def kill(self) -> None:
        """Ends what still runs, at once."""
        for rank in self._running():
            if self._processes[rank].returncode is None:
                guardian.kill_group(self._processes[rank].pid)
        self._gather(_KILLED_S)

    def _running(self) -> list[int]:
        return [rank for rank in self._processes if rank not in self._ended]

    def _next(self, deadline: float | None) -> _Ended | _Request | None:
        """The next event, or None at the deadline."""
        try:
            event = self.events.get(
                timeout=None if deadline is None else max(0.0, deadline - time.monotonic())
            )
        except Empty:
            return None
        if isinstance(event, _Ended):
            self._ended[event.rank] = event
        else:
            self._num_requests += 1
        return event

    def _gather(self, seconds: float) -> None:
        """Takes what happens until all have ended; not longer than this, nor once somebody presses for the end."""
        deadline = time.monotonic() + seconds
        while self._running() and (event := self._next(deadline)) is not None:
            if isinstance(event, _Request) and self._num_requests > 1:
                return

    def _terminate(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            # The rank alone: it may need its data workers for the step at hand.
            self._processes[rank].send_signal(signal.SIGTERM)

    def _in_order(self, ended: _Ended) -> bool:
        return ended.code == 0 or (self._num_requests > 0 and ended.code in _STOPPED_CODES)

    # --- what went wrong ---

    def _failed(self, seen: _Ended) -> RankFailed:
        """Ends all ranks; the error names the one that failed first, which need not be the one seen first."""
        lost_peer = is_lost_peer(self._said(seen.rank))
        self._gather(_SETTLE_LOST_PEER_S if lost_peer else _SETTLE_S)
        told_s = time.time()
        self._terminate(self._running())
        self._gather(self._stop_grace_s)
        self.kill()

        failures = self._failures(told_s)
        first = min(failures, key=lambda rank: (is_lost_peer(self._said(rank)), failures[rank]))
        return RankFailed(self._message(first, sorted(failures.keys() - {first}), told_s), (first,))

    def _failures(self, told_s: float) -> dict[int, float]:
        """When each rank failed that failed by itself: not for being told to end at `told_s`."""
        times = {}
        for rank in range(len(self._ranks)):
            ended, report = self._ended.get(rank), read_report(self._reports[rank])
            if report is not None and report.time_s <= told_s:
                times[rank] = report.time_s  # raised then; how long it took to end says nothing
            elif ended is not None and ended.time_s <= told_s and not self._in_order(ended):
                times[rank] = ended.time_s
        return times

    def _said(self, rank: int) -> str:
        """A rank's own words on its failure. A rank that was killed has none, whatever its log says of others."""
        ended = self._ended.get(rank)
        if (report := read_report(self._reports[rank])) is not None:
            return report.error
        if ended is not None and ended.code < 0 and ended.code != -signal.SIGABRT:
            return ""
        return "\n".join(last_lines(self._ranks[rank].log_path))

    def _message(self, first: int, others: Sequence[int], told_s: float) -> str:
        report = read_report(self._reports[first])
        if report is not None and report.sentence is not None:
            return report.sentence
        ended = self._ended.get(first)
        how = how_it_ended(ended.code) if ended is not None else "failed, and cannot be ended"
        parts = [f"{self._name([first])} {how}.", self._last_words(first, report)]
        left = sorted(
            x.rank
            for x in self._ended.values()
            if x.code == 0 and ended is not None and x.time_s < ended.time_s
        )
        if left and is_lost_peer(self._said(first)):
            parts.append(f"{self._name(left)} had ended before, with exit code 0: did it leave too early?")
        if others:
            whose = "its log is" if len(others) == 1 else "their logs are"
            parts.append(f"Failed too, after it: {_numbers(others)}; {whose} beside it.")
        return "\n".join(parts)

    def _last_words(self, rank: int, report: Reported | None) -> str:
        log_path = self._ranks[rank].log_path
        lines = shortened(report.stack or report.error) if report is not None else last_lines(log_path)
        if not lines:
            return f"Its log is empty: {log_path}"
        return "\n".join((f"The end of its log, {log_path}:", *(f"    {line}" for line in lines)))

    def _hanging(self, ranks: Sequence[int]) -> RankFailed:
        one = len(ranks) == 1
        self.kill()
        parts = [
            f"{self._name(ranks)} {'has' if one else 'have'} not ended within {self._end_grace_s:g} s after the "
            f"others had, and {'was' if one else 'were'} killed: {'it waits' if one else 'they wait'} for a rank that "
            f"has left, or for a thread or process of {'its' if one else 'their'} own.",
            self._last_words(ranks[0], None),
        ]
        return RankFailed("\n".join(parts), tuple(ranks))

    def _name(self, ranks: Sequence[int]) -> str:
        named = _numbers(ranks)
        return f"{named[0].upper()}{named[1:]} of {len(self._ranks)} on {socket.gethostname()}"


def _numbers(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_spans(ranks)}"


def _spans(numbers: Iterable[int]) -> str:
    """`0-3, 7`"""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _loopback() -> dict[str, str]:
    """Gloo over this machine's own interface: a host name that leads elsewhere (VPN, laptop) must not matter."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {"GLOO_SOCKET_IFNAME": names[0]} if names else {}
