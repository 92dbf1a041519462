"""A tokenizer, and a run directory as training leaves it."""

import pytest
import torch

from colossus.checkpoint import save
from colossus.data import Tokenizer
from colossus.models import Decoder
from colossus.observe.run_directory import RunDirectory
from colossus.spec.data import DataConfig, LoadedTokenizer
from colossus.spec.run import Batch, RunConfig
from tests.helpers import scrambled, tiny


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Bytes and a few merges, so that many characters take several tokens."""
    return Tokenizer.train(["the cat sat on the mat, the cat sat", "naïve 🙂"] * 3, 270)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Decoder:
    """Random weights; it writes random text of all kinds of tokens."""
    return scrambled(tiny(vocab_size=tokenizer.vocab_size))


@pytest.fixture
def run(tokenizer: Tokenizer, model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Two checkpoints: zeros at step 1, `model`'s weights at step 2."""
    run = RunDirectory.create(tmp_path_factory.mktemp("runs"), "tiny")
    config = RunConfig(
        name="tiny",
        model=model.spec,
        data=DataConfig(tokenizer=LoadedTokenizer(path="elsewhere")),
        batch=Batch(sequences=2, sequence_tokens=8),
    )
    run.write_description(config)
    tokenizer.save(run.tokenizer_path)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    state = {"optimizer.momentum": torch.zeros(3)}
    for step, scale in ((1, 0.0), (2, 1.0)):
        scaled = {name: tensor * scale for name, tensor in tensors.items()}
        save(run.checkpoints_path, step, scaled | state, {}, model=model.spec)
    return run
