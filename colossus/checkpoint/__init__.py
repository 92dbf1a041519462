"""Checkpoints: the training state on disk, whole or not there at all.

    save.py       the state into a directory that appears in one instant
    saver.py      the same behind training's back, and what to keep: retention.py
    load.py       back again, every byte checked; the newest good one
    expect.py     is it a checkpoint of this model?
    manifest.py   what a checkpoint says about itself
    payload.py    tensors in files
    directory.py  names, publication, leftovers of dead processes

A checkpoint is a directory:

    checkpoints/step-00001200/
        manifest.json                 step, facts, model; every tensor's dtype, shape, pieces and hashes
        model-00000.safetensors       one payload per leading name (`model.`, `optimizer.`) and writing rank
        optimizer-00000.safetensors

A tensor is a list of pieces, each with its offsets in the whole tensor and its place in a payload. One
process writes one piece per tensor; ranks that hold shards write payloads of their own under the same
manifest.
"""

from colossus.checkpoint.directory import Checkpoint, clean, list_checkpoints
from colossus.checkpoint.load import Loaded, Rejected, load, load_newest, verify
from colossus.checkpoint.retention import retire
from colossus.checkpoint.save import Saved, save
from colossus.checkpoint.saver import SaveFailed, Saver

__all__ = [
    "Checkpoint",
    "Loaded",
    "Rejected",
    "SaveFailed",
    "Saved",
    "Saver",
    "clean",
    "list_checkpoints",
    "load",
    "load_newest",
    "retire",
    "save",
    "verify",
]
