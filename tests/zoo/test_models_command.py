"""`colossus models`."""

import json
import subprocess
import sys
from pathlib import Path

from colossus import zoo


def colossus(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """The command, where torch cannot be imported."""
    script = "import sys; sys.modules['torch'] = None; from colossus.cli import main; main()"
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)


def test_the_list_has_every_model_with_its_figures() -> None:
    rows = json.loads(colossus("models", "--json").stdout)
    assert [row["name"] for row in rows] == list(zoo.names())
    grok = next(row for row in rows if row["name"] == "grok-1")
    assert grok == {
        "name": "grok-1",
        "family": "Grok",
        "num_params": 315_684_820_992,
        "num_active_params": 83_756_587_008,
        "layers": 64,
        "hidden": 6144,
        "context": 8192,
        "flops_per_token": zoo.find("grok-1").flops_per_token(8192),
        "source": zoo.source("grok-1"),
    }


def test_the_table_is_not_cut_off() -> None:
    table = colossus("models").stdout
    row = next(line for line in table.splitlines() if line.startswith("llama3.1-405b"))
    assert row.split()[1:8] == ["Llama", "406B", "406B", "126", "16,384", "131,072", "4.05e+12"]
    assert "…" not in table


def test_one_model_in_detail() -> None:
    shown = colossus("models", "show", "Grok 2").stdout
    for part in ("269,515,497,472", "2 of 8 experts of 16,384 geglu, beside a shared 32,768", "64 × 8,192"):
        assert part in shown


def test_what_show_writes_can_be_named_in_place_of_a_model(tmp_path: Path) -> None:
    written = colossus("models", "show", "deepseek-v3", "--json").stdout
    path = tmp_path / "mine.json"
    path.write_text(written.replace('"deepseek-v3"', '"mine"'))
    assert zoo.load(path) == zoo.find("deepseek-v3").model_copy(update={"name": "mine"})
    again = json.loads(colossus("models", "show", str(path), "--json").stdout)
    assert (again["name"], again["source"], again["num_params"]) == ("mine", str(path), 671_026_419_200)


def test_an_unknown_model_is_a_sentence() -> None:
    done = colossus("models", "show", "grok-9")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no model 'grok-9' in the zoo. Nearest: grok-")
    assert "Traceback" not in done.stderr
