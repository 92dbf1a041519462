"""Train the shared byte-level BPE tokenizer and write the token files every peer reads.

Run as ``python prepare_tokens.py TEXT_DIR OUT_DIR VOCAB``. TEXT_DIR holds train.jsonl and heldout.jsonl
with a "text" field per line. Writes tokenizer.json, train.npy and heldout.npy (uint16), and meta.json
into OUT_DIR.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"


def read_texts(path: Path) -> list[str]:
    """The documents of a JSON-lines file."""
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines if line.strip()]
    except OSError as error:
        sys.exit(f"cannot read {path}: {error.strerror}")
    except (json.JSONDecodeError, KeyError) as error:
        sys.exit(f'{path}: every line has to be a JSON object with a "text" field ({error!r})')


def main() -> None:
    """Train on the training text only; encode both parts."""
    if len(sys.argv) != 4:
        sys.exit("usage: python prepare_tokens.py TEXT_DIR OUT_DIR VOCAB")
    source, target, vocab = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    if not 257 <= vocab <= 65536:
        sys.exit(f"vocabulary {vocab} is out of range: 257 to 65536 (ids are stored in 16 bits)")
    target.mkdir(parents=True, exist_ok=True)
    parts = {name: read_texts(source / f"{name}.jsonl") for name in ("train", "heldout")}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        parts["train"],
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(target / "tokenizer.json"))
    meta: dict[str, int] = {"vocab": vocab}
    for name, texts in parts.items():
        ids: list[int] = []
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            ids.append(0)  # END opens every document
            ids.extend(encoding.ids)
        np.save(target / f"{name}.npy", np.asarray(ids, dtype=np.uint16))
        meta[f"{name}_tokens"] = len(ids)
        meta[f"{name}_bytes"] = sum(len(text.encode()) for text in texts)
        meta[f"{name}_documents"] = len(texts)
    (target / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    print(json.dumps(meta))


if __name__ == "__main__":
    main()
