"""Loss over text against a plain computation, one token at a time."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from colossus.data import IGNORED, Tokenizer
from colossus.data.readers import Skips
from colossus.errors import CheckpointError, DataError
from colossus.evaluate import File, TextLoss, score, text_losses, text_pieces
from colossus.models import Decoder
from colossus.spec.data import Source
from tests.helpers import VARIETIES, random_tokens, scrambled

TEXTS = {
    "one.txt": "the cat sat on the mat, naïve as it was; the dog did not. " * 2,
    "two.txt": "🙂",
    "three.txt": "a mat",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def plain_nats(model: Decoder, tokenizer: Tokenizer, text: str, context: int) -> float:
    """Each token of a document alone, after at most `context` tokens: what a stride of 1 is."""
    end = tokenizer.end_of_document
    ids = [end, *map(int, tokenizer.encode(text)), end]
    nats = 0.0
    for place in range(1, len(ids)):
        before = torch.tensor([ids[max(0, place - context) : place]])
        logits = model.logits(model(before))[0, -1].double()
        nats -= float(logits.log_softmax(0)[ids[place]])
    return nats


def measured(model: Decoder, tokenizer: Tokenizer, paths: list[Path], **settings: int) -> list[TextLoss]:
    files: list[File] = []
    sources = [Source(path=str(path)) for path in paths]
    losses = text_losses(
        model,
        text_pieces(sources, tokenizer, files),
        context_tokens=settings.pop("context", 16),
        stride_tokens=settings.pop("stride", None),
        padding=tokenizer.end_of_document,
        **settings,
    )
    return [losses[owner] for owner in range(len(files))]


def test_against_one_token_at_a_time(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    paths = [folder / name for name in TEXTS]
    for found, text in zip(
        measured(model, tokenizer, paths, context=9, stride=1, sequences=5), TEXTS.values(), strict=True
    ):
        nats = plain_nats(model, tokenizer, text, 9)
        assert found.num_bytes == len(text.encode())
        assert found.num_tokens == len(tokenizer.encode(text)) + 1
        assert found.nats == pytest.approx(nats, rel=1e-5)
        assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(nats / found.num_tokens), rel=1e-4)


def test_windows_do_not_overlap_unless_asked(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """One document alone, cut at the multiples of the context, each part by itself."""
    (found,) = measured(model, tokenizer, [folder / "one.txt"], context=7)
    end = tokenizer.end_of_document
    ids = [end, *map(int, tokenizer.encode(TEXTS["one.txt"])), end]
    nats = 0.0
    for first in range(0, len(ids) - 1, 7):
        part = torch.tensor(ids[first : first + 8])
        log_probabilities = model.logits(model(part[None, :-1]))[0].double().log_softmax(-1)
        nats -= float(log_probabilities.gather(1, part[1:, None]).sum())
    assert found.nats == pytest.approx(nats, rel=1e-5)
    (closer,) = measured(model, tokenizer, [folder / "one.txt"], context=7, stride=2)
    assert closer.nats != pytest.approx(nats, rel=1e-3)


@pytest.mark.parametrize("stride", [16, 5])
def test_batches_and_chunks_change_nothing(
    model: Decoder, tokenizer: Tokenizer, folder: Path, stride: int
) -> None:
    paths = [folder, folder / "one.txt"]
    first = measured(model, tokenizer, paths, stride=stride, sequences=1)
    assert len(first) == 4
    for sequences, chunk in ((2, 3), (7, 1000), (50, 11)):
        again = measured(model, tokenizer, paths, stride=stride, sequences=sequences, chunk_tokens=chunk)
        for one, other in zip(first, again, strict=True):
            assert one.nats == pytest.approx(other.nats, rel=1e-6)
            assert (one.num_tokens, one.num_bytes) == (other.num_tokens, other.num_bytes)


def test_files_add_up_to_their_folder(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """At a stride of 1 a token sees no less for what stands before its document, so the parts are exact."""
    alone = [measured(model, tokenizer, [folder / name], stride=1)[0] for name in sorted(TEXTS)]
    together = measured(model, tokenizer, [folder], stride=1)
    assert [loss.num_bytes for loss in together] == [loss.num_bytes for loss in alone]
    for one, other in zip(alone, together, strict=True):
        assert one.nats == pytest.approx(other.nats, rel=1e-6)
    total = alone[0] + alone[1] + alone[2]
    assert total.bits_per_byte == pytest.approx(
        sum(loss.bits_per_byte * loss.num_bytes for loss in together)
        / sum(len(t.encode()) for t in TEXTS.values())
    )


def test_max_bytes_cuts_at_a_character_and_expects_no_end(
    model: Decoder, tokenizer: Tokenizer, folder: Path
) -> None:
    text = TEXTS["one.txt"]
    cut = text.encode().index("ï".encode()) + 1  # within the character
    files: list[File] = []
    (piece,) = text_pieces([Source(path=str(folder / "one.txt"))], tokenizer, files, max_bytes=cut)
    assert piece.num_bytes == cut - 1
    assert tokenizer.decode(piece.targets) == text.encode()[: cut - 1].decode()
    pieces = list(text_pieces([Source(path=str(folder))], tokenizer, [], max_bytes=len(text.encode()) + 2))
    assert [piece.targets[-1] == tokenizer.end_of_document for piece in pieces] == [True, False]
    assert sum(piece.num_bytes for piece in pieces) == len(text.encode()) + 2


def test_files_that_are_no_text_are_named(tokenizer: Tokenizer, folder: Path) -> None:
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    for name, sentence in (("empty.txt", "there is no text in .*empty"), ("latin.txt", "latin.txt.*UTF-8")):
        with pytest.raises(DataError, match=sentence):
            list(text_pieces([Source(path=str(folder / name))], tokenizer, []))
    with pytest.raises(DataError, match=r"nowhere.txt' does not exist"):
        list(text_pieces([Source(path=str(folder / "nowhere.txt"))], tokenizer, []))
    with pytest.raises(DataError, match="on the Hugging Face hub"):
        list(text_pieces([Source(path="hf:some/text")], tokenizer, []))
    # Met in a folder they are passed over and counted.
    skips, files = Skips(), list[File]()
    assert len(list(text_pieces([Source(path=str(folder))], tokenizer, files, skips=skips))) == 3
    assert [file.name for file in files] == sorted(TEXTS)
    assert "empty.txt" in str(skips)
    assert "latin.txt" in str(skips)


@pytest.mark.parametrize("variety", ["capped", "multipliers", "everything", "deepseek", "gpt"])
def test_scores_of_every_kind_of_head(variety: str) -> None:
    model = scrambled(VARIETIES[variety])
    tokens, targets = (random_tokens(model.spec, 3, 8, seed=seed).numpy() for seed in (1, 2))
    targets[1, 3:] = IGNORED
    scores = score(model, tokens, targets, chunk_tokens=4)
    with torch.no_grad():
        logits = model.logits(model(torch.from_numpy(tokens)))
    expected = logits.log_softmax(-1).gather(2, torch.from_numpy(targets).clamp(min=0)[..., None])[..., 0]
    there = targets != IGNORED
    np.testing.assert_allclose(scores.log_probabilities[there], expected.numpy()[there], rtol=1e-5, atol=1e-6)
    assert not scores.log_probabilities[~there].any()
    np.testing.assert_array_equal(scores.is_likeliest, (logits.argmax(-1).numpy() == targets) & there)


def test_a_model_that_computes_nothing(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    broken = scrambled(model.spec)
    with torch.no_grad():
        broken.final_norm.weight[0] = math.nan
    with pytest.raises(CheckpointError, match="not a finite number"):
        measured(broken, tokenizer, [folder])


def test_a_hopeless_perplexity_is_infinite() -> None:
    assert TextLoss(nats=8000.0, num_tokens=10, num_bytes=1, num_documents=1).perplexity == math.inf
