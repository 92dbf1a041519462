"""`colossus fleet` as people use it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from colossus.cli import main
from colossus.hardware import chips, fleets


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["colossus", "fleet", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def modules_after(*arguments: str) -> tuple[str, str]:
    """What a command prints in a fresh process, and which heavy modules it has imported."""
    script = (
        f"import sys; sys.argv = ['colossus', 'fleet', *{arguments!r}]\n"
        "from colossus.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'numpy', 'rich', 'pydantic', 'psutil') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr.strip()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list", "--help"], ["show", "--help"], ["chips", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    out, heavy = modules_after(*arguments)
    assert "Usage: " in out
    assert heavy == "[]"


def test_listing_imports_no_torch() -> None:
    out, heavy = modules_after("list")
    assert "colossus-200k" in out
    assert "torch" not in heavy


def test_list_shows_every_fleet_with_its_totals(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    status, out, _ = run(monkeypatch, capsys, "list")
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert set(fleets()) <= set(lines)
    for part in ("150,000 h100-sxm + 50,000 h200", "197.9 EFLOP/s", "255 MW", "spectrum-x-400g", "memphis"):
        assert part in lines["colossus-200k"]


def test_list_as_json(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    status, out, err = run(monkeypatch, capsys, "list", "--json")
    assert (status, err) == (0, "")
    listed = {item["name"]: item for item in json.loads(out)["fleets"]}
    assert set(listed) == set(fleets())
    assert listed["colossus-200k"]["num_chips"] == 200_000
    assert [pool["num_chips"] for pool in listed["colossus-200k"]["pools"]] == [150_000, 50_000]
    assert listed["colossus-100k"]["bfloat16_peak_flops"] == pytest.approx(9.894e19)


def test_show_prints_sources_and_notes(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    status, out, _ = run(monkeypatch, capsys, "show", "colossus-200k")
    assert status == 0
    text = " ".join(out.split())
    for part in ("200,000 chips in 25,000 nodes", "Epoch AI Frontier Data Centers", "79.18 GiB", "139.80 GiB",
                 "core: 524,288 chips", "2024-09-02: 181 MW", "1.3 (1.21 to 1.35)", "ServeTheHome"):  # fmt: skip
        assert part in text


def test_show_as_json_is_the_whole_fleet(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    _, out, err = run(monkeypatch, capsys, "show", "h100:4096", "--json")
    shown = json.loads(out)
    assert err == ""
    assert shown["num_chips"] == 4096
    assert shown["fleet"]["pools"][0]["node"]["chip"]["peak_flops"]["fp8"] == 1978.9e12
    assert shown["fleet"]["fabric"]["name"] == "infiniband-ndr-3-tier"
    assert "us-average" in shown["fleet"]["note"]


def test_show_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "[bold]mine"\n[[pool]]\nnode = "gb200-nvl72"\ncount = 4\n')
    status, out, _ = run(monkeypatch, capsys, "show", str(path))
    assert status == 0
    assert "[bold]mine: 288 chips in 4 nodes" in out


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("h1000:8", "Did you mean 'h100'"),
        ("h100:12", "h100:16"),
        ("h100:600000", "at most 524,288"),
        ("", "no fleet"),
    ],
)
def test_errors_are_one_line_without_a_traceback(
    text: str, part: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    status, out, err = run(monkeypatch, capsys, "show", text)
    assert (status, out) == (2, "")
    assert part in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_chips_with_sources(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    _, out, _ = run(monkeypatch, capsys, "chips")
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert set(chips()) <= set(lines)
    for part in ("989.4", "1,978.9", "79.2", "3.35", "700", "ml-engineering"):
        assert part in lines["h100-sxm"]
    assert "13,500" in lines["b300"]
    assert "h100 is h100-sxm" in out


def test_chips_as_json(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    _, out, _ = run(monkeypatch, capsys, "chips", "--json")
    listed = {item["name"]: item for item in json.loads(out)["chips"]}
    assert set(listed) == set(chips())
    assert all(item["source"] for item in listed.values())
