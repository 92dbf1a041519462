"""A model leaves for a Hugging Face directory, comes back, and is trained on as if it had never left."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from colossus.checkpoint import load_newest
from colossus.checkpoint.hugging_face import export_run, import_run, open_directory
from colossus.checkpoint.new_run import run_from_weights
from colossus.observe.run_directory import RunDirectory
from colossus.spec.data import DataConfig, Source, TrainedTokenizer
from colossus.spec.duration import Duration
from colossus.spec.model import ModelSpec, MoeSpec, NormSpec, RouterSpec, SharedMlpSpec
from colossus.spec.run import AdamW, Batch, RunConfig
from colossus.trainer.run import resume, start
from tests.stories.processes import PLAIN, write_corpus

LLAMA = PLAIN.model_copy(update={"zero_init_outputs": False, "num_layers": 2})
GROK = LLAMA.model_copy(
    update={
        "attention": LLAMA.attention.model_copy(update={"score_soft_cap": 30.0}),
        "mlp": MoeSpec(
            num_experts=4,
            top_k=2,
            intermediate_size=32,
            activation="geglu",
            shared=SharedMlpSpec(intermediate_size=64, sum_multiplier=2**-0.5),
            router=RouterSpec(renormalized=False, soft_cap=30.0),
        ),
        "norm": NormSpec(epsilon=1e-5),
        "norm_placement": "sandwich",
        "embedding_multiplier": 32**0.5,
        "logit_multiplier": 0.5,
        "logit_soft_cap": 50.0,
    }
)


def config(model: ModelSpec, corpus: Path, steps: int) -> RunConfig:
    return RunConfig(
        name="story",
        model=model,
        data=DataConfig(
            sources=(Source(path=str(corpus)),),
            tokenizer=TrainedTokenizer(vocab_size=300),
            heldout_fraction=0.2,
        ),
        batch=Batch(sequences=4, sequence_tokens=32),
        budget=Duration(amount=steps, unit="steps"),
        optimizer=AdamW(learning_rate=1e-3),
    )


def weights(run: RunDirectory) -> dict[str, Tensor]:
    return load_newest(run.checkpoints_path, prefix="model.")[0].tensors


def losses(run: RunDirectory) -> Iterator[float]:
    return (event.loss for event in run.events() if hasattr(event, "gradient_norm"))


@pytest.mark.parametrize(
    "model", [pytest.param(LLAMA, id="llama"), pytest.param(GROK, id="grok", marks=pytest.mark.slow)]
)
def test_it_trains_on_as_if_it_had_never_left(model: ModelSpec, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    summary = start(config(model, corpus, 4), runs_directory=tmp_path / "runs", name="first", threads=1)
    first = RunDirectory(Path(summary.run_dir))
    export_run(first, tmp_path / "out")
    again = config(model, corpus, 5)

    # One from the run's own weights, one from those that left and came back.
    stayed = run_from_weights(
        again,
        ((p.name, weights(first)[f"model.{p.name}"]) for p in model.parameters()),
        tokenizer=first.tokenizer_path,
        origin="the run",
        runs_directory=tmp_path / "runs",
        name="stayed",
    )
    came_back = import_run(
        open_directory(tmp_path / "out"), again, runs_directory=tmp_path / "runs", name="came-back"
    )
    for run in (stayed, came_back):
        resume(run, threads=1)
    assert len(list(losses(stayed))) == 5
    assert list(losses(stayed)) == list(losses(came_back))
    ours, theirs = weights(stayed), weights(came_back)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not all(torch.equal(ours[name], weights(first)[name]) for name in ours)
    assert (came_back.path / "started_from.txt").read_text() == "out\n"


def test_a_plan_that_was_taken_out_of_a_trained_run_is_asked_for(tmp_path: Path) -> None:
    """A run without a plan is an imported one that has not begun; of any other the plan says how it was trained."""
    from colossus.errors import RunError

    corpus = write_corpus(tmp_path / "corpus")
    summary = start(config(LLAMA, corpus, 2), runs_directory=tmp_path / "runs", name="first", threads=1)
    run = RunDirectory(Path(summary.run_dir))
    run.write_config(run.config().model_copy(update={"plan": None}))
    with pytest.raises(RunError, match=r"no \[plan\]"):
        resume(run, threads=1)
