"""The command line as people use it: in fresh processes, and with a trainer that only pretends."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colossus.cli import main, printable
from colossus.cli.options import split_weight
from colossus.events import RunFinished
from colossus.spec.config import from_toml, to_toml
from colossus.spec.run import AdamW, RunConfig
from tests.helpers import tiny
from tests.observe.logs import whole_run
from tests.observe.test_run_directory import finish, new_run, trainer
from tests.observe.test_summary_and_curves import SUMMARY
from tests.parallel.plans import plan_of
from tests.spec.configs import small_config

HEAVY = ("torch", "matplotlib", "tokenizers", "pyarrow", "numpy", "rich", "safetensors", "psutil")
# Typer itself imports pydantic to convert the options that `colossus runs` has ahead of `show`.
HEAVY_BUT_FOR_RUNS = (*HEAVY, "pydantic")


def colossus(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """In a process of its own, from the source that is tested."""
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", "colossus.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": root},
        timeout=120,
    )


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(to_toml(small_config()))
    return str(path)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["colossus", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


# --- help ---


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["generate", "--help"], ["runs", "--help"], ["runs", "show", "--help"],
     ["recipes", "--help"], ["data", "--help"], ["data", "prepare", "--help"], ["data", "show", "--help"]],
    ids=" ".join,
)  # fmt: skip
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = HEAVY if arguments[0] == "runs" else HEAVY_BUT_FOR_RUNS
    script = (
        f"import sys; sys.argv = ['colossus', *{arguments!r}]\n"
        "from colossus.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Usage: " in done.stdout


@pytest.mark.parametrize("command", ["train", "generate", "runs"])
def test_help_has_examples(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run_main(monkeypatch, command, "--help") == 0
    assert f"Examples:\n    colossus {command}" in capsys.readouterr().out


# --- train: what it asks for ---


def test_print_config_is_toml_and_plans_nothing(recipe: str) -> None:
    done = colossus(
        "train", recipe, "--print-config", "--steps", "7", "--seed", "3", "--data", "a b=2", "--data", "c"
    )
    config = from_toml(done.stdout)
    assert (config.budget.amount, config.seed, config.plan) == (7, 3, None)
    assert [(s.path, s.weight) for s in config.data.sources] == [("a b", 2.0), ("c", 1.0)]


def test_print_config_imports_no_torch(recipe: str) -> None:
    script = (
        f"import sys; sys.argv = ['colossus', 'train', {recipe!r}, '--print-config']\n"
        "from colossus.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_a_learned_tokenizers_size_is_the_models_too(recipe: str) -> None:
    config = from_toml(colossus("train", recipe, "--print-config", "--vocab-size", "300").stdout)
    assert (config.model.vocab_size, config.data.tokenizer.kind) == (300, "bpe")


@pytest.mark.parametrize(
    ("interval_s", "asked", "every"),
    [
        (44.6, (), "45 seconds"),
        (7200.0, (), "30 minutes"),
        (44.6, ("--set", "checkpoints.every=9 steps"), "9 steps"),
    ],
)
def test_a_plan_says_how_often_its_run_is_saved(
    interval_s: float, asked: tuple[str, ...], every: str, tmp_path: Path
) -> None:
    plan = plan_of(tiny(vocab_size=300, context_tokens=64), tokens=10**4)
    estimate = plan.estimate.model_copy(update={"checkpoint_interval_s": interval_s})
    (tmp_path / "plan.json").write_text(plan.model_copy(update={"estimate": estimate}).to_json())
    done = colossus("train", "--plan", str(tmp_path / "plan.json"), "--print-config", *asked)
    config = from_toml(done.stdout)
    assert str(config.checkpoints.every) == every
    assert config.optimizer == AdamW()


def test_a_path_with_an_equals_sign_is_a_path_where_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_weight("year=2024") == ("year", 2024.0)
    (tmp_path / "year=2024").mkdir()
    assert split_weight("year=2024") == ("year=2024", None)
    assert split_weight("year=2024=3") == ("year=2024", 3.0)
    assert split_weight("a=b") == ("a=b", None)
    assert split_weight("*.txt") == ("*.txt", None)


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["train", "--steps", "3", "--minutes", "2"], 2, "--steps 3 and --minutes 2 contradict each other"),
        (["train", "--steps", "0"], 2, "--steps is 0; it must be above 0"),
        (["train", "--tokens", "lots"], 2, "--tokens: 'lots' is not a number; write for example 2000"),
        (["train", "--tokenizer", "t.json", "--vocab-size", "300"], 2, "--tokenizer and --vocab-size"),
        (["train", "--text-field", "t"], 2, "--text-field says where the text is in --data; give --data too"),
        (["train", "SMALL", "--set", "sede=3"], 2, "unknown key 'sede'. Did you mean 'seed'?"),
        (["train", "SMALL", "--set", "seed"], 2, "'seed' is not a setting; write key=value"),
        (["train", "SMALL", "--name", "a b"], 2, "'a b' cannot name a run"),
        (["train", "none.toml"], 2, "cannot read configuration none.toml: No such file or directory"),
        (["train", "--resume", "nowhere"], 1, "no run 'nowhere' in runs. There are none yet."),
        (["runs", "show", "nowhere"], 1, "no run 'nowhere' in runs"),
        (["generate", "nowhere"], 1, "no run 'nowhere' in runs"),
        (["data", "show", "nowhere"], 1, "no corpus in 'nowhere'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_a_mistake_is_one_sentence_without_a_traceback(
    arguments: list[str],
    status: int,
    sentence: str,
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [recipe if argument == "SMALL" else argument for argument in arguments]
    assert run_main(monkeypatch, *arguments) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_wrong_option_has_status_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(monkeypatch, "train", "--stpes", "3") == 2


def test_resume_takes_no_other_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = new_run(tmp_path)
    assert run_main(monkeypatch, "train", "--resume", "a-001", "--runs", str(tmp_path), "--seed", "3") == 2
    assert (
        f"takes no seed=3, only another budget; to start a new run like it: colossus train {run.config_path}"
        in capsys.readouterr().err
    )


# --- train: what it does ---


class Trainer:
    """Pretends: emits a run's events and returns its summary."""

    def __init__(self, run: Path, reason: str = "budget", error: BaseException | None = None) -> None:
        self.run, self.reason, self.error = run, reason, error
        self.config: RunConfig | None = None
        self.asked: dict[str, Any] = {}

    def start(self, config: RunConfig, **asked: Any) -> Any:
        self.config, self.asked = config, asked
        if self.error is not None:
            raise self.error
        os.write(1, b"a compiler's chatter\n")
        print("a library's chatter")
        for event in whole_run(50):
            if not isinstance(event, RunFinished):
                for observer in asked["observers"]:
                    observer(event)
        for observer in asked["observers"]:
            observer(RunFinished(step=50, reason=self.reason))
        import dataclasses

        return dataclasses.replace(SUMMARY, run_dir=str(self.run))

    def resume(self, run: Any, **asked: Any) -> Any:
        return self.start(run.config(), **asked)


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    trainer_module = pytest.importorskip("colossus.trainer")
    made = Trainer(tmp_path)
    (tmp_path / "sample.txt").write_text("it writes this")
    fake = SimpleNamespace(start=made.start, resume=made.resume)
    monkeypatch.setitem(sys.modules, "colossus.trainer.run", fake)
    monkeypatch.setattr(trainer_module, "run", fake, raising=False)
    return made


def test_train_hands_over_what_was_asked(
    pretend: Trainer, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    arguments = ["train", recipe, "--threads", "3", "--name", "x", "--runs", str(tmp_path), "--steps", "9"]
    assert run_main(monkeypatch, *arguments) == 0
    assert pretend.config == small_config(budget=pretend.config.budget if pretend.config else None)
    assert (pretend.asked["threads"], pretend.asked["name"], pretend.asked["runs_directory"]) == (
        3,
        "x",
        tmp_path,
    )
    out = capfd.readouterr().out
    assert "held-out after" not in out or "bits per byte" in out
    assert "1.6200  bits per byte" in out
    assert "it writes this" in out


def test_json_is_all_of_stdout(
    pretend: Trainer, recipe: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    assert run_main(monkeypatch, "train", recipe, "--json") == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["heldout_bits_per_byte"] == 1.62
    assert captured.out.count("\n") == 1
    for said in ("a compiler's chatter", "a library's chatter", "finished: the budget is used up"):
        assert said in captured.err


def test_the_sample_can_be_left_out(
    pretend: Trainer, recipe: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    assert run_main(monkeypatch, "train", recipe, "--no-sample") == 0
    assert "it writes this" not in capfd.readouterr().out


def test_an_interrupted_run_says_how_to_go_on(
    pretend: Trainer, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    pretend.reason = "interrupted"
    assert run_main(monkeypatch, "train", recipe) == 130
    assert f"colossus train --resume {tmp_path}" in capfd.readouterr().out


def test_an_interrupt_before_training_has_status_130(
    pretend: Trainer, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend.error = KeyboardInterrupt()
    assert run_main(monkeypatch, "train", recipe) == 130


def test_a_bug_keeps_its_traceback(pretend: Trainer, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend.error = ZeroDivisionError()
    monkeypatch.setattr(sys, "argv", ["colossus", "train", recipe])
    with pytest.raises(ZeroDivisionError):
        main()


def test_resume_hands_over_the_run(
    pretend: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    new_run(tmp_path)
    assert run_main(monkeypatch, "train", "--resume", "a-001", "--runs", str(tmp_path)) == 0
    assert pretend.config == small_config()


# --- runs ---


def test_runs_lists_each_with_its_state(tmp_path: Path) -> None:
    finish(new_run(tmp_path, "done"), "budget")
    killed = new_run(tmp_path, "killed")
    process = trainer(killed)
    try:
        states = {
            row["name"]: row["state"]
            for row in json.loads(colossus("runs", "--runs", str(tmp_path), "--json").stdout)["runs"]
        }
        assert states == {"done-001": "finished", "killed-001": "running"}
    finally:
        process.kill()
        process.wait()
    table = colossus("runs", "--runs", str(tmp_path)).stdout
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["done-001", "killed-001"]
    assert "crashed" in table


def test_no_runs_say_how_to_start_one(tmp_path: Path) -> None:
    assert "Start one: colossus train" in colossus("runs", cwd=tmp_path).stdout


def test_show_tells_what_to_do_next(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with run.events_path.open("w") as file:
        for event in list(whole_run(400))[:-1]:
            file.write(event.to_json() + "\n")
    shown = colossus("runs", "--runs", str(tmp_path), "show", "latest", "--curves").stdout
    for said in ("a-001  crashed", "400 steps", "dtype", "it is faster here", "step 301 skipped", "--resume"):
        assert said in shown
    assert run.curves_path.is_file()


def test_recipes_are_listed_with_what_they_say(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def small() -> RunConfig:
        """A small one.

        Not shown.
        """
        return small_config()

    monkeypatch.setitem(sys.modules, "recipes", SimpleNamespace(RECIPES={"small": small}))
    assert run_main(monkeypatch, "recipes") == 0
    assert capsys.readouterr().out == "small  A small one.\n"


def test_what_steers_a_terminal_is_shown_and_not_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printable("a\x1b[31mb\nü\ud800\u202e") == "a\\x1b[31mb\nü\\ud800\\u202e"
    assert run_main(monkeypatch, "generate", "x" * 5000, "--prompt", "a") == 2
    assert "File name too long" in capsys.readouterr().err


def test_a_number_of_thousands_of_digits_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run_main(monkeypatch, "train", "--set", f"routing.balance_loss={'9' * 5000}", "--print-config") == 2
    )
    assert capsys.readouterr().err.startswith("error: routing.balance_loss is ")
