"""Text → tokenizer → token shards → global sample order → batches.

corpus = prepare(DataConfig(sources=(Source(path="stdlib"),)), Path("corpus"))
reader = BatchReader(corpus, seed=0, context_tokens=256, global_batch_sequences=32)
batch = reader.read(step=0)             # tokens, targets, documents: [32, 256]
held_out = heldout_windows(corpus, context_tokens=256)
"""

from colossus.data.batches import IGNORED, Batch, BatchReader
from colossus.data.corpus import Corpus, corpus_directory
from colossus.data.heldout import HeldOutWindows, heldout_windows
from colossus.data.manifest import Manifest
from colossus.data.order import Mixture, SampleOrder, WindowOrder
from colossus.data.prepare import prepare
from colossus.data.progress import Progress, RichProgress, SilentProgress
from colossus.data.readers import Document, read_documents
from colossus.data.tokenizer import StreamingDecoder, Tokenizer

__all__ = [
    "IGNORED",
    "Batch",
    "BatchReader",
    "Corpus",
    "Document",
    "HeldOutWindows",
    "Manifest",
    "Mixture",
    "Progress",
    "RichProgress",
    "SampleOrder",
    "SilentProgress",
    "StreamingDecoder",
    "Tokenizer",
    "WindowOrder",
    "corpus_directory",
    "heldout_windows",
    "prepare",
    "read_documents",
]
