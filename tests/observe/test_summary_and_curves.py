"""What a run came to: figures and a picture."""

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
from rich.console import Console

from colossus.errors import ConfigError, RunError
from colossus.observe.curves import write_curves
from colossus.observe.summary import Summary, summary_table
from colossus.observe.tensorboard import TensorBoard
from tests.observe.logs import started, step_done, whole_run

SUMMARY = Summary(
    run_dir="runs/a-001",
    steps=1000,
    tokens=256_000,
    num_params=1_000_000,
    wall_s=110.0,
    cpu_s=200.0,
    tokens_per_s=2560.0,
    mfu=0.3,
    train_loss=3.0,
    heldout_bits_per_byte=1.62,
    peak_rss_bytes=2**30,
    predicted_memory_bytes=2**30,
    preparation_cpu_s=3.0,
    compile_s=0.0,
    evaluation_cpu_s=1.0,
)


def test_a_summary_survives_its_file(tmp_path: Path) -> None:
    SUMMARY.write(tmp_path / "summary.json")
    assert Summary.read(tmp_path / "summary.json") == SUMMARY


def test_json_has_the_promised_fields_and_no_nan() -> None:
    record = json.loads(dataclasses.replace(SUMMARY, train_loss=math.nan).to_json())
    assert record["train_loss"] is None
    promised = (
        "run_dir steps tokens wall_s cpu_s tokens_per_s mfu train_loss heldout_bits_per_byte peak_rss_bytes"
    )
    assert set(promised.split()) <= set(record)


def test_a_missing_or_broken_summary_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot read summary"):
        Summary.read(tmp_path / "summary.json")
    (tmp_path / "summary.json").write_text('{"steps": 3}')
    with pytest.raises(RunError, match="not a summary"):
        Summary.read(tmp_path / "summary.json")


def test_the_table_leaves_out_what_was_not_measured() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(summary_table(dataclasses.replace(SUMMARY, heldout_bits_per_byte=None)))
    text = console.export_text()
    assert "held-out" not in text
    assert "256k tokens" in text
    assert "predicted 1.00 GiB (+0%)" in text


@pytest.mark.parametrize("events", [[], [started()], [started(), step_done(0)], list(whole_run())])
def test_curves_are_drawn_from_any_log(events: list[object], tmp_path: Path) -> None:
    write_curves(events, tmp_path / "curves.png", "a-001")  # type: ignore[arg-type]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_tensorboard_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(ConfigError, match=r"pip install 'colossus-llm\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_tensorboard_gets_its_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    observer = TensorBoard(tmp_path)
    for event in whole_run(20):
        observer(event)
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    read = reader.EventAccumulator(str(tmp_path))
    read.Reload()
    assert "train/loss" in read.Tags()["scalars"] or "train/loss" in read.Tags()["tensors"]
