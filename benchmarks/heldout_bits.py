"""Held-out bits per byte of a trained run on documents of one's choice.

    python benchmarks/heldout_bits.py RUN heldout.jsonl

Prints one JSON object. The documents stand end to end, each opened by the end-of-document mark, in windows of the
training length that do not overlap; every token is a target once.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from colossus.data.batches import IGNORED, Batch, document_indices
from colossus.generate import load_run
from colossus.observe.run_directory import RunDirectory
from colossus.trainer.step import loss_sums


def windows(tokens: np.ndarray, length: int, end: int) -> Batch:
    """A stream of tokens as one batch of windows; the last is filled up with ignored targets."""
    count = -(-(len(tokens) - 1) // length)
    padded = np.full(count * length + 1, end, np.int64)
    padded[: len(tokens)] = tokens
    inputs = padded[:-1].reshape(count, length)
    targets = padded[1:].copy()
    targets[len(tokens) - 1 :] = IGNORED
    return Batch(inputs, targets.reshape(count, length), document_indices(inputs, end), np.arange(count))


def main(run_path: str, text_path: str) -> None:
    run = RunDirectory.open(run_path)
    plan = run.config().plan
    if plan is None:
        sys.exit(f"{run_path} has no plan: it has not been trained")
    torch.set_num_threads(1)
    model, tokenizer, _ = load_run(run)
    lines = Path(text_path).read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines if line]
    end = tokenizer.end_of_document
    stream = [[end, *map(int, ids)] for ids in tokenizer.encode_batch(documents)]
    batch = windows(np.array([*(token for ids in stream for token in ids), end]), plan.sequence_tokens, end)
    nats = 0.0
    with torch.no_grad():
        for i in range(len(batch.samples)):
            here = slice(i, i + 1)
            one = Batch(batch.tokens[here], batch.targets[here], batch.documents[here], batch.samples[here])
            nats += loss_sums(model, one, plan)[1].loss.item()
    num_bytes = sum(len(text.encode()) for text in documents)
    print(
        json.dumps({"bpb": nats / math.log(2) / num_bytes, "bytes": num_bytes, "documents": len(documents)})
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
