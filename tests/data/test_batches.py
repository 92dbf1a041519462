"""Batches against slices of the whole token stream, and held-out windows that lose nothing."""

import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from colossus.data import IGNORED, BatchReader, Corpus, heldout_windows, prepare
from colossus.errors import DataError
from colossus.spec.data import Source

from .builders import small_config


def ring(corpus: Corpus, source: int, split: str = "train") -> np.ndarray:
    """A split's tokens, read straight from its files."""
    record = corpus.manifest.sources[source]
    shards = (record.train if split == "train" else record.heldout).shards
    return np.concatenate([np.fromfile(corpus.directory / shard.file, "<u2") for shard in shards]).astype(
        np.int64
    )


def test_batches_are_slices_of_the_stream(two_source_corpus: Corpus) -> None:
    reader = BatchReader(two_source_corpus, seed=3, context_tokens=64, global_batch_sequences=8)
    rings = [ring(two_source_corpus, source) for source in (0, 1)]
    for step in range(0, 60, 7):
        batch = reader.read(step)
        assert batch.samples.tolist() == list(range(step * 8, step * 8 + 8))
        places = reader.order.locate(batch.samples)
        for row in range(8):
            tokens = rings[places.source[row]]
            wanted = tokens[(places.start[row] + np.arange(65)) % len(tokens)]
            assert np.array_equal(batch.tokens[row], wanted[:-1])
            assert np.array_equal(batch.targets[row], wanted[1:])
    assert batch.tokens.shape == batch.targets.shape == batch.documents.shape == (8, 64)
    assert (batch.tokens.dtype, batch.targets.dtype, batch.documents.dtype) == (np.int64, np.int64, np.int32)


def test_documents_change_where_the_end_token_stands(two_source_corpus: Corpus) -> None:
    batch = BatchReader(two_source_corpus, 0, 128, 8).read(0)
    for tokens, documents in zip(batch.tokens.tolist(), batch.documents.tolist(), strict=True):
        expected, current = [], 0
        for place, token in enumerate(tokens):
            current += place > 0 and token == two_source_corpus.end_of_document
            expected.append(current)
        assert documents == expected
    assert batch.documents.max() > 0


def test_an_epoch_covers_every_training_token(two_source_corpus: Corpus) -> None:
    reader = BatchReader(two_source_corpus, seed=1, context_tokens=32, global_batch_sequences=4)
    windows = reader.windows_per_epoch
    samples = reader.order.locate(np.arange(6 * sum(windows)))
    for source in (0, 1):
        for epoch in (0, 1):
            chosen = (samples.source == source) & (samples.epoch == epoch)
            assert sorted(samples.window[chosen].tolist()) == list(range(windows[source]))
    shares = Counter(samples.source[:400].tolist())
    assert shares == {0: 300, 1: 100}


def test_ranges_do_not_depend_on_how_they_are_divided(two_source_corpus: Corpus) -> None:
    reader = BatchReader(two_source_corpus, 0, 16, 12)
    whole = reader.read(5)
    parts = [
        BatchReader(two_source_corpus, 0, 16, 12).read_samples(60 + first, n)
        for first, n in ((0, 5), (5, 1), (6, 6))
    ]
    for name in ("tokens", "targets", "documents", "samples"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in parts]))


def test_too_small_says_what_would_work(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a few words only, and nothing more than that, in one file")
    corpus = prepare(small_config(Source(path=str(tmp_path / "a.txt")), heldout=0.0), tmp_path / "corpus")
    tokens = corpus.train_tokens
    with pytest.raises(DataError, match=rf"{tokens} training tokens.*takes 4 windows of 1,024") as caught:
        BatchReader(corpus, 0, 1024, 4)
    assert f"context_tokens ≤ {tokens // 4}, or at least 4,096 training tokens" in str(caught.value)
    with pytest.raises(DataError, match=r"a global batch of ≤ \d+ sequences"):
        BatchReader(corpus, 0, 8, 1000)
    # What the message says does work.
    assert BatchReader(corpus, 0, tokens // 4, 4).read(10).tokens.shape == (4, tokens // 4)
    with pytest.raises(DataError, match="both begin at 1"):
        BatchReader(corpus, 0, 0, 4)
    with pytest.raises(DataError, match=r"no document is held out of 1 .held-out fraction 0,"):
        heldout_windows(corpus, 8)


def test_reading_takes_no_time_to_speak_of(two_source_corpus: Corpus) -> None:
    reader = BatchReader(two_source_corpus, 0, 256, 32)
    times = []
    for step in range(30):
        began = time.perf_counter()
        reader.read(step)
        times.append(time.perf_counter() - began)
    # A step takes half a second at the least; one per cent of that is 5 ms. Typically 0.2 ms.
    assert min(times) < 0.005


@pytest.mark.parametrize("context", [7, 64, 5000])
def test_heldout_targets_come_once_each(two_source_corpus: Corpus, context: int) -> None:
    windows = heldout_windows(two_source_corpus, context)
    end = two_source_corpus.end_of_document
    stream = np.concatenate([ring(two_source_corpus, source, "heldout") for source in (0, 1)])
    batches = list(windows.batches(3))
    tokens = np.concatenate([batch.tokens.ravel() for batch in batches])
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    counted = targets != IGNORED
    assert np.array_equal(tokens[: len(stream)], stream)
    assert np.array_equal(targets[counted], np.append(stream[1:], end))
    assert counted.sum() == windows.num_tokens == len(stream) == two_source_corpus.heldout_tokens
    assert not counted[windows.num_tokens :].any()
    assert windows.num_bytes == two_source_corpus.heldout_bytes
    assert len(windows) == math.ceil(len(stream) / context)
    text = two_source_corpus.tokenizer.decode(tokens[: len(stream)][stream != end])
    assert len(text.encode()) == windows.num_bytes


def test_heldout_of_one_source(two_source_corpus: Corpus) -> None:
    parts = [heldout_windows(two_source_corpus, 32, source=source) for source in (0, 1)]
    assert sum(part.num_bytes for part in parts) == two_source_corpus.heldout_bytes
    assert [part.num_tokens for part in parts] == [
        record.heldout.tokens for record in two_source_corpus.manifest.sources
    ]
