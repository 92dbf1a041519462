"""A model to measure, and a real run, trained for a few steps."""

from pathlib import Path

import pytest

from colossus.data import Tokenizer
from colossus.generate import Borders, LoadedModel
from colossus.models import Decoder
from colossus.observe.run_directory import RunDirectory
from colossus.spec.config import from_toml
from colossus.spec.model import MlpSpec, ModelSpec
from colossus.trainer.run import start
from tests.helpers import GQA, scrambled, tiny
from tests.stories.processes import recipe


def spec_of(tokenizer: Tokenizer, context_tokens: int = 16) -> ModelSpec:
    """One that transformers implements too."""
    return tiny(
        vocab_size=tokenizer.vocab_size,
        context_tokens=context_tokens,
        attention=GQA,
        mlp=MlpSpec(intermediate_size=20),
    )


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat, the dog sat on the cat", "naïve 🙂 answers"] * 3, 290)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Decoder:
    return scrambled(spec_of(tokenizer)).requires_grad_(False)


@pytest.fixture(scope="session")
def loaded(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """With a context that whole questions fit in."""
    return LoadedModel(
        model=scrambled(spec_of(tokenizer, 96), seed=1).requires_grad_(False),
        tokenizer=tokenizer,
        name="tiny",
        path=tmp_path_factory.mktemp("tiny"),
        chat_template=None,
        rejected=(),
        borders=Borders.of_run(tokenizer),
        special_tokens={},
    )


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """12 steps of a real run, with its closing evaluation."""
    directory = tmp_path_factory.mktemp("trained")
    config = from_toml(Path(recipe(directory)).read_text())
    start(config, runs_directory=directory / "runs", name="story")
    return RunDirectory(directory / "runs" / "story-001")
