"""Progress as lines."""

import io

from rich.console import Console

from colossus.observe.lines import Lines
from colossus.observe.terminal import TerminalView
from tests.observe.logs import started, step_done, whole_run
from tests.spec.configs import small_config


def lines_of(events: object) -> list[str]:
    written: list[str] = []
    observer = Lines(small_config(), written.append)
    for event in events:  # type: ignore[attr-defined]
        observer(event)
    return written


def test_steps_have_a_line_every_two_seconds_then_every_ten() -> None:
    steps = [line for line in lines_of(whole_run()) if "% step" in line]
    # 100 s of run: the first at once, 10 in the first 20 s, then 8, and the last one at the end.
    assert 18 <= len(steps) <= 20


def test_step_lines_are_aligned() -> None:
    steps = [line for line in lines_of(whole_run()) if "% step" in line]
    for column in ("loss", "bits/byte", "MFU", "left"):
        assert len({line.index(column) for line in steps}) == 1, column


def test_what_is_rare_has_its_own_line_at_once() -> None:
    text = "\n".join(lines_of(whole_run()))
    assert "dtype: bfloat16. it is faster here" in text
    assert "starting: 1M parameters, process 7 on h" in text
    assert "held-out after 100 steps: 2.7191 bits per byte" in text
    assert "checkpoint after 250 steps: 1.00 MiB" in text
    assert "warning: step 301 skipped: its loss was not finite (samples 1204 to 1207; 1 in a row)" in text
    assert "warning: checkpoint at step 501 not written: the disk is full" in text
    assert text.endswith("finished: the budget is used up, after 1,000 steps")


def test_figures_are_right() -> None:
    last = [line for line in lines_of(whole_run()) if "% step" in line][-1]
    assert last.startswith("100% step   1,000")
    for figure in ("1:40", "loss  3.000", "lr 2.0e-02", "2.56k tok/s", "MFU  30%", "1.00 GiB", "0.0 s left"):
        assert figure in last


def test_a_resumed_run_says_so() -> None:
    assert lines_of([started(first_step=60), step_done(60)])[0].startswith("resuming at step 60")


def test_the_live_view_shows_the_same_figures_and_leaves_the_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, height=40, color_system=None)
    with TerminalView(small_config(), "small-001", console) as view:
        for event in whole_run():
            view(event)
    text = out.getvalue()
    for figure in (
        "small-001",
        "dtype bfloat16",
        "100%",
        "3.000 nats",
        "2.56k tok/s",
        "30%",
        "step 301 skipped",
    ):
        assert figure in text
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_the_live_view_is_closed_by_an_exception() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, height=40, color_system=None)
    try:
        with TerminalView(small_config(), "small-001", console) as view:
            view(started())
            raise RuntimeError
    except RuntimeError:
        pass
    assert "first step" in out.getvalue()
    assert out.getvalue().endswith("\x1b[?25h")
