"""A run changes its layout again and again on its way, and stays the run that one process trains."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from colossus.checkpoint import load_newest, save
from colossus.events import CheckpointSaved, RunStarted
from colossus.observe.history import history
from colossus.observe.run_directory import RunDirectory
from colossus.spec.job import Share
from colossus.spec.model import ModelSpec
from tests.stories.processes import colossus, events, same_course
from tests.stories.rank_runs import Ranks
from tests.stories.test_out_and_in import GROK, LLAMA

NUM_STEPS = 16
SETTINGS = (
    f"budget={NUM_STEPS} steps",
    "checkpoints.every=1000 steps",
    "evaluation.every=1000 steps",
    "fixed.dtype=float32",
)
WHOLE_BATCH = (Share(num_micro_batches=4),)
UNEQUAL = (Share(num_micro_batches=3), Share(num_micro_batches=1, recompute="full"))

STOP_AFTER = """
from colossus.trainer import loop, ranks

accumulate = ranks.OneOfMany.accumulate

def stopping(self, step):
    if rank == 0 and step == {last}:
        os.kill(os.getpid(), signal.SIGTERM)  # it ends this step, saves and leaves
    return accumulate(self, step)

ranks.OneOfMany.accumulate = stopping
"""
COMPARES = """
from colossus.trainer import ranks as trainer_ranks

load = trainer_ranks.RankState.load

def compared(self, tensors, facts):
    from colossus.checkpoint import load_newest

    load(self, tensors, facts)
    whole = load_newest(sys.argv[1] + "/checkpoints")[0].tensors
    mine = self.tensors()
    assert mine
    for name, one in mine.items():
        here = tuple(slice(o, o + n) for o, n in zip(one.offsets, one.tensor.shape))
        assert tuple(one.global_shape) == tuple(whole[name].shape), name
        assert one.tensor.equal(whole[name][here]), name
    print(f"{len(mine)} tensors are the checkpoint's", file=sys.stderr, flush=True)

trainer_ranks.RankState.load = compared
"""


def losses(run: RunDirectory) -> list[float]:
    return [step.loss for step in history(run.events()).steps]


def first_steps(run: RunDirectory) -> list[int]:
    """Of each process that trained it, the step that it began with."""
    return [event.first_step for event in events(run) if isinstance(event, RunStarted)]


def saved_steps(run: RunDirectory) -> list[int]:
    return [event.step for event in events(run) if isinstance(event, CheckpointSaved)]


def stop_after(steps: int) -> str:
    return STOP_AFTER.format(last=steps - 1)


CHAINS: dict[str, tuple[ModelSpec, list[dict[str, Any]]]] = {
    "dense": (
        LLAMA,
        [
            {"shard": 2, "sharding": "weights"},
            {"tp": 2, "shares": WHOLE_BATCH},
            {"replica": 2, "shares": UNEQUAL},
            {"pp": 2, "schedule": "zb-h1"},
        ],
    ),
    "mixture": (
        GROK,
        [
            {"shard": 2, "ep": 2},
            {"pp": 2, "stage_layers": (1, 1)},
            {"tp": 2, "ep": 2, "shares": WHOLE_BATCH},
            {"replica": 2},
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHAINS)
def test_each_part_of_a_run_under_another_layout(kind: str, tmp_path: Path) -> None:
    """Losses are those of one process, which knows of no layouts, to float32's rounding."""
    model, layouts = CHAINS[kind]
    ranks = Ranks(tmp_path, SETTINGS, model)
    colossus(*ranks.new("alone", None))
    alone, run = ranks.run("alone"), ranks.run("chain")
    plans = [ranks.plan(f"plan-{number}", **layout) for number, layout in enumerate(layouts)]
    stops = [4, 8, 12]
    ranks.colossus(*ranks.new("chain", plans[0]), in_ranks=stop_after(stops[0]), status=130)
    for plan, stop in zip(plans[1:], [*stops[1:], None], strict=True):
        code, status = (COMPARES, 0) if stop is None else (COMPARES + stop_after(stop), 130)
        ranks.colossus("train", "--resume", str(run.path), "--plan", plan, in_ranks=code, status=status)
        logs = [(run.path / "logs" / f"rank-{rank:05}.log").read_text() for rank in range(2)]
        assert "tensors are the checkpoint's" in logs[0]
    assert first_steps(run) == [0, *stops]
    assert len(losses(run)) == NUM_STEPS
    assert losses(run) == pytest.approx(losses(alone), rel=2e-5)
    _leaves_as_if_one_process_had_written_it(run, tmp_path)


def _leaves_as_if_one_process_had_written_it(run: RunDirectory, folder: Path) -> None:
    """Of the parts that ranks wrote an export and a text are made that equal those of a whole checkpoint."""
    whole = RunDirectory(run.path.with_name("whole-001"))
    shutil.copytree(run.path, whole.path)
    loaded, _ = load_newest(run.checkpoints_path)
    shutil.rmtree(whole.checkpoints_path)
    save(whole.checkpoints_path, loaded.step, loaded.tensors, loaded.facts, model=run.config().model)
    for one in (run, whole):
        colossus("export", str(one.path), str(folder / f"{one.name}-out"))
    files = [
        {p.name: p.read_bytes() for p in (folder / f"{one.name}-out").iterdir() if p.suffix == ".safetensors"}
        for one in (run, whole)
    ]
    assert files[0]
    assert files[0] == files[1]
    texts = [
        colossus("generate", str(one.path), "--prompt", "document 7", "--seed", "3", "--max-tokens", "8").out
        for one in (run, whole)
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_from_one_process_to_many_and_back(tmp_path: Path) -> None:
    """Back is a plan of one rank: how many processes train a run is a matter of its plan."""
    ranks = Ranks(tmp_path, SETTINGS, LLAMA)
    colossus(*ranks.new("alone", None))
    colossus(*ranks.new("moves", None), before=stop_one_process_after_4, status=130)
    alone, run = ranks.run("alone"), ranks.run("moves")
    many = ranks.plan("many", shard=2, sharding="optimizer")
    one = ranks.plan("one", shares=WHOLE_BATCH)
    ranks.colossus(
        "train", "--resume", str(run.path), "--plan", many, in_ranks=COMPARES + stop_after(8), status=130
    )
    ranks.colossus("train", "--resume", str(run.path), "--plan", one, in_ranks=COMPARES)
    assert first_steps(run) == [0, 4, 8]
    assert losses(run)[:4] == losses(alone)[:4]
    assert losses(run) == pytest.approx(losses(alone), rel=2e-5)


def stop_one_process_after_4() -> None:
    import os
    import signal

    from colossus.trainer import execute

    read = execute.OneProcess.accumulate

    def stopping(self: execute.OneProcess, step: int) -> object:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, step)

    execute.OneProcess.accumulate = stopping  # type: ignore[method-assign, assignment]


@pytest.mark.slow
def test_another_precision(tmp_path: Path) -> None:
    """The weights that it goes on with are the same; losses then differ by what bfloat16 rounds."""
    ranks = Ranks(tmp_path, SETTINGS, LLAMA)
    plans = [ranks.plan(precision, pp=2, precision=precision) for precision in ("float32", "bfloat16")]
    for name in ("float32", "bfloat16"):
        ranks.colossus(*ranks.new(name, plans[0]), in_ranks=stop_after(8), status=130)
    ranks.colossus("train", "--resume", str(ranks.run("float32").path))
    ranks.colossus(
        "train", "--resume", str(ranks.run("bfloat16").path), "--plan", plans[1], in_ranks=COMPARES
    )
    exact, rounded = losses(ranks.run("float32")), losses(ranks.run("bfloat16"))
    assert rounded[:8] == exact[:8]
    assert rounded[8:] != exact[8:]
    assert rounded == pytest.approx(exact, rel=2**-8)


@pytest.mark.slow
def test_the_same_layout_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, (*SETTINGS, "checkpoints.every=8 steps"), LLAMA)
    plan = ranks.plan(replica=2, shares=UNEQUAL)
    ranks.colossus(*ranks.new("whole", plan))
    ranks.colossus(*ranks.new("halves", plan), in_ranks=stop_after(7), status=130)
    ranks.colossus("train", "--resume", str(ranks.run("halves").path), in_ranks=COMPARES)
    assert first_steps(ranks.run("halves")) == [0, 7]
    assert saved_steps(ranks.run("whole")) == [8, 16]  # and the last one not twice
    assert saved_steps(ranks.run("halves")) == [7, 8, 16]
    same_course(ranks.run("whole"), ranks.run("halves"))
