"""Real processes: what ends, who is blamed, and that nothing stays behind."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from colossus.errors import ConfigError, RankFailed
from colossus.launch import guardian
from colossus.launch.environment import place
from colossus.launch.local import Ending, RankProcess, rank_processes, run_ranks

PATIENCE_S = 60.0

COMMON = """
import ctypes, json, os, signal, subprocess, sys, time
rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
folder = os.environ["TEST_FOLDER"]

def ready():
    name = os.path.join(folder, f"ready-{rank}")
    with open(name + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(name + ".new", name)

def wait_for_all():
    while sum(name.startswith("ready-") and name[-4:] != ".new" for name in os.listdir(folder)) < num_ranks:
        time.sleep(0.02)
"""
GLOO = """
import torch, torch.distributed as dist

def meet():
    dist.init_process_group("gloo")

def collective():
    x = torch.full((1000,), float(rank + 1))
    dist.all_reduce(x)
    return x[0].item()
"""


class Ranks:
    """Scripts to run as ranks, and the processes of this test, known by a mark that is not the launcher's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.mark = uuid.uuid4().hex
        self.environment = {"TEST_FOLDER": str(folder), "TEST_MARK": self.mark}

    def command(self, script: str, *, gloo: bool = False) -> list[str]:
        path = self.folder / "rank.py"
        path.write_text(COMMON + (GLOO if gloo else "") + textwrap.dedent(script))
        return [sys.executable, *([] if gloo else ["-S"]), str(path)]

    def processes(self, script: str, num_ranks: int, *, gloo: bool = False) -> tuple[RankProcess, ...]:
        command = self.command(script, gloo=gloo)
        return rank_processes(command, num_ranks, self.logs, environment=self.environment, num_threads=1)

    def run(self, script: str, num_ranks: int, *, gloo: bool = False, **graces: float) -> Ending:
        return run_ranks(self.processes(script, num_ranks, gloo=gloo), **graces)

    def fail(self, script: str, num_ranks: int, *, gloo: bool = False, **graces: float) -> RankFailed:
        with pytest.raises(RankFailed) as caught:
            self.run(script, num_ranks, gloo=gloo, **graces)
        return caught.value

    def launcher(self, script: str, num_ranks: int) -> "subprocess.Popen[str]":
        """A launcher in a process and group of its own, as a shell would start it."""
        code = f"""
        from pathlib import Path
        from colossus.launch.local import rank_processes, run_ranks
        ranks = rank_processes({self.command(script)!r}, {num_ranks}, Path({str(self.logs)!r}), num_threads=1)
        print("ending:", run_ranks(ranks, stop_grace_s=1).name)
        """
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.environment, "TMPDIR": str(self.folder)},
            start_new_session=True,
        )

    def log(self, rank: int) -> str:
        return (self.logs / f"rank-{rank:05}.log").read_text()

    def wait_until_ready(self, num_ranks: int) -> list[int]:
        """The pids of ranks that have called `ready`."""
        files = [self.folder / f"ready-{rank}" for rank in range(num_ranks)]
        until(lambda: all(file.exists() for file in files))
        return [int(file.read_text()) for file in files]

    def alive(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.environ().get("TEST_MARK") == self.mark
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
            except (psutil.Error, OSError):
                pass
        return found


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """It has ended, though whoever inherited it may not have taken it off the list."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    """Whatever a test does: at its end no process of it may be left."""
    made = Ranks(tmp_path)
    yield made
    left = made.alive()
    for process in left:
        process.kill()
    assert left == []


# --- all goes well ---


def test_every_rank_knows_its_place_and_keeps_its_log(
    ranks: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    script = """
    print(json.dumps(dict(os.environ)))
    print(f"a word of {rank}", file=sys.stderr)
    """
    assert ranks.run(script, 3) is Ending.FINISHED
    out, err = capfd.readouterr()
    told = [ranks.log(rank).splitlines() for rank in range(3)]
    seen = [json.loads(next(line for line in lines if line[0] == "{")) for lines in told]
    places = [place(environment) for environment in seen]
    assert [(p.rank, p.num_ranks, p.local_rank, p.address) for p in places if p] == [
        (rank, 3, rank, "127.0.0.1") for rank in range(3)
    ]
    assert len({p.port for p in places if p}) == 1
    assert [environment["OMP_NUM_THREADS"] for environment in seen] == ["1"] * 3
    assert all(f"a word of {rank}" in lines for rank, lines in enumerate(told))
    assert json.loads(out)["RANK"] == "0"  # rank 0's, and nothing of the others
    assert err == "a word of 0\n"


def test_rank_0_is_shown_while_it_runs(ranks: Ranks) -> None:
    process = ranks.launcher(
        """
        if rank == 0:
            print("step 1", flush=True)
        ready()
        while not os.path.exists(os.path.join(folder, "seen")):
            time.sleep(0.02)
        """,
        2,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "step 1\n"
    assert process.poll() is None
    (ranks.folder / "seen").touch()
    assert process.communicate(timeout=PATIENCE_S)[0] == "ending: FINISHED\n"


def test_output_is_passed_on_whole_and_unaltered(
    ranks: Ranks, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    script = r"""
    for number in range(300):
        sys.stdout.buffer.write(b"%d\r\xff" % number + b"x" * 1000)
    """
    ranks.run(script, 1)
    expected = b"".join(b"%d\r\xff" % number + b"x" * 1000 for number in range(300))
    assert capfdbinary.readouterr().out == expected
    assert (ranks.logs / "rank-00000.log").read_bytes() == expected


def test_output_goes_on_into_the_log_where_nobody_reads_ours_any_more(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    assert ranks.run("for number in range(20_000): print(number)", 1) is Ending.FINISHED
    assert ranks.log(0).split() == [str(number) for number in range(20_000)]


def test_ranks_meet_by_gloo(ranks: Ranks) -> None:
    ranks.run(
        "meet(); print('sum', collective(), torch.get_num_threads()); dist.destroy_process_group()",
        3,
        gloo=True,
    )
    assert [ranks.log(rank).splitlines()[-1] for rank in range(3)] == ["sum 6.0 1"] * 3


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_a_rank_runs_on_the_cores_it_was_given(ranks: Ranks) -> None:
    core = min(os.sched_getaffinity(0))
    command = tuple(ranks.command("print(os.sched_getaffinity(0))"))
    run_ranks([RankProcess(command, ranks.logs / "rank-00000.log", ranks.environment, cpus=(core,))])
    assert ranks.log(0) == f"{{{core}}}\n"


def test_handlers_of_signals_are_as_before(ranks: Ranks) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)}
    ranks.run("", 1)
    assert {number: signal.getsignal(number) for number in before} == before


def test_two_runs_in_threads(ranks: Ranks) -> None:
    endings = []
    script = "print(os.environ['MASTER_PORT'])"
    command = ranks.command(script)

    def one(number: int) -> None:
        folder = ranks.folder / str(number)
        endings.append(run_ranks(rank_processes(command, 2, folder, environment=ranks.environment)))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert endings == [Ending.FINISHED] * 2
    ports = {
        (ranks.folder / str(number) / f"rank-{rank:05}.log").read_text()
        for number in (0, 1)
        for rank in (0, 1)
    }
    assert len(ports) == 2


# --- a rank fails ---

ENDS = {
    "exception": ("raise ValueError('seven is too many')", "exit code 1", "ValueError: seven is too many"),
    "exit": ("sys.exit(7)", "exit code 7", "before it"),
    "kill": ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL (out of memory?", "before it"),
    "segfault": ("ctypes.string_at(0)", "SIGSEGV", "Segmentation fault"),
}


@pytest.mark.parametrize("end", ENDS)
def test_one_failure_ends_all_and_is_named(ranks: Ranks, end: str) -> None:
    statement, how, word = ENDS[end]
    error = ranks.fail(
        f"""
        ready(); wait_for_all()
        if rank == 2:
            print("before it", flush=True)
            {statement}
        time.sleep(1000)
        """,
        3,
    )
    assert error.ranks == (2,)
    first = str(error).splitlines()[0]
    assert first.startswith(f"Rank 2 of 3 on {os.uname().nodename} ")
    assert how in first
    assert word in str(error)
    assert str(ranks.logs / "rank-00002.log") in str(error)
    assert "ailed too" not in str(error)  # the others were only told to end


def test_a_command_that_does_not_exist(ranks: Ranks) -> None:
    with pytest.raises(RankFailed, match=r"exit code 127(.|\n)*'/no/such' cannot be started: No such file"):
        run_ranks(rank_processes(["/no/such"], 2, ranks.logs))


def test_a_rank_killed_from_outside(ranks: Ranks) -> None:
    def kill() -> None:
        os.kill(ranks.wait_until_ready(3)[1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    error = ranks.fail("ready(); time.sleep(1000)", 3)
    thread.join()
    assert error.ranks == (1,)


def test_those_that_ignore_being_told_are_killed(ranks: Ranks) -> None:
    error = ranks.fail(
        """
        signal.signal(signal.SIGTERM, lambda *_: print("not now", flush=True))
        ready(); wait_for_all()
        if rank == 1:
            sys.exit(3)
        while True:
            time.sleep(1000)
        """,
        3,
        stop_grace_s=0.5,
    )
    assert error.ranks == (1,)
    assert ranks.log(0) == ranks.log(2) == "not now\n"


def test_the_first_to_fail_is_named_not_the_one_that_broke_by_it_and_ended_sooner(ranks: Ranks) -> None:
    error = ranks.fail(
        """
        ready(); wait_for_all()
        if rank == 1:
            time.sleep(1)  # a slow end: its peers see closed connections before we see it end
            raise ValueError("the cause")
        raise RuntimeError("[gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:4711")
        """,
        3,
    )
    assert error.ranks == (1,)
    assert "ValueError: the cause" in str(error)
    assert "Failed too, after it: ranks 0, 2" in str(error)


def test_a_report_tells_who_was_first_even_while_that_one_lives(ranks: Ranks) -> None:
    root = Path(guardian.__file__).parents[2]
    error = ranks.fail(
        f"""
        sys.path.insert(0, {str(root)!r})
        from colossus.launch.failure import report_failure
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank == 1:
            try:
                raise ValueError("the cause")
            except ValueError as error:
                report_failure(error)
            ready()
            time.sleep(1000)
        ready(); wait_for_all()
        raise KeyError("what came of it")
        """,
        2,
        stop_grace_s=0.3,
    )
    assert error.ranks == (1,)
    assert "ValueError: the cause" in str(error)
    assert 'raise ValueError("the cause")' in str(error)


def test_of_our_own_errors_only_the_sentence_is_shown(ranks: Ranks) -> None:
    root = Path(guardian.__file__).parents[2]
    error = ranks.fail(
        f"""
        sys.path.insert(0, {str(root)!r})
        from colossus.errors import DataError
        from colossus.launch.failure import report_failure
        try:
            raise DataError("No text in corpus/. Give --data a folder with text.")
        except DataError as error:
            report_failure(error)
            raise
        """,
        2,
    )
    assert str(error) == "No text in corpus/. Give --data a folder with text."


MOMENTS = {
    "before meeting": ("raise ValueError('the cause')", "pass"),
    "after meeting": ("pass", "raise ValueError('the cause')"),
    "killed in a collective": ("pass", "collective(); os.kill(os.getpid(), signal.SIGKILL)"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ranks_that_wait_for_one_that_failed(ranks: Ranks, moment: str) -> None:
    before, after = MOMENTS[moment]
    error = ranks.fail(
        f"""
        signal.signal(signal.SIGTERM, lambda *_: None)  # as a trainer, which would first end its step
        if rank == 1:
            {before}
        meet()
        if rank == 1:
            {after}
        while True:
            collective()
        """,
        2,
        gloo=True,
        stop_grace_s=1.0,
    )
    assert error.ranks == (1,)
    assert ("SIGKILL" if "killed" in moment else "ValueError: the cause") in str(error)


# --- a rank does not end ---


def test_ranks_that_do_not_end_with_the_others_are_named(ranks: Ranks) -> None:
    error = ranks.fail(
        """
        print("waits", flush=True)
        if rank % 2:
            time.sleep(1000)
        """,
        4,
        end_grace_s=0.5,
    )
    assert error.ranks == (1, 3)
    assert str(error).startswith(f"Ranks 1, 3 of 4 on {os.uname().nodename} have not ended within 0.5 s")


def test_a_rank_that_waits_for_one_that_left(ranks: Ranks) -> None:
    error = ranks.fail(
        """
        ready(); wait_for_all()
        if rank == 0:
            with open(os.path.join(folder, "ready-1")) as file:
                other = int(file.read())
            while os.path.exists(f"/proc/{other}") if sys.platform == "linux" else time.sleep(2):
                time.sleep(0.02)
            raise RuntimeError("Connection closed by peer")
        """,
        2,
    )
    assert error.ranks == (0,)
    assert "Rank 1 of 2" in str(error)
    assert "did it leave too early?" in str(error)


# --- nothing is left behind ---

WITH_CHILDREN = """
subprocess.Popen(["sleep", "1000"])
subprocess.Popen(["sleep", "1000"], start_new_session=True)  # leaves the process group
ready()
"""


def test_children_of_ranks_end_with_them(ranks: Ranks) -> None:
    assert ranks.run(WITH_CHILDREN, 2) is Ending.FINISHED
    assert ranks.alive() == []


@pytest.mark.parametrize("launcher_is_killed", [False, True])
def test_a_child_without_our_environment_ends_with_its_group(ranks: Ranks, launcher_is_killed: bool) -> None:
    script = """
    child = subprocess.Popen(["/bin/sleep", "1000"], env={})
    print(child.pid, flush=True)
    ready()
    """
    if launcher_is_killed:
        launcher = ranks.launcher(textwrap.dedent(script) + "time.sleep(1000)", 1)
        ranks.wait_until_ready(1)
        until(lambda: ranks.log(0))
        launcher.kill()
        launcher.communicate(timeout=PATIENCE_S)
    else:
        ranks.run(script, 1)
    until(lambda: gone(int(ranks.log(0))))


def test_children_end_where_ranks_are_killed(ranks: Ranks) -> None:
    ranks.fail(WITH_CHILDREN + "wait_for_all(); os.kill(os.getpid(), signal.SIGKILL)", 2)
    assert ranks.alive() == []


def test_a_killed_launcher_leaves_nothing(ranks: Ranks) -> None:
    launcher = ranks.launcher(WITH_CHILDREN + "time.sleep(1000)", 3)
    pids = ranks.wait_until_ready(3)
    assert len(ranks.alive()) == 1 + 1 + 3 * 3  # launcher, guardian, ranks with two children each
    launcher.kill()
    launcher.communicate(timeout=PATIENCE_S)
    until(lambda: not ranks.alive())
    assert all(gone(pid) for pid in pids)


def test_nothing_is_left_where_the_guardian_was_killed(ranks: Ranks) -> None:
    launcher = ranks.launcher(WITH_CHILDREN + "time.sleep(1 if rank else 0)", 2)
    ranks.wait_until_ready(2)
    for process in psutil.Process(launcher.pid).children():
        if "guardian.py" in " ".join(process.cmdline()):
            process.kill()
    assert launcher.communicate(timeout=PATIENCE_S)[0] == "ending: FINISHED\n"
    assert ranks.alive() == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_ranks_end_with_the_launcher_even_where_the_guardian_was_killed_first(ranks: Ranks) -> None:
    launcher = ranks.launcher("ready(); time.sleep(1000)", 2)
    ranks.wait_until_ready(2)
    for process in psutil.Process(launcher.pid).children():
        if "guardian.py" in " ".join(process.cmdline()):
            process.kill()
    launcher.kill()
    launcher.communicate(timeout=PATIENCE_S)
    until(lambda: not ranks.alive())


# --- somebody asks for the end ---

COUNTS_REQUESTS = """
asked = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: asked.append(number))
ready()
"""


def test_the_first_request_reaches_every_rank_once(ranks: Ranks) -> None:
    launcher = ranks.launcher(
        COUNTS_REQUESTS
        + """
while not asked:
    time.sleep(0.02)
time.sleep(0.5)
print([signal.Signals(one).name for one in asked], flush=True)
""",
        3,
    )
    ranks.wait_until_ready(3)
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does: to all of the group
    assert launcher.communicate(timeout=PATIENCE_S)[0].endswith("ending: STOPPED\n")
    assert [ranks.log(rank) for rank in range(3)] == ["['SIGTERM']\n"] * 3


def test_the_second_request_ends_all_at_once(ranks: Ranks) -> None:
    launcher = ranks.launcher(
        COUNTS_REQUESTS
        + """
while not asked:
    time.sleep(0.02)
os.rename(os.path.join(folder, f"ready-{rank}"), os.path.join(folder, f"asked-{rank}"))
while True:
    time.sleep(1000)
""",
        2,
    )
    ranks.wait_until_ready(2)
    os.killpg(launcher.pid, signal.SIGINT)
    until(lambda: all((ranks.folder / f"asked-{rank}").exists() for rank in range(2)))
    assert launcher.poll() is None
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.communicate(timeout=PATIENCE_S)[0].endswith("ending: KILLED\n")


def test_a_rank_that_a_request_ends_unprepared_is_no_failure(ranks: Ranks) -> None:
    launcher = ranks.launcher(
        """
        if rank == 0:
            signal.signal(signal.SIGTERM, lambda *_: None)
        ready()
        while True:  # rank 0 waits for rank 1 in vain
            time.sleep(1000)
        """,
        2,
    )
    ranks.wait_until_ready(2)
    os.kill(launcher.pid, signal.SIGTERM)
    assert launcher.communicate(timeout=PATIENCE_S)[0].endswith("ending: STOPPED\n")


# --- in the middle of starting ---


def after_the_first_rank(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    """Something happens between the start of rank 0 and that of rank 1."""
    from torch.distributed.elastic.multiprocessing import api

    start = api.get_subprocess_handler

    def starting(**arguments: Any) -> Any:
        if arguments["local_rank_id"] == 1:
            do()
        return start(**arguments)

    monkeypatch.setattr(api, "get_subprocess_handler", starting)


def test_ranks_that_were_started_end_where_the_rest_cannot_be(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        ranks.wait_until_ready(1)
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    after_the_first_rank(monkeypatch, refuse)
    error = ranks.fail("ready(); time.sleep(1000)", 2)
    assert str(error).startswith("2 ranks cannot be started on ")
    assert ranks.alive() == []


def test_a_request_while_ranks_are_being_started(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        ranks.wait_until_ready(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    before = signal.getsignal(signal.SIGINT)
    after_the_first_rank(monkeypatch, interrupt)
    assert ranks.run("ready(); time.sleep(1000)", 2) is Ending.STOPPED
    assert ranks.alive() == []
    assert signal.getsignal(signal.SIGINT) == before


def test_a_request_just_after_ranks_were_started(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would raise for it, from wherever the launcher then is."""
    from torch.distributed.elastic import multiprocessing

    start = multiprocessing.start_processes

    def starting(*arguments: Any, **named: Any) -> Any:
        context = start(*arguments, **named)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        return context

    monkeypatch.setattr(multiprocessing, "start_processes", starting)
    assert ranks.run("ready(); time.sleep(1000)", 2) is Ending.STOPPED
    assert ranks.alive() == []


# --- what cannot be ---


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ((), "at least one rank"),
        ((RankProcess((), Path("a")),), "Rank 0 has no command"),
        ((RankProcess(("true",), Path("a"), num_threads=0),), "0 threads"),
        ((RankProcess(("true",), Path("a")),) * 2, "2 ranks write 1 logs"),
        ((RankProcess(("true",), Path("a"), cpus=(100_000,)),), "cannot run on cores"),
    ],
)
def test_contradictions(made: tuple[RankProcess, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_ranks(made)
