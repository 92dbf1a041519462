"""What is shown of a rank that failed."""

import json
import time
import traceback
from pathlib import Path

import pytest

from colossus.errors import ConfigError
from colossus.launch.failure import (
    LOG_FILE,
    how_it_ended,
    is_lost_peer,
    last_lines,
    log_failure,
    read_report,
    report_failure,
    shortened,
)


def failing(depth: int = 8) -> None:
    if depth == 0:
        json.loads("{")
    failing(depth - 1)


def test_a_traceback_keeps_ones_own_last_frames_and_where_it_was_raised() -> None:
    try:
        failing()
    except ValueError:
        lines = shortened("step 1\n" + traceback.format_exc())
    assert lines[0] == "step 1"
    files = [line for line in lines if line.startswith("  File")]
    assert [Path(line.split('"')[1]).name for line in files] == [*["test_failure.py"] * 3, "decoder.py"]
    assert '    json.loads("{")' in lines
    assert lines[-1].startswith("json.decoder.JSONDecodeError: Expecting property name")
    assert (
        "  (4 frames left out)" in lines
    )  # Python itself has folded those that repeat: one and four of ours, three of json's


def test_torchs_prefix_native_frames_and_terminal_control_go() -> None:
    log = (
        "  3 %\r 40 %\r100 %\n\x1b[31mloss\x1b[0m 3.1\r\n"
        "[rank1]: Traceback (most recent call last):\n"
        '[rank1]:   File "/home/me/train.py", line 3, in main\n[rank1]:     step()\n[rank1]:     ^^^^^^\n'
        "[rank1]: RuntimeError: bad\n"
        "Exception raised from throwNow at x.cpp:3 (most recent call first):\n"
        "frame #0: c10::Error::Error(std::string) + 0x88 (0x7f in libc10.so)\n"
    )
    assert shortened(log) == [
        "100 %",
        "loss 3.1",
        "Traceback (most recent call last):",
        '  File "/home/me/train.py", line 3, in main',
        "    step()",
        "RuntimeError: bad",
    ]


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(100_000)))
    assert last_lines(log) == [f"line {number}" for number in range(99_980, 100_000)]
    assert last_lines(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, "ended with exit code 3"),
        (137, "ended with exit code 137 (SIGKILL inside it)"),
        (-9, "was killed by SIGKILL (out of memory?"),
        (-15, "was killed by SIGTERM"),
        (-34, "was killed by S"),
    ],
)
def test_how_it_ended(code: int, words: str) -> None:
    assert how_it_ended(code).startswith(words)


def test_a_report_comes_back_and_the_first_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    report_failure(ConfigError("No."))
    report_failure(ValueError("later"))
    report = read_report(path)
    assert report is not None
    assert (report.error, report.sentence) == ("ConfigError: No.", "No.")
    assert list(tmp_path.iterdir()) == [path]


def test_torch_reads_our_reports_and_we_read_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, ProcessFailure

    ours, torchs = tmp_path / "ours", tmp_path / "torchs"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(ours))
    report_failure(ValueError("seven"))
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(ours))
    assert failure.message["message"] == "ValueError: seven"
    assert time.time() - 60 < failure.timestamp <= time.time()

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(torchs))
    ErrorHandler().record_exception(ValueError("eight"))
    report = read_report(torchs)
    assert report is not None
    assert (report.error, report.sentence) == ("ValueError: eight", None)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"message": 3}', '{"message": {}}'])
def test_a_damaged_report_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "error.json"
    path.write_text(text)
    assert read_report(path) is None
    assert read_report(tmp_path / "none") is None


def test_lost_peers() -> None:
    assert is_lost_peer(
        "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"
    )
    assert not is_lost_peer("ValueError: a peer review")


@pytest.mark.parametrize("has_log", [True, False])
def test_a_traceback_goes_into_the_log_where_there_is_one(
    has_log: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "rank.log"
    log.write_text("before it\n")
    monkeypatch.delenv(LOG_FILE, raising=False)
    if has_log:
        monkeypatch.setenv(LOG_FILE, str(log))
    try:
        raise ValueError("seven is too many")
    except ValueError as error:
        log_failure(error)
    log_failure(ConfigError("No."))
    said = log.read_text().removeprefix("before it\n") if has_log else capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last)")
    assert said.endswith("ValueError: seven is too many\nerror: No.\n")
    assert capsys.readouterr().err == ""
